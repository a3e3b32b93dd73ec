"""Links under virtual time: latency, bandwidth, queues with decode frames ahead of everything else, loss, cuts.

What our transport does is modelled, not its packets: one ordered stream for each pair of peers and direction, in
which a frame of the token lane waits for at most one chunk of the frame before it. A lost packet stops
its stream until it is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from helixnet.core.types import PeerId
from helixnet.core.wire.codec import CHUNK_BYTES_MAX, Lane
from helixnet.core.wire.messages import Message
from helixnet.sim.engine import Engine

_TOKEN = Lane.TOKEN
"""Looking up a member of an enum costs as much as the rest of a comparison."""
LOCAL_S = 0.0
"""A peer's messages to itself take no time."""
RESEND_S_MIN = 0.2
"""A lost packet is sent again after two round trips, but not sooner than this (TCP's shortest timer)."""


@dataclass(frozen=True, slots=True)
class Path:
    """The way from one peer to another."""

    latency_s: float
    """One way."""
    bandwidth: float
    """Bytes/s."""
    line: Hashable
    """Frames with the same line share its bandwidth: a pair of peers, or a whole uplink."""
    loss: float = 0.0
    """Share of frames of which a packet is lost."""


Frame = tuple[Message, bytes | memoryview]
"""A message and its body."""
Deliver = Callable[[PeerId, PeerId, Frame], None]


class Topology(Protocol):
    """Who is how far from whom."""

    def path(self, source: PeerId, target: PeerId) -> Path:
        """The way from `source` to `target`; the same at every call."""
        ...


@dataclass(slots=True)
class Line:
    """A server of frames. Tokens go first; bulk is pushed back by what overtakes it."""

    token_free_at: float = 0.0
    bulk_free_at: float = 0.0
    pushed_s: float = 0.0
    """By how much bulk has been pushed back, ever."""
    busy_s: float = 0.0
    bytes: int = 0
    waited_s_max: float = 0.0


@dataclass(slots=True)
class _Way:
    """From one peer to another, as it is now."""

    path: Path
    line: Line
    bandwidth: float
    """Bytes/s, of which a slowed link has less."""
    arrived_at: float = 0.0
    """When its last token frame arrives."""


class Network:
    """Carries frames: `deliver(source, target, frame)` is called when one arrives, never if the pair is cut by then."""

    def __init__(self, engine: Engine, topology: Topology, deliver: Deliver) -> None:
        self.lines: dict[Hashable, Line] = {}
        self._engine = engine
        self._topology = topology
        self._deliver = deliver
        self._ways: dict[tuple[PeerId, PeerId], _Way] = {}
        self._cut: set[tuple[PeerId, PeerId]] = set()

    # --- faults ------------------------------------------------------------------------------------

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Nothing travels between the two, either way, and nobody is told."""
        self._cut |= {(one, other), (other, one)}

    def mend(self, one: PeerId, other: PeerId) -> None:
        """The two can talk again."""
        self._cut -= {(one, other), (other, one)}

    def cut_from(self, target: PeerId) -> frozenset[PeerId]:
        """Those of whom nothing arrives."""
        return frozenset([source for source, other in self._cut if other == target])

    def slow(self, source: PeerId, target: PeerId, factor: float) -> None:
        """The link has so much of its bandwidth from now on."""
        way = self._way((source, target))
        way.bandwidth = way.path.bandwidth * factor

    # --- sending -----------------------------------------------------------------------------------

    def _way(self, pair: tuple[PeerId, PeerId]) -> _Way:
        found = self._ways.get(pair)
        if found is None:
            path = self._topology.path(*pair)
            line = self.lines.setdefault(path.line, Line())
            found = self._ways[pair] = _Way(path, line, path.bandwidth)
        return found

    def send(self, source: PeerId, target: PeerId, size: int, lane: Lane, frame: Frame) -> None:
        """Carry a frame of `size` bytes; frames of one lane between two peers arrive in order."""
        engine = self._engine
        if source == target:
            engine.after(LOCAL_S, self._deliver, source, target, frame)
            return
        pair = source, target
        if pair in self._cut:
            return
        way = self._ways.get(pair) or self._way(pair)
        path, line = way.path, way.line
        seconds = size / way.bandwidth
        line.busy_s += seconds
        line.bytes += size
        resent_s = 0.0
        if path.loss and engine.rng.random() < path.loss:
            resent_s = max(RESEND_S_MIN, 4 * path.latency_s)
        if lane is _TOKEN:
            arrives_at = self._overtake(line, path, seconds) + path.latency_s + resent_s
            if arrives_at < way.arrived_at:
                arrives_at = way.arrived_at
            way.arrived_at = arrives_at
            engine.at(arrives_at, self._arrive, source, target, frame)
        else:
            start = max(engine.now, line.bulk_free_at, line.token_free_at)
            line.waited_s_max = max(line.waited_s_max, start - engine.now)
            line.bulk_free_at = start + seconds
            rest_s = path.latency_s + resent_s
            engine.at(line.bulk_free_at, self._bulk_sent, line, line.pushed_s, rest_s, (source, target, frame))

    def _overtake(self, line: Line, path: Path, seconds: float) -> float:
        """When a token frame of so many seconds is through; what of bulk lies ahead is one chunk at most."""
        now = start = self._engine.now
        if line.token_free_at > now:
            start = line.token_free_at
        if line.bulk_free_at > start:
            if line.token_free_at <= now:
                start += min(line.bulk_free_at - now, CHUNK_BYTES_MAX / path.bandwidth) / 2
            line.bulk_free_at += seconds
            line.pushed_s += seconds
        if start - now > line.waited_s_max:
            line.waited_s_max = start - now
        line.token_free_at = start + seconds
        return line.token_free_at

    def _bulk_sent(self, line: Line, pushed_s: float, rest_s: float, item: tuple[PeerId, PeerId, Frame]) -> None:
        """A bulk frame is through, unless tokens pushed it back meanwhile."""
        late_s = line.pushed_s - pushed_s
        if late_s > 0:
            self._engine.after(late_s, self._bulk_sent, line, line.pushed_s, rest_s, item)
        else:
            self._engine.after(rest_s, self._arrive, *item)

    def _arrive(self, source: PeerId, target: PeerId, frame: Frame) -> None:
        if not self._cut or (source, target) not in self._cut:
            self._deliver(source, target, frame)

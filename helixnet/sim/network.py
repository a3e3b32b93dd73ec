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


class Network:
    """Carries frames: `deliver(source, target, frame)` is called when one arrives, never if the pair is cut by then."""

    def __init__(self, engine: Engine, topology: Topology, deliver: Deliver) -> None:
        self.lines: dict[Hashable, Line] = {}
        self._engine = engine
        self._topology = topology
        self._deliver = deliver
        self._paths: dict[tuple[PeerId, PeerId], Path] = {}
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._slowed: dict[tuple[PeerId, PeerId], float] = {}
        self._arrived_at: dict[tuple[PeerId, PeerId], float] = {}

    # --- faults ------------------------------------------------------------------------------------

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Nothing travels between the two, either way, and nobody is told."""
        self._cut |= {(one, other), (other, one)}

    def mend(self, one: PeerId, other: PeerId) -> None:
        """The two can talk again."""
        self._cut -= {(one, other), (other, one)}

    def is_cut(self, source: PeerId, target: PeerId) -> bool:
        """Whether nothing arrives."""
        return (source, target) in self._cut

    def slow(self, source: PeerId, target: PeerId, factor: float) -> None:
        """The link has so much of its bandwidth from now on."""
        self._slowed[source, target] = factor

    # --- sending -----------------------------------------------------------------------------------

    def path(self, source: PeerId, target: PeerId) -> Path:
        """The way between two peers."""
        found = self._paths.get((source, target))
        if found is None:
            found = self._paths[source, target] = self._topology.path(source, target)
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
        path = self.path(source, target)
        line = self.lines.get(path.line)
        if line is None:
            line = self.lines[path.line] = Line()
        seconds = size / (path.bandwidth * self._slowed.get(pair, 1.0))
        line.busy_s += seconds
        line.bytes += size
        resent_s = 0.0
        if path.loss and engine.rng.random() < path.loss:
            resent_s = max(RESEND_S_MIN, 4 * path.latency_s)
        if lane is Lane.TOKEN:
            sent_at = self._overtake(line, path, seconds)
            arrives_at = max(sent_at + path.latency_s + resent_s, self._arrived_at.get(pair, 0.0))
            self._arrived_at[pair] = arrives_at
            engine.at(arrives_at, self._arrive, source, target, frame)
        else:
            start = max(engine.now, line.bulk_free_at, line.token_free_at)
            line.waited_s_max = max(line.waited_s_max, start - engine.now)
            line.bulk_free_at = start + seconds
            rest_s = path.latency_s + resent_s
            engine.at(line.bulk_free_at, self._bulk_sent, line, line.pushed_s, rest_s, (source, target, frame))

    def _overtake(self, line: Line, path: Path, seconds: float) -> float:
        """When a token frame of so many seconds is through; what of bulk lies ahead is one chunk at most."""
        now = self._engine.now
        start = max(now, line.token_free_at)
        if line.bulk_free_at > start:
            if line.token_free_at <= now:
                start += min(line.bulk_free_at - now, CHUNK_BYTES_MAX / path.bandwidth) / 2
            line.bulk_free_at += seconds
            line.pushed_s += seconds
        line.waited_s_max = max(line.waited_s_max, start - now)
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
        if (source, target) not in self._cut:
            self._deliver(source, target, frame)

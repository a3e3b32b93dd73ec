"""How good a link is: round trip by pings, bandwidth by short timed transfers, afterwards kept fresh from real traffic.

`Prober` is a machine: whoever owns the inbox hands it messages and time and posts what it returns. So it needs no inbox
and no tasks of its own, and runs in the simulator as it is.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from helixnet.core.swarm.records import LinkMeasure
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Lane
from helixnet.core.wire.messages import Message, Ping, Pong, ProbeData, ProbeReport
from helixnet.net.base import Traffic

PINGS = 5
TRANSFER_BYTES = (64 << 10, 256 << 10, 1 << 20)
"""Ever larger, so that a slow link is not kept busy for long and a long one gets its TCP window open."""
ENOUGH_S = 0.25
"""A transfer that took this long has measured the link; the next, four times larger, would take a second."""
PARTS = 8
"""Messages per transfer. The clock starts when the first has come, so that the round trip is not counted."""
PROBE_S = 10.0
WAITING_MAX = 256
INCOMING_MAX = 64
SECONDS_MIN = 1e-5

BUSY_SHARE = 0.5
"""A writer blocked for more than this share of the time has a full link: its rate is the link's bandwidth."""
EWMA_WEIGHT = 0.3
OBSERVE_BYTES_MIN = 64 << 10

_PADDING = bytes(TRANSFER_BYTES[-1] // PARTS)


@dataclass(frozen=True, slots=True)
class Post:
    """A message to be posted."""

    to: PeerId
    message: Message
    body: bytes | memoryview = b""
    lane: Lane = Lane.TOKEN


@dataclass(slots=True)
class _Active:
    """The measurement under way. One at a time: two would share the link that both measure."""

    peer: PeerId
    deadline: float
    nonce: int
    asked_at: float
    round_trips: list[float] = field(default_factory=list)
    step: int = -1
    bandwidth: float = 0.0


@dataclass(slots=True)
class _Incoming:
    """A transfer that a peer times with our help."""

    nonce: int
    started_at: float
    received_bytes: int = 0


class Prober:
    """Measures links from this peer to others, and answers their measurements."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: deque[PeerId] = deque()
        self._active: _Active | None = None
        self._incoming: OrderedDict[PeerId, _Incoming] = OrderedDict()
        self._links: dict[PeerId, LinkMeasure] = {}
        self._seen: dict[PeerId, tuple[float, int, float]] = {}

    def links(self) -> dict[PeerId, LinkMeasure]:
        """The latest measures."""
        return dict(self._links)

    def measure(self, peer: PeerId, now: float) -> list[Post]:
        """Measure the link to `peer`, after those that wait already."""
        asked = peer in self._waiting or (self._active is not None and self._active.peer == peer)
        if not asked and len(self._waiting) < WAITING_MAX:
            self._waiting.append(peer)
        return self._begin_next(now)

    def forget(self, peer: PeerId, now: float) -> list[Post]:
        """Drop a peer that is gone."""
        self._links.pop(peer, None)
        self._seen.pop(peer, None)
        self._incoming.pop(peer, None)
        if peer in self._waiting:
            self._waiting.remove(peer)
        if self._active is not None and self._active.peer == peer:
            self._active = None
        return self._begin_next(now)

    def receive(self, sender: PeerId, message: Message, body: memoryview, now: float) -> list[Post] | None:
        """What to post in answer; None if the message is not about probes."""
        match message:
            case Ping():
                return [Post(sender, Pong(nonce=message.nonce))]
            case Pong():
                return self._ponged(sender, message, now)
            case ProbeData():
                return self._count(sender, message, body.nbytes, now)
            case ProbeReport():
                return self._reported(sender, message, now)
        return None

    def tick(self, now: float) -> list[Post]:
        """Give up on a measurement that takes too long, and begin the next."""
        if self._active is not None and now >= self._active.deadline:
            self._active = None
        return self._begin_next(now)

    def deadline(self) -> float:
        """When `tick` has something to do at the latest."""
        return self._active.deadline if self._active is not None else float("inf")

    def observe(self, traffic: Mapping[PeerId, Traffic], now: float) -> None:
        """Refine bandwidths from what was really sent since the last call (call it every few seconds)."""
        for peer, link in self._links.items():
            counters = traffic.get(peer)
            if counters is None:
                continue
            sent, blocked_s = sum(counters.sent.bytes.values()), counters.blocked_s
            since, sent_before, blocked_before = self._seen.get(peer, (now, sent, blocked_s))
            self._seen[peer] = (now, sent, blocked_s)
            if now > since and sent - sent_before >= OBSERVE_BYTES_MIN:
                rate = (sent - sent_before) / (now - since)
                busy = (blocked_s - blocked_before) / (now - since) >= BUSY_SHARE
                self._links[peer] = refined(link, rate, busy)

    # --- asking ----------------------------------------------------------------------------------------------------

    def _begin_next(self, now: float) -> list[Post]:
        if self._active is not None or not self._waiting:
            return []
        peer = self._waiting.popleft()
        self._active = _Active(peer, now + PROBE_S, self._rng.getrandbits(60), now)
        return [Post(peer, Ping(nonce=self._active.nonce))]

    def _ponged(self, sender: PeerId, pong: Pong, now: float) -> list[Post]:
        active = self._active
        if active is None or active.peer != sender or active.step >= 0 or pong.nonce != active.nonce:
            return []
        active.round_trips.append(now - active.asked_at)
        if len(active.round_trips) == PINGS:
            return self._transfer(active, now)
        active.nonce, active.asked_at = active.nonce + 1, now
        return [Post(sender, Ping(nonce=active.nonce))]

    def _transfer(self, active: _Active, now: float) -> list[Post]:
        active.step += 1
        active.nonce, active.asked_at = active.nonce + 1, now
        body = memoryview(_PADDING)[: TRANSFER_BYTES[active.step] // PARTS]
        return [
            Post(
                active.peer,
                ProbeData(nonce=active.nonce, sequence=sequence, final=sequence == PARTS - 1),
                body,
                Lane.BULK,
            )
            for sequence in range(PARTS)
        ]

    def _reported(self, sender: PeerId, report: ProbeReport, now: float) -> list[Post]:
        active = self._active
        if active is None or active.peer != sender or active.step < 0 or report.nonce != active.nonce:
            return []
        round_trip = min(active.round_trips)  # what the link takes; the rest is a busy process or a full queue
        counted = TRANSFER_BYTES[active.step] // PARTS * (PARTS - 1)
        # The receiver may boast to attract work: it is believed up to twice what we saw ourselves.
        claimed = report.seconds if report.seconds > 0 else 0.0
        seconds = max(claimed, (now - active.asked_at - round_trip) / 2, SECONDS_MIN)
        active.bandwidth = max(active.bandwidth, counted / seconds)
        if seconds < ENOUGH_S and active.step + 1 < len(TRANSFER_BYTES):
            return self._transfer(active, now)
        self._links[sender] = LinkMeasure(sender, round_trip, active.bandwidth)
        self._active = None
        return self._begin_next(now)

    # --- answering -------------------------------------------------------------------------------------------------

    def _count(self, sender: PeerId, part: ProbeData, size: int, now: float) -> list[Post]:
        known = self._incoming.get(sender)
        if known is None or known.nonce != part.nonce:
            self._incoming[sender] = _Incoming(part.nonce, now)
            self._incoming.move_to_end(sender)
            if len(self._incoming) > INCOMING_MAX:
                self._incoming.popitem(last=False)
            return []
        known.received_bytes += size
        if not part.final:
            return []
        del self._incoming[sender]
        seconds = max(now - known.started_at, SECONDS_MIN)
        return [Post(sender, ProbeReport(nonce=part.nonce, received_bytes=known.received_bytes, seconds=seconds))]


def refined(link: LinkMeasure, rate: float, busy: bool) -> LinkMeasure:
    """The measure after `rate` bytes/s were seen on the link.

    A full link shows its bandwidth: follow it smoothly. One with room left shows only that it carries at least that.
    """
    bandwidth = link.bandwidth + EWMA_WEIGHT * (rate - link.bandwidth) if busy else max(link.bandwidth, rate)
    return LinkMeasure(link.target, link.round_trip_s, bandwidth)

"""Who plans: ranked members, a lease that must be renewed, terms that only grow (design, section 6).

There is no consensus on an open DHT, so nothing depends on there being one coordinator: a plan only
changes efficiency. Two sides of a partition each elect one; when it heals, the higher
(term, stability, id) stays and the other steps down.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import msgspec

from helixnet.core.machine import NEVER, Effect, Emit, Event, Send
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import Lease, Resign

CHALLENGE = 2.0
"""Whoever wants the place of another, in the front or as a deputy, must have been up so many times as long: records are
old, and those who started together would take turns otherwise."""
STAGGER_SPREAD = 64
"""Those who are in nobody's list claim in one of so many turns, so that one is heard before most others."""


class LeaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Timing of the lease."""

    settle_s: float = 1.5
    """A fresh peer listens this long before it may claim."""
    duration_s: float = 4.0
    renew_s: float = 1.0
    drift_margin_s: float = 0.5
    """The holder's own view ends this much earlier: clocks run at different speeds."""
    claim_stagger_s: float = 0.7
    """The second in rank waits this much longer than the first, the third twice, and so on."""
    stagger_ranks_max: int = 16
    """Whoever ranks behind so many waits longer than all of them, and for a time of its own: it may know only these."""
    look_s: float = 0.25
    """While nobody holds the lease, ranks may change: they are looked at this often."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live member that could coordinate."""

    peer: PeerId
    uptime_s: float


def stability(uptime_s: float) -> int:
    """Uptime in coarse doublings, so that ranks do not change every second: 0 below a minute, then 1, 2, ..."""
    return int(math.log2(max(1.0, uptime_s / 30.0)))


def place(mine: Candidate, others: Iterable[Candidate], most: int) -> int:
    """How many of the others rank higher, at most `most`: the longer stable, ties by id (the larger wins, as in
    comparing leases).
    """
    ours = stability(mine.uptime_s), mine.peer
    above = (other for other in others if (stability(other.uptime_s), other.peer) > ours)
    return sum(1 for _ in islice(above, most))


def steadiest(candidates: Iterable[Candidate], most: int) -> list[PeerId]:
    """The first `most` by rank, as `place` counts it."""
    first = heapq.nlargest(most, candidates, key=lambda one: (stability(one.uptime_s), one.peer))
    return [candidate.peer for candidate in first]


class Election:
    """One peer's view of the lease. The caller passes who is live; only members with layers or room may claim."""

    def __init__(self, me: PeerId, config: LeaseConfig, now: float) -> None:
        self.me = me
        self.term = 0
        """Highest term seen."""
        self.holder: PeerId | None = None
        self.addresses: tuple[str, ...] = ()
        self._config = config
        self._strength: tuple[int, int, PeerId] = (0, 0, PeerId(""))
        self._expires_at = -math.inf
        self._renew_at = -math.inf
        self._vacant_since = now + config.settle_s
        self._look_at = -math.inf
        self._told_of = 0

    def vacant_from(self, now: float) -> float:
        """From when on the lease is, or was, to be claimed; now, where it is only now found to have lapsed."""
        return max(self._vacant_since, now) if self.holder is not None else self._vacant_since

    def i_hold(self, now: float) -> bool:
        """Whether we may act as coordinator now."""
        return self.holder == self.me and now < self._expires_at - self._config.drift_margin_s

    def see_term(self, term: int) -> None:
        """Someone has heard of this term: a claim of ours must be higher."""
        self.term = max(self.term, term)

    def told_of(self, coordinator: PeerId, term: int, now: float) -> bool:
        """A member's record names a coordinator that we have not heard ourselves. Returns whether to report to it.

        Its lease gets time to reach us before we think of a claim of our own; once for each term, and not for one in
        which we have heard a lease, because records outlive coordinators.
        """
        self.see_term(term)
        if self.holder is not None or coordinator == self.me or term <= self._told_of:
            return False
        self._told_of = term
        self._vacant_since = max(self._vacant_since, now + self._config.duration_s)
        return True

    def lease(self, sender: PeerId, message: Lease, now: float) -> list[Effect]:
        """A claim or a renewal came. A weaker one is answered with the stronger lease we follow."""
        if message.coordinator != sender or message.duration_s > 10 * self._config.duration_s:
            return []
        strength = (message.term, message.stability, message.coordinator)
        self.see_term(message.term)
        if strength < self._strength and now < self._expires_at:
            if self.holder != self.me:
                return []
            if message.term == self._strength[0]:
                # Both may have numbered plans in this term already: a higher one tells ours apart (see `tick`).
                self.see_term(message.term + 1)
            return [Send(sender, self._message())]
        effects: list[Effect] = []
        if self.holder == self.me != sender and message.term == self._strength[0]:
            # It outranks us in a term in which we may have numbered plans: told of us it claims a higher one.
            effects.append(Send(sender, self._message()))
        if sender != self.holder:
            effects.append(Emit(Event("coordinator.changed", {"coordinator": sender, "term": message.term})))
        self.holder, self._strength, self.addresses = sender, strength, message.addresses
        self._told_of = max(self._told_of, message.term)
        self._expires_at = now + message.duration_s
        return effects

    def vouch(self, peer: PeerId) -> list[Effect]:
        """What somebody who just reported to us for the first time is told: our lease."""
        return [Send(peer, self._message())] if self.holder == self.me else []

    def vacate(self, peer: PeerId, now: float) -> None:
        """The coordinator resigned or its channel broke: its lease ends now."""
        if peer == self.holder and peer != self.me:
            self._expires_at = min(self._expires_at, now)
            self._lapse(now)

    def resign(self, live: list[Candidate]) -> list[Effect]:
        """Give the lease back before leaving."""
        if self.holder != self.me:
            return []
        self.holder, self._expires_at = None, -math.inf
        return [Send(c.peer, Resign(term=self.term)) for c in live if c.peer != self.me]

    def deadline(self, may_claim: bool) -> float:
        """Until when `tick` has nothing to do."""
        if self.holder is not None and self.holder != self.me:
            return self._expires_at
        if self.holder == self.me and self.term == self._strength[0]:
            return min(self._renew_at, self._expires_at)
        return max(self._vacant_since, self._look_at) if may_claim else NEVER

    def tick(
        self, now: float, mine: Candidate | None, live: Callable[[], list[Candidate]], addresses: tuple[str, ...]
    ) -> list[Effect]:
        """Renew what we hold, notice what has lapsed, claim what is ours to claim.

        `mine` is None while we may not coordinate (not ready, leaving); `live` gives the other live members; it is only
        asked when somebody is to be told or ranked.
        """
        if self.holder == self.me and now < self._expires_at and self.term == self._strength[0]:
            return self._renew(now, live()) if now >= self._renew_at else []
        self._lapse(now)
        outbid = self.holder == self.me  # a member has seen a higher term than ours: claim above it
        if mine is None or (self.holder is not None and not outbid) or now < self._vacant_since:
            return []
        others = live()
        turns = 0 if outbid else self._turns(mine, others)
        turn_at = self._vacant_since + turns * self._config.claim_stagger_s
        if now < turn_at:
            self._look_at = min(turn_at, now + self._config.look_s)
            return []
        self.term += 1
        self.holder, self.addresses = self.me, addresses
        self._strength = (self.term, stability(mine.uptime_s), self.me)
        claimed = Emit(Event("coordinator.changed", {"coordinator": self.me, "term": self.term}))
        return [claimed, *self._renew(now, others)]

    def _turns(self, mine: Candidate, others: list[Candidate]) -> int:
        """How many turns we let pass before we claim."""
        most = self._config.stagger_ranks_max
        behind = place(mine, others, most)
        return behind if behind < most else most + hashlib.sha256(self.me.encode()).digest()[0] % STAGGER_SPREAD

    def _lapse(self, now: float) -> None:
        if self.holder is not None and now >= self._expires_at:
            self.holder = None
            self._vacant_since = max(self._vacant_since, now)

    def _renew(self, now: float, live: list[Candidate]) -> list[Effect]:
        # The holder counts from when it asked, everyone else from when they heard.
        self._expires_at = now + self._config.duration_s
        self._renew_at = now + self._config.renew_s
        return [Send(c.peer, self._message()) for c in live if c.peer != self.me]

    def _message(self) -> Lease:
        term, steadiness, holder = self._strength
        return Lease(
            term=term,
            coordinator=holder,
            stability=steadiness,
            duration_s=self._config.duration_s,
            addresses=self.addresses,
        )

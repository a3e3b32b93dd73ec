"""Which keys of the directory hold a network's members, and who reads which of them when (decision 13).

Every member has a short record in one of SHARDS keys, chosen by its id. The *front* is the one key that everybody
reads: it holds the coordinator, who may follow it, and the steadiest members, so that in a small swarm it holds all.
"""

from __future__ import annotations

import hashlib
import math

from helixnet.core.plan.plan import PEERS_MAX
from helixnet.core.swarm.election import CHALLENGE, Candidate, place
from helixnet.core.swarm.records import LINKS_MAX, RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId

SHARDS = PEERS_MAX // RECORDS_PER_KEY_MAX
FOLLOWER_PAUSES = 12
"""Whoever follows a coordinator reads the front so much more seldom: it hears from it what matters ..."""
RESIDENT_PAUSES = 3
"""... and who is in it so often, to see whether it still belongs there."""
LOOK_PATIENCE_S = 30.0
"""A directory that does not answer keeps nobody from claiming a lease for longer."""
SHARD_PAUSES = 3
"""A coordinator reads one shard, in rotation, in the time of so many looks at the front; so does who knows too few
neighbours to measure its links to."""


def front_key(network: str) -> str:
    """Where newcomers look first."""
    return f"helixnet/1/{network}/front"


def shard_key(network: str, shard: int) -> str:
    """Where the directory keeps a part of the records of a network's members."""
    return f"helixnet/1/{network}/members/{shard:x}"


def shard_of(peer: PeerId) -> int:
    """Which part a member's record is in."""
    return hashlib.sha256(peer.encode()).digest()[0] % SHARDS


class Reading:
    """When one peer reads which keys."""

    def __init__(self, me: PeerId, network: str) -> None:
        self.belongs = False
        """Whether we write our record into the front; it is not known before the first look."""
        self.resides = False
        """Whether we have also found it there, among the best."""
        self._me = me
        self._network = network
        self._shard = shard_of(me)
        """The next to be read; one's own first."""
        self._front_at = -math.inf
        """When it was read last."""
        self._shard_at = -math.inf
        self._found_nobody = False
        self._looked_at = -math.inf
        """When the front was known last."""

    def due(self, read_s: float, follows: bool, in_front: bool, neighbours: int, now: float) -> list[str]:
        """The keys to be read now, if one reads every `read_s` who knows no coordinator, or is it.

        `neighbours` says how many other members are known.
        """
        keys = []
        pauses = (RESIDENT_PAUSES if in_front else FOLLOWER_PAUSES) if follows else 1
        pause_s = read_s * (pauses - 0.5)  # clocks and timers are not that exact
        if now >= self._front_at + pause_s:
            self._front_at = now
            keys.append(front_key(self._network))
        shard_due = now >= self._shard_at + read_s * SHARD_PAUSES - read_s / 2
        if neighbours < LINKS_MAX and shard_due if follows else self._found_nobody or shard_due:
            self._shard_at = now
            keys.append(shard_key(self._network, self._shard))
            self._shard = (self._shard + 1) % SHARDS
        return keys

    def has_looked(self, since: float, now: float) -> bool:
        """Whether we know who is in the front, or have waited too long for it: before that nobody claims a lease.

        Who is in the front itself hears of a coordinator anyway, because coordinators read it.
        """
        return self.resides or self._looked_at >= since or now > since + LOOK_PATIENCE_S

    def front_was(self, present: list[Candidate], mine: Candidate, front_max: int, now: float) -> bool:
        """These were in the front just now. Returns whether we begin to write into it.

        Who is in it stays while it is among the best `front_max`. Others come where there is room, or for somebody who
        is clearly less steady: records are old, and those who started together would take turns otherwise. Who finds it
        empty resides there only once it has found itself there: hundreds may have found it empty at that moment.
        """
        others = [candidate for candidate in present if candidate.peer != self._me]
        self._found_nobody, self._looked_at = not others, now
        before, uptime_s = self.belongs, mine.uptime_s if self.belongs else mine.uptime_s / CHALLENGE
        self.belongs = place(Candidate(self._me, uptime_s), others, front_max) < front_max
        self.resides = self.belongs and len(others) < len(present)
        return self.belongs and not before

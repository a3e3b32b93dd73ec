"""Who is in the swarm right now, from signed records in the directory and from what peers say directly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from helixnet.core.machine import NEVER
from helixnet.core.plan.plan import PEERS_MAX
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import Beat

ANNOUNCED_S = 30.0
"""So long a member's own word is newer than what the directory says of it."""


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long silence may last."""

    suspect_s: float = 4.0
    """Without word of a member for this long it is suspect (only where it owes us heartbeats)."""
    dead_s: float = 8.0
    """Suspect for this long without word makes a member dead."""
    forget_s: float = 120.0
    """The dead are kept in view this long, so that an old record in the directory does not revive them."""


@dataclass(slots=True)
class Member:
    """What is known of one member."""

    record: PeerRecord
    heard_at: float
    """When it last spoke to us directly, or its record was first seen."""
    direct: bool = False
    """Whether it has spoken to us directly (then silence means something)."""
    announced_at: float = -math.inf
    """When it last told us its record itself."""
    place: str = ""
    """The key of the directory under which it was found last."""
    suspect_since: float | None = None
    dead_since: float | None = None

    @property
    def state(self) -> str:
        """joining, active, suspect, draining or dead."""
        if self.dead_since is not None:
            return "dead"
        return "suspect" if self.suspect_since is not None else self.record.state


class Membership:
    """The members of one swarm, ourselves left out. Keeps at most PEERS_MAX.

    There may be thousands, and time passes several times a second: only what is due is looked at.
    """

    def __init__(self, me: PeerId, manifest_hash: str, config: MembershipConfig) -> None:
        self.me = me
        self._manifest_hash = manifest_hash
        self._config = config
        self._members: dict[PeerId, Member] = {}
        self._suspects: dict[PeerId, None] = {}
        """In the order in which they became so, like the dead: who is due comes first."""
        self._dead: dict[PeerId, None] = {}
        self._sorted: list[Member] | None = None
        """What `members` answers, until one comes or is forgotten."""
        self._live: list[Member] | None = None
        """What `live` answers, until one comes, goes or returns."""
        self._due_at = NEVER
        """No suspect dies and no dead is forgotten before."""
        self._quiet_since = -math.inf
        """Every live member was heard of then or later."""

    def listed(self, records: list[PeerRecord], now: float, place: str = "") -> bool:
        """A key of the directory was read: new peers become members; those that it no longer has are dead.

        Returns whether somebody came or went.
        """
        changed = False
        for record in records:
            member = self._members.get(record.peer)
            if member is None:
                changed |= self._add(record, now, place)
            elif member.dead_since is not None or record.manifest_hash != self._manifest_hash:
                continue
            elif record.uptime_s > member.record.uptime_s:
                member.place = place
                if now - member.announced_at > ANNOUNCED_S:  # the directory has only the essentials
                    member.record = record
                if not member.direct:
                    member.heard_at = now
            elif record.uptime_s < member.record.uptime_s - 1.0 and not member.direct:  # it was restarted
                member.record, member.heard_at, member.place = record, now, place
                changed |= self._cleared(member)
        for member in self._missing({record.peer for record in records}, now, place):
            changed |= member.suspect_since is None
            self._bury(member, now)
        return changed

    def _missing(self, listed: set[PeerId], now: float, place: str) -> list[Member]:
        """Who was found under a key, is no longer, and has been silent for too long, by id."""
        silent_since = now - self._config.dead_s
        missing = [
            peer
            for peer, member in self._members.items()
            if member.place == place
            and not member.direct
            and member.heard_at < silent_since
            and member.dead_since is None
            and peer not in listed
        ]
        return [self._members[peer] for peer in sorted(missing)]

    def announced(self, record: PeerRecord, now: float) -> bool:
        """A member spoke to us itself. Returns whether this is news that matters to planning."""
        if record.peer == self.me or record.manifest_hash != self._manifest_hash:
            return False
        member = self._members.get(record.peer)
        if member is None:
            if not self._add(record, now):
                return False
            member = self._members[record.peer]
            member.direct, member.announced_at = True, now
            return True
        old = member.record
        member.record, member.heard_at, member.announced_at, member.direct = record, now, now, True
        returned = self._cleared(member)
        return returned or old.state != record.state or (old.capability is None) != (record.capability is None)

    def beat(self, peer: PeerId, beat: Beat, now: float) -> tuple[PeerRecord, bool] | None:
        """A member's heartbeat came. Returns its record now and whether this is news that matters to planning; None
        if it has not announced itself.
        """
        member = self._members.get(peer)
        if member is None or member.dead_since is not None or member.announced_at == -math.inf:
            return None
        news = self._cleared(member) or member.record.state != beat.state
        changed = {name: getattr(beat, name) for name in beat.__struct_fields__}
        member.record = msgspec.structs.replace(member.record, **changed)
        member.heard_at = member.announced_at = now
        return member.record, news

    def heard(self, peer: PeerId, now: float) -> None:
        """Any word of a peer counts as life."""
        member = self._members.get(peer)
        if member is not None and member.dead_since is None:
            if member.suspect_since is not None:
                self._cleared(member)
            member.heard_at, member.direct = now, True

    def gone(self, peer: PeerId, now: float) -> bool:
        """The channel to a peer broke: suspect it. Returns whether that is news."""
        member = self._members.get(peer)
        if member is None or member.state in ("suspect", "dead"):
            return False
        self._suspect(member, now)
        return True

    def left(self, peer: PeerId) -> bool:
        """A peer said that it leaves. Returns whether that is news."""
        member = self._members.get(peer)
        if member is None or member.state in ("draining", "dead"):
            return False
        member.record = msgspec.structs.replace(member.record, state="draining")
        return True

    def deadline(self, owed_heartbeats: bool) -> float:
        """Until when `expire` has nothing to do."""
        silent_at = self._quiet_since + self._config.suspect_s if owed_heartbeats else NEVER
        return min(self._due_at, silent_at)

    def expire(self, now: float, owed_heartbeats: bool) -> bool:
        """Let silence take effect; `owed_heartbeats` says whether members report to us. Returns whether it did."""
        if now < self.deadline(owed_heartbeats):
            return False
        changed = self._suspect_silent(now) if owed_heartbeats else False
        while (suspect := self._first(self._suspects)) is not None and now >= self._dies_at(suspect):
            self._bury(suspect, now)
            changed = True
        while (dead := self._first(self._dead)) is not None and now >= self._forgotten_at(dead):
            del self._dead[dead.record.peer], self._members[dead.record.peer]
            self._sorted = None
        self._due_at = NEVER if suspect is None else self._dies_at(suspect)
        if dead is not None:
            self._due_at = min(self._due_at, self._forgotten_at(dead))
        return changed

    def _first(self, peers: dict[PeerId, None]) -> Member | None:
        for peer in peers:
            return self._members[peer]
        return None

    def _dies_at(self, suspect: Member) -> float:
        assert suspect.suspect_since is not None, "it is among the suspects"
        return suspect.suspect_since + (self._config.dead_s - self._config.suspect_s)

    def _forgotten_at(self, dead: Member) -> float:
        assert dead.dead_since is not None, "it is among the dead"
        return dead.dead_since + self._config.forget_s

    def _suspect_silent(self, now: float) -> bool:
        """Suspect whoever has not been heard of for too long. Returns whether there was somebody."""
        since, found = now, False
        for member in self._members.values():
            if member.suspect_since is None and member.dead_since is None:
                if now >= member.heard_at + self._config.suspect_s:
                    self._suspect(member, now)
                    found = True
                else:
                    since = min(since, member.heard_at)
        self._quiet_since = since
        return found

    def _add(self, record: PeerRecord, now: float, place: str = "") -> bool:
        """A new member, if it is one of this swarm and there is room."""
        if record.peer == self.me or record.manifest_hash != self._manifest_hash or len(self._members) >= PEERS_MAX:
            return False
        self._members[record.peer] = Member(record, now, place=place)
        self._sorted = self._live = None
        return True

    def _suspect(self, member: Member, now: float) -> None:
        member.suspect_since, self._live = now, None
        self._suspects[member.record.peer] = None
        self._due_at = min(self._due_at, self._dies_at(member))

    def _bury(self, member: Member, now: float) -> None:
        member.dead_since, self._live = now, None
        self._suspects.pop(member.record.peer, None)
        self._dead[member.record.peer] = None
        self._due_at = min(self._due_at, self._forgotten_at(member))

    def _cleared(self, member: Member) -> bool:
        """Nothing is held against a member any more. Returns whether something was."""
        if member.suspect_since is None and member.dead_since is None:
            return False
        member.suspect_since = member.dead_since = self._live = None
        self._suspects.pop(member.record.peer, None)
        self._dead.pop(member.record.peer, None)
        return True

    def get(self, peer: PeerId) -> Member | None:
        """The member, dead or alive."""
        return self._members.get(peer)

    def members(self) -> list[Member]:
        """All of them, the dead too, sorted by id."""
        if self._sorted is None:
            self._sorted = [self._members[peer] for peer in sorted(self._members)]
        return self._sorted

    def live(self) -> list[Member]:
        """Members that are neither suspect nor dead, sorted by id."""
        if self._live is None:
            self._live = [m for m in self.members() if m.suspect_since is None and m.dead_since is None]
        return self._live

"""Who is in the swarm right now, from signed records in the directory and from what peers say directly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from helixnet.core.plan.plan import PEERS_MAX
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import Beat

ANNOUNCED_S = 30.0
"""So long a member's own word is newer than what the directory says of it."""
LOOKS = 16
"""Silence is looked for this often within the time that makes a member suspect."""


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
    """The members of one swarm, ourselves left out. Keeps at most PEERS_MAX."""

    def __init__(self, me: PeerId, manifest_hash: str, config: MembershipConfig) -> None:
        self.me = me
        self._manifest_hash = manifest_hash
        self._config = config
        self._members: dict[PeerId, Member] = {}
        self._live: list[Member] | None = None
        """What `live` answers, until something changes."""
        self._look_at = -math.inf

    def listed(self, records: list[PeerRecord], now: float, place: str = "") -> None:
        """A key of the directory was read: new peers become members; those that it no longer has are dead."""
        self._live = None
        for record in records:
            if record.peer == self.me or record.manifest_hash != self._manifest_hash:
                continue
            member = self._members.get(record.peer)
            if member is None:
                if len(self._members) < PEERS_MAX:
                    self._members[record.peer] = Member(record, now, place=place)
            elif record.uptime_s < member.record.uptime_s - 1.0 and member.dead_since is None and not member.direct:
                self._members[record.peer] = Member(record, now, place=place)  # it was restarted
            elif record.uptime_s > member.record.uptime_s and member.dead_since is None:
                member.place = place
                if now - member.announced_at > ANNOUNCED_S:  # the directory has only the essentials
                    member.record = record
                if not member.direct:
                    member.heard_at = now
        listed = {record.peer for record in records}
        gone = [
            peer
            for peer, member in self._members.items()
            if member.place == place
            and peer not in listed
            and not member.direct
            and now - member.heard_at > self._config.dead_s
        ]
        for peer in gone:
            self._bury(self._members[peer], now)

    def announced(self, record: PeerRecord, now: float) -> bool:
        """A member spoke to us itself. Returns whether this is news that matters to planning."""
        if record.peer == self.me or record.manifest_hash != self._manifest_hash:
            return False
        member = self._members.get(record.peer)
        if member is None and len(self._members) >= PEERS_MAX:
            return False
        self._live = None
        old = member.record if member is not None and member.dead_since is None else None
        place = member.place if member is not None else ""
        self._members[record.peer] = Member(record, now, direct=True, announced_at=now, place=place)
        return (
            old is None
            or old.state != record.state
            or (old.capability is None) != (record.capability is None)
            or (member is not None and member.suspect_since is not None)
        )

    def beat(self, peer: PeerId, beat: Beat, now: float) -> tuple[PeerRecord, bool] | None:
        """A member's heartbeat came. Returns its record now and whether this is news that matters to planning; None
        if it has not announced itself.
        """
        member = self._members.get(peer)
        if member is None or member.dead_since is not None or member.announced_at == -math.inf:
            return None
        news = member.record.state != beat.state or member.suspect_since is not None
        changed = {name: getattr(beat, name) for name in beat.__struct_fields__}
        member.record = msgspec.structs.replace(member.record, **changed)
        member.heard_at = member.announced_at = now
        if news:
            member.suspect_since, self._live = None, None
        return member.record, news

    def heard(self, peer: PeerId, now: float) -> None:
        """Any word of a peer counts as life."""
        member = self._members.get(peer)
        if member is not None and member.dead_since is None:
            if member.suspect_since is not None:
                member.suspect_since, self._live = None, None
            member.heard_at, member.direct = now, True

    def gone(self, peer: PeerId, now: float) -> bool:
        """The channel to a peer broke: suspect it. Returns whether that is news."""
        member = self._members.get(peer)
        if member is None or member.state in ("suspect", "dead"):
            return False
        member.suspect_since, self._live = now, None
        return True

    def left(self, peer: PeerId) -> bool:
        """A peer said that it leaves. Returns whether that is news."""
        member = self._members.get(peer)
        if member is None or member.state in ("draining", "dead"):
            return False
        member.record = msgspec.structs.replace(member.record, state="draining")
        self._live = None
        return True

    def expire(self, now: float, owed_heartbeats: bool) -> bool:
        """Let silence take effect; `owed_heartbeats` says whether members report to us. Returns whether it did."""
        if now < self._look_at:
            return False
        self._look_at = now + self._config.suspect_s / LOOKS
        changed = False
        for peer, member in sorted(self._members.items()):
            if member.dead_since is not None:
                if now - member.dead_since > self._config.forget_s:
                    del self._members[peer]
                continue
            silent_s = now - member.heard_at
            if owed_heartbeats and member.suspect_since is None and silent_s > self._config.suspect_s:
                member.suspect_since, changed, self._live = now, True, None
            limit_s = self._config.dead_s - self._config.suspect_s
            if member.suspect_since is not None and now - member.suspect_since > limit_s:
                self._bury(member, now)
                changed = True
        return changed

    def _bury(self, member: Member, now: float) -> None:
        member.dead_since, self._live = now, None

    def get(self, peer: PeerId) -> Member | None:
        """The member, dead or alive."""
        return self._members.get(peer)

    def members(self) -> list[Member]:
        """All of them, the dead too, sorted by id."""
        return [self._members[peer] for peer in sorted(self._members)]

    def live(self) -> list[Member]:
        """Members that are neither suspect nor dead, sorted by id."""
        if self._live is None:
            self._live = [member for member in self.members() if member.state not in ("suspect", "dead")]
        return self._live

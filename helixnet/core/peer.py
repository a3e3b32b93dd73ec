"""One peer's whole brain: membership, election, planning, following and serving, wired together.

Each message goes to the machine that owns it; this file decides nothing else. The daemon drives it over
libp2p, the simulator over its event heap.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from helixnet.core.machine import (
    BatchDone,
    Dropped,
    Effect,
    Emit,
    Event,
    Gone,
    Loaded,
    Outcome,
    Publish,
    Send,
    Solved,
)
from helixnet.core.model import Manifest
from helixnet.core.plan.coordinator import Coordinator, CoordinatorConfig
from helixnet.core.plan.follower import Follower, FollowerConfig
from helixnet.core.plan.plan import Plan
from helixnet.core.route.views import Views, ViewsConfig
from helixnet.core.stage.entry import EntryConfig, EntryMachine
from helixnet.core.stage.stage import StageConfig, StageMachine
from helixnet.core.swarm.capability import Capability
from helixnet.core.swarm.directory import Reading, front_key, shard_key, shard_of
from helixnet.core.swarm.election import Candidate, Election, LeaseConfig
from helixnet.core.swarm.membership import Membership, MembershipConfig
from helixnet.core.swarm.records import LinkMeasure, PeerRecord, encode_record, essentials
from helixnet.core.swarm.reporting import Told, beat_of
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Timing and bounds of one peer; presets are in `helixnet.core.presets`."""

    heartbeat_s: float = 1.0
    """How often a member reports to the coordinator."""
    publish_s: float = 5.0
    record_lifetime_s: float = 30.0
    view_pause_s: float = 0.5
    """Shortest time between two views pushed to subscribers."""
    view_renew_s: float = 5.0
    """Subscribers hear at least this often."""
    front_max: int = 16
    """So many members, the steadiest, are in the directory's front, which everybody reads."""
    views: ViewsConfig = ViewsConfig()
    leave_s: float = 30.0
    """Sessions have this long to end after a peer decided to leave."""
    membership: MembershipConfig = MembershipConfig()
    lease: LeaseConfig = LeaseConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    follower: FollowerConfig = FollowerConfig()
    stage: StageConfig = StageConfig()
    entry: EntryConfig = EntryConfig()


class PeerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer knows of itself before it knows of others."""

    peer: PeerId
    name: str
    network: str
    manifest: Manifest
    memory_bytes: int


_NO_BODY = memoryview(b"")

FRONT_LIVES = 3
"""A record in the front lives so many times as long as until it is written again."""
SHARD_RENEW = 0.4
"""A record in a shard is written again after so much of its lifetime: twice before it would expire."""


@dataclass(slots=True)
class _Timers:
    heartbeat_at: float
    publish_at: float
    shard_at: float
    view_at: float
    view_due: bool = False
    leave_by: float | None = None


class Peer:
    """The machine of one peer. `addresses`, `capability` and `links` are set by the daemon as they become known."""

    def __init__(self, facts: PeerFacts, config: PeerConfig, now: float) -> None:
        self.facts = facts
        self.me = facts.peer
        self.config = config
        self.addresses: tuple[str, ...] = ()
        self.capability: Capability | None = None
        self.links: tuple[LinkMeasure, ...] = ()
        self.leaving = False
        self.stage = StageMachine(self.me, facts.manifest, facts.memory_bytes, config.stage)
        self.entry = EntryMachine(self.me, self.stage, config.entry)
        self.follower = Follower(self.me, self.stage, config.follower)
        self.coordinator = Coordinator(self.me, facts.network, facts.manifest, config.coordinator)
        self.membership = Membership(self.me, facts.manifest.hash, config.membership)
        self.election = Election(self.me, config.lease, now)
        self.reading = Reading(self.me, facts.network)
        self._told: Told | None = None
        self._views = Views(config.views)
        self._started_at = now
        self._timers = _Timers(now, now, now, now)

    # --- machine -----------------------------------------------------------------------------------

    def receive(
        self, sender: PeerId, message: wire.Message | Outcome, now: float, body: memoryview = _NO_BODY
    ) -> list[Effect]:
        """Take a message, or an outcome of our own effects, in.

        Raises:
            RemoteProtocolError: the sender broke the protocol; its channel should be closed.
        """
        self.membership.heard(sender, now)
        # Most frequent first: these come by the million.
        if isinstance(message, wire.Steps):
            effects = self.stage.steps(sender, message, body, now)
        elif isinstance(message, BatchDone):
            effects = self.stage.done(message, now)
        elif isinstance(message, wire.Sampled):
            effects = self.entry.sampled(sender, message, now)
        elif isinstance(message, Outcome):
            effects = self._outcome(sender, message, now)
        else:
            effects = self._swarm(sender, message, now) or self._session(sender, message, now)
        followed = self.follower.settled(now)
        return effects + followed if followed else effects

    def tick(self, now: float) -> list[Effect]:
        """Let time pass for every machine of this peer."""
        if not self._is_due(now):
            return []
        effects = [*self.stage.tick(now), *self.entry.tick(now), *self.follower.tick(now)]
        if self.membership.expire(now, owed_heartbeats=self.coordinator.term > 0):
            self.coordinator.news(now)
            self._timers.view_due = True
        effects += self._elect(now)
        if self.coordinator.term:
            effects += self.coordinator.tick(self._records(now), now)
        timers = self._timers
        if now >= timers.heartbeat_at:
            timers.heartbeat_at = now + self.config.heartbeat_s
            effects += self._announce(now)
        if now >= timers.publish_at:
            timers.publish_at = now + self.config.publish_s
            effects += self._publish(now)
        return effects + self._push_views(now) + self.follower.settled(now)

    def deadline(self) -> float:
        """When `tick` wants to be called next: at least at every heartbeat."""
        stage = min(self.stage.deadline(), self.entry.deadline(), self.follower.deadline())
        return min(stage, self.coordinator.deadline(), self._timers.heartbeat_at, self._timers.publish_at)

    def _is_due(self, now: float) -> bool:
        """Whether a tick would do anything; who only follows is mostly ticked for nothing.

        Elections, silence and views are not in `deadline`: they can wait for the next tick, and peers that
        start together should not claim at the same moment.
        """
        return (
            self.coordinator.term > 0
            or now >= self.deadline()
            or now >= self.election.deadline(self._may_claim(now))
            or now >= self.membership.deadline(owed_heartbeats=False)
            or (self._views.are_followed and now >= self._views_at)
        )

    # --- what the daemon tells it ------------------------------------------------------------------

    def keys_to_read(self, read_s: float, now: float) -> list[str]:
        """Which keys of the directory to read now, asked about every `read_s`; `listed` hears what is there."""
        follows = self.election.holder not in (None, self.me)
        return self.reading.due(read_s, follows, self._is_in_front, len(self.membership.live()), now)

    def listed(self, records: list[PeerRecord], now: float, key: str) -> list[Effect]:
        """A key of the directory was read: newcomers are seen, and a newcomer sees whom to report to."""
        records = [record for record in records if record.manifest_hash == self.facts.manifest.hash]
        if key == front_key(self.facts.network):
            present = [Candidate(record.peer, record.uptime_s) for record in records]
            mine = Candidate(self.me, now - self._started_at)
            if self.reading.front_was(present, mine, self.config.front_max, now):
                self._timers.publish_at = now  # before others, who look now, want to be in it too
        if self.membership.listed(records, now, key):
            self.coordinator.news(now)
            self._timers.view_due = True
        self.election.see_term(max((record.term for record in records), default=0))
        if self.election.holder is not None:
            return []
        best = max((r for r in records if r.coordinator is not None), key=lambda r: (r.term, r.peer), default=None)
        if best is None or best.coordinator is None or not self.election.told_of(best.coordinator, best.term, now):
            return []
        return [self._announce_to(best.coordinator, now)]

    def measured(self, capability: Capability, now: float) -> list[Effect]:
        """This peer knows what it can do: it may be planned now, with the memory it lends."""
        self.capability = capability
        self.stage.set_engine(capability.memory_bytes, capability.paging, capability.takes)
        self.coordinator.news(now)
        return [*self._announce(now), *self._publish(now)]

    def leave(self, now: float) -> list[Effect]:
        """Admit nothing new, tell everyone, give the lease back; `gone_by` says when to stop."""
        if self.leaving:
            return []
        self.leaving = self.stage.draining = True
        self._timers.leave_by = now + self.config.leave_s
        live = self.membership.live()
        effects: list[Effect] = [Send(member.record.peer, wire.Leave()) for member in live]
        self.coordinator.end()
        effects += self.election.resign(self._candidates())
        return [*effects, *self._publish(now), *self._show(now)]

    def may_stop(self, now: float) -> bool:
        """Whether a leaving peer has nothing left to do, or no more time for it."""
        leave_by = self._timers.leave_by
        return leave_by is not None and (not self.stage.sessions or now >= leave_by)

    def stop(self) -> list[Effect]:
        """Last words: sessions that still run here go on elsewhere."""
        return [*self.entry.break_all("the peer left"), *self.stage.break_outside(None, "the peer left")]

    # --- dispatch ----------------------------------------------------------------------------------

    def _outcome(self, sender: PeerId, outcome: Gone | Loaded | Dropped | Solved, now: float) -> list[Effect]:
        match outcome:
            case Loaded():
                self._timers.view_due = True
                return [*self.follower.loaded(outcome, now), *self._announce(now)]
            case Dropped():
                return [*self.follower.dropped(outcome, now), *self._announce(now)]
            case Solved():
                return self.coordinator.solved(outcome, self._records(now), now)
            case Gone():
                return self._gone(sender, outcome.reason, now)

    def _gone(self, peer: PeerId, reason: str, now: float) -> list[Effect]:
        self._views.forget(peer)
        effects = [*self.entry.gone(peer, reason), *self.stage.gone(peer, reason)]
        if self.membership.gone(peer, now):
            self._timers.view_due = True
            self.coordinator.lost(peer, now)
            effects.append(Emit(Event("member.suspect", {"peer": peer, "why": reason})))
        if self._told is not None and peer == self._told.coordinator:
            self._told = None
        self.election.vacate(peer, now)
        return effects

    def _session(self, sender: PeerId, message: wire.Message, now: float) -> list[Effect]:
        match message:
            case wire.Open():
                return self.entry.open(sender, message, now)
            case wire.Reserve():
                return self.stage.reserve(sender, message, now)
            case wire.Reserved():
                return self.entry.reserved(sender, message, now)
            case wire.Refused():
                return self.entry.refused(sender, message)
            case wire.Cancel():
                return self.entry.cancel(sender, message)
            case wire.Release():
                session = self.stage.sessions.get(message.session)
                return self.stage.end(message) if session and session.entry == sender else []
            case wire.Broken():
                return [*self.stage.broken(sender, message), *self.entry.broken(sender, message)]
            case wire.Pong():
                self.entry.pong(sender, now)
            case wire.Ping():
                return [Send(sender, wire.Pong(nonce=message.nonce))]
        return []

    def _swarm(self, sender: PeerId, message: wire.Message, now: float) -> list[Effect]:
        match message:
            case wire.Announce():
                return self._announced(sender, message.record, now)
            case wire.Beat():
                return self._beaten(sender, message, now)
            case wire.GetRecord() if sender == self.election.holder:
                return [self._announce_to(sender, now)]
            case wire.Lease():
                return self._leased(sender, message, now)
            case wire.Resign():
                self.election.see_term(message.term)
                self.election.vacate(sender, now)
            case wire.Yielded() if sender == self.election.holder and message.coordinator != self.me:
                self.election.see_term(message.term)
                return [self._announce_to(message.coordinator, now)]
            case wire.Leave():
                if self.membership.left(sender):
                    self._timers.view_due = True
                    self.coordinator.lost(sender, now)
                self.election.vacate(sender, now)
            case wire.PlanOffer():
                self._timers.view_due = True
                if sender == self.election.holder:
                    return [*self.follower.offered(sender, message.plan, now), self.follower.seen()]
            case wire.PlanActive():
                self._timers.view_due = True
                if self.follower.plan is not None and sender == self.follower.plan.coordinator:
                    return self.follower.activated(message, now)
            case wire.PlanReady():
                return self.coordinator.ready(sender, message, self._records(now), now)
            case wire.GetView():
                return [Send(sender, self._look(sender, message, now))]
        return []

    def _announced(self, sender: PeerId, record: PeerRecord, now: float) -> list[Effect]:
        if record.peer != sender:
            return []
        self.election.see_term(record.term)
        is_news = self.membership.announced(record, now)
        # A newcomer hears of the lease at once, not only with the next renewal.
        effects = self.election.vouch(record.peer) if is_news and self.coordinator.term else []
        return [*effects, *self._reported(record, is_news, now)]

    def _beaten(self, sender: PeerId, beat: wire.Beat, now: float) -> list[Effect]:
        self.election.see_term(beat.term)
        known = self.membership.beat(sender, beat, now)
        if known is None:
            return [Send(sender, wire.GetRecord())] if self.coordinator.term else []
        return self._reported(*known, now)

    def _reported(self, record: PeerRecord, is_news: bool, now: float) -> list[Effect]:
        if is_news:
            self.coordinator.news(now)
            self._timers.view_due = True
        return self.coordinator.remind(record, now) if self.coordinator.term else []

    def _leased(self, sender: PeerId, message: wire.Lease, now: float) -> list[Effect]:
        before = self.election.holder
        effects = self.election.lease(sender, message, now)
        if self.election.holder != before and self.election.holder == sender:
            effects += self._announce(now)  # the new coordinator needs to know us at once
            self._timers.view_due = True
            if before == self.me:
                # Our members know only us: left alone they would elect one of them when our lease ends.
                yielded = wire.Yielded(term=message.term, coordinator=sender, addresses=message.addresses)
                effects += [Send(m.record.peer, yielded) for m in self.membership.live() if m.record.peer != sender]
        return effects + self._check_tenure(now)

    # --- election and heartbeats -------------------------------------------------------------------

    def _may_claim(self, now: float) -> bool:
        """Whether we could coordinate, and know who else could."""
        has_looked = self.election.holder == self.me or self.reading.has_looked(self.election.vacant_from(now), now)
        return has_looked and self.capability is not None and not self.leaving

    def _elect(self, now: float) -> list[Effect]:
        mine = Candidate(self.me, now - self._started_at) if self._may_claim(now) else None
        return [*self.election.tick(now, mine, self._candidates, self.addresses), *self._check_tenure(now)]

    def _candidates(self) -> list[Candidate]:
        return [Candidate(m.record.peer, m.record.uptime_s) for m in self.membership.live()]

    def _check_tenure(self, now: float) -> list[Effect]:
        """Begin or end our own coordinating as the lease comes and goes."""
        if self.election.i_hold(now):
            if self.coordinator.term != self.election.term:
                self._timers.publish_at = now  # those who heard no lease of ours look for us in the front
                followed = self.follower.whole_plan if self.follower.active else None
                return self.coordinator.begin(self.election.term, followed, now)
        elif self.coordinator.term:
            self.coordinator.end()
        return []

    def _announce(self, now: float) -> list[Effect]:
        """Report to the coordinator: with a heartbeat, unless it has to know more."""
        holder = self.election.holder
        if holder is None or holder == self.me:
            return []
        if self._told is None or not self._told.still_says(self._telling(holder)):
            return [self._announce_to(holder, now)]
        return [Send(holder, beat_of(self.record(now)))]

    def _announce_to(self, coordinator: PeerId, now: float) -> Effect:
        self._told = self._telling(coordinator)
        return Send(coordinator, wire.Announce(record=self.record(now)))

    def _telling(self, coordinator: PeerId) -> Told:
        return Told(coordinator, self.addresses, self.capability, self.links)

    def _publish(self, now: float) -> list[Effect]:
        """Renew our record in the directory: in our shard, and in the front if we belong there."""
        timers, lifetime_s, network = self._timers, self.config.record_lifetime_s, self.facts.network
        keys = [front_key(network)] if self._is_in_front else []
        if now >= timers.shard_at:
            timers.shard_at = now + lifetime_s * SHARD_RENEW
            keys.append(shard_key(network, shard_of(self.me)))
        value = encode_record(essentials(self.record(now)))
        # The front changes quickly, and whoever is no longer in it should not stay for long.
        front_s = min(lifetime_s, FRONT_LIVES * self.config.publish_s)
        return [Publish(key, value, front_s if key == front_key(network) else lifetime_s) for key in keys]

    @property
    def _is_in_front(self) -> bool:
        """Whether everybody should find us: who coordinates, and the steadiest of those who are there."""
        return self.election.holder == self.me or self.reading.belongs

    @property
    def _state(self) -> str:
        return "draining" if self.leaving else "active" if self.capability else "joining"

    def record(self, now: float) -> PeerRecord:
        """What this peer says of itself now."""
        observed = self.stage.meter.rates(now)
        return PeerRecord(
            peer=self.me,
            name=self.facts.name,
            addresses=self.addresses,
            model=self.facts.manifest.name,
            manifest_hash=self.facts.manifest.hash,
            state=self._state,
            capability=self.capability,
            held=self.stage.served,
            takes=self.stage.takes,
            plan=self.follower.number,
            plan_active=self.follower.active,
            plan_whole=self.follower.whole_plan is not None,
            term=self.election.term,
            coordinator=self.election.holder,
            uptime_s=now - self._started_at,
            sessions=len(self.stage.sessions),
            kv_free=self.stage.ledger.free_share,
            tokens_per_s=sum(rate.tokens_per_s for rate in observed),
            links=self.links,
            observed=observed,
        )

    def _records(self, now: float) -> dict[PeerId, PeerRecord]:
        """Our own record and those of all live members, by id."""
        records = {member.record.peer: member.record for member in self.membership.live()}
        records[self.me] = self.record(now)
        return dict(sorted(records.items()))

    # --- what clients see --------------------------------------------------------------------------

    def view(self, now: float) -> wire.View:
        """The swarm as this peer sees it, for people: everybody's whole record."""
        rows = tuple(wire.MemberView(record=record, state=state) for record, state in self._members(now))
        return self._view(rows, self.follower.whole_plan)

    def _members(self, now: float) -> list[tuple[PeerRecord, str]]:
        """Our own record and those of all other members, with their states, by id."""
        mine = self.record(now)
        rows = [(mine, mine.state), *((member.record, member.state) for member in self.membership.members())]
        return sorted(rows, key=lambda row: row[0].peer)

    def _view(self, rows: tuple[wire.MemberView, ...], plan: Plan | None) -> wire.View:
        manifest = self.facts.manifest
        return wire.View(
            manifest_hash=manifest.hash,
            model=manifest.name,
            layers=manifest.layers,
            context_tokens=manifest.context_tokens,
            term=self.election.term,
            coordinator=self.election.holder,
            plan=plan,
            active=self.follower.active,
            members=rows,
            problem=self.coordinator.problem,
            number=self.follower.number,
        )

    def _look(self, sender: PeerId, message: wire.GetView, now: float) -> wire.View:
        """What somebody is shown who asks."""
        if message.whole:
            return self.view(now)
        if message.subscribe and not self._views.are_followed:
            self._timers.view_at, self._timers.view_due = now, False  # the first hears all there is with the answer
        self._views.refresh(self._members(now))
        return self._views.look(sender, message, self._view((), self.follower.whole_plan), now)

    def _push_views(self, now: float) -> list[Effect]:
        return self._show(now) if now >= self._views_at else []

    @property
    def _views_at(self) -> float:
        """When subscribers are to hear again."""
        timers = self._timers
        return timers.view_at + (self.config.view_pause_s if timers.view_due else self.config.view_renew_s)

    def _show(self, now: float) -> list[Effect]:
        self._timers.view_at, self._timers.view_due = now, False
        if not self._views.has_subscribers(now):
            return []
        self._views.refresh(self._members(now))
        return [Send(peer, view) for peer, view in self._views.news(self._view((), self.follower.whole_plan))]

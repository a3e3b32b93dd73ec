"""The coordinator's side of a plan: snapshot, solve, weigh, offer, wait until ready, activate.

It acts only while the election says that this peer holds the lease. It owns no truth: whoever takes over
starts from the plan it follows as a member.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import msgspec

from helixnet.core.machine import NEVER, Effect, Emit, Event, Publish, Send, Solve, Solved
from helixnet.core.model import Manifest
from helixnet.core.plan.adoption import AdoptionConfig, weigh
from helixnet.core.plan.plan import Placement, Plan, PlanNumber, uncovered
from helixnet.core.plan.snapshot import Link, PeerView, Snapshot
from helixnet.core.swarm.election import CHALLENGE, Candidate, steadiest
from helixnet.core.swarm.records import PeerRecord, PlanPointer, encode_pointer
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When to plan, and how long to wait for what."""

    resolve_s: float = 30.0
    """Plan anew this often even if nobody came or went."""
    quiet_s: float = 1.0
    """After news wait this long for more of it ..."""
    quiet_s_max: float = 4.0
    """... but never longer than this after the first."""
    joining_s: float = 20.0
    """While members are still measuring themselves, the first plan waits for them this long."""
    offer_s: float = 120.0
    """An offered plan that is not carried by then is given up."""
    remind_s: float = 5.0
    """A member that does not take up the plan is offered it again after this ..."""
    remind_s_max: float = 60.0
    """... and then after twice as long each time, up to this: whole plans of large swarms are long under way."""
    unfit_s: float = 60.0
    """A peer that could not load its span is left out of plans for this long."""
    rest: float = 4.0
    """While the plan serves, between two solves pass so many times the seconds of the first: planning must not eat the
    coordinator."""
    solve_s: float = 60.0
    """An answer of the planner later than this is not waited for."""
    pointer_lifetime_s: float = 60.0
    pointer_renew_s: float = 15.0
    deputies: int = 4
    """So many members, the steadiest, are told whole plans, to go on with them; the others only their own part."""
    default_round_trip_s: float = 0.002
    """Taken for links that nobody has measured yet ..."""
    default_bandwidth: float = 100e6
    """... in bytes/s; presets for longer ways say more."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a member was told last, and when it is told again if it still reports something else."""

    number: PlanNumber
    again_at: float
    pause_s: float


@dataclass(slots=True)
class _Offer:
    plan: Plan
    since: float
    wanted: set[PeerId]
    """Peers of the plan that are still there."""
    ready: set[PeerId] = field(default_factory=set)

    def covers(self, peers: set[PeerId]) -> bool:
        """Whether these peers of the plan hold every layer."""
        spans = [a.span for a in self.plan.placement.assignments if a.peer in peers]
        return not uncovered(spans, self.plan.layers)


def pointer_key(network: str, manifest_hash: str) -> str:
    """Where the directory keeps the pointer to the active plan of one swarm."""
    return f"helixnet/1/{network}/plan/{manifest_hash[:16]}"


class Coordinator:
    """The machine. `records` in its calls are those of all live members, our own included, by id."""

    def __init__(self, me: PeerId, network: str, manifest: Manifest, config: CoordinatorConfig) -> None:
        self.me = me
        self.problem = ""
        self.term = 0
        """The term we act in; 0 while we do not."""
        self._pointer_key = pointer_key(network, manifest.hash)
        self._manifest = manifest
        self._config = config
        self._epoch = 0
        self._current: Plan | None = None
        self._offer: _Offer | None = None
        self._news_since: float | None = None
        self._news_at = 0.0
        self._expecting = False
        self._solving_since: float | None = None
        self._solve_at = NEVER
        self._rest_until = 0.0
        self._pointer_at = NEVER
        self._unfit: dict[PeerId, float] = {}
        self._deputies: frozenset[PeerId] = frozenset()
        self._deputies_at = 0.0
        self._told: dict[PeerId, _Told] = {}

    def begin(self, term: int, followed: Plan | None, now: float) -> list[Effect]:
        """We were elected: take over from the plan we followed."""
        self.term, self._epoch, self._current = term, 0, followed
        self._offer, self._solving_since, self._unfit, self.problem = None, None, {}, ""
        self._told, self._deputies, self._deputies_at = {}, frozenset(), now
        self._solve_at = self._pointer_at = NEVER
        self._news_since, self._news_at = now, now
        return []

    def end(self) -> None:
        """We are no longer the coordinator."""
        self.term, self._offer, self._solving_since = 0, None, None
        self._news_since, self._solve_at, self._pointer_at = None, NEVER, NEVER
        self.problem = ""

    def news(self, now: float) -> None:
        """Someone came, went, drained or returned: plan soon."""
        if self.term:
            self._news_since = now if self._news_since is None else self._news_since
            self._news_at = now

    def deadline(self) -> float:
        """When `tick` wants to be called."""
        if not self.term:
            return NEVER
        if self._solving_since is not None:
            return min(self._solving_since + self._config.solve_s, self._pointer_at)
        next_solve = max(self._due(), self._rest_until)
        return min(self._offer.since + self._config.offer_s if self._offer else next_solve, self._pointer_at)

    def _may_solve(self, records: dict[PeerId, PeerRecord], now: float) -> bool:
        """Whether it is time to. While an offer is open peers would load for a plan that the next one replaces."""
        if self._solving_since is not None or self._offer is not None or now < self._due():
            return False
        return now >= self._rest_until or not self._serves(records)  # whoever waits to be served cannot rest

    def _due(self) -> float:
        if self._news_since is None:
            return self._solve_at
        if self._expecting:
            return min(self._solve_at, self._news_since + self._config.joining_s)
        quiet = min(self._news_at + self._config.quiet_s, self._news_since + self._config.quiet_s_max)
        return min(self._solve_at, quiet)

    def tick(self, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        """Start a solve, give up an offer, renew the pointer, as time demands."""
        if not self.term:
            return []
        effects: list[Effect] = []
        # A plan made before everyone has arrived would move weights again a moment later.
        self._expecting = self._current is None and any(r.state == "joining" for r in records.values())
        if now >= self._deputies_at:
            self._choose_deputies(records, now)
        if now >= self._pointer_at:
            effects += self._publish(records, now)
        if self._offer and self._is_carried(self._offer, records):
            effects += self._activate(records, now)
        if self._offer and now >= self._offer.since + self._config.offer_s:
            effects += self._offer_expired(records, now)
        if self._solving_since is not None and now >= self._solving_since + self._config.solve_s:
            self._solving_since = None
            effects.append(Emit(Event("plan.solve_lost", {})))
        if self._may_solve(records, now):
            effects += self._solve(records, now)
        return effects

    # --- solving -----------------------------------------------------------------------------------

    def _solve(self, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        repair = self._news_since is not None and now < self._solve_at and self._current is not None
        self._news_since = None
        if not repair:
            self._solve_at = now + self._config.resolve_s
        self._unfit = {peer: until for peer, until in self._unfit.items() if until > now}
        self._told = {peer: told for peer, told in self._told.items() if peer in records}
        snapshot = self.snapshot(records)
        self._solving_since = now
        current = _still_there(self._current, snapshot)
        return [Solve(snapshot, current, seed=self.term * 1_000_003 + self._epoch, repair=repair)]

    def snapshot(self, records: dict[PeerId, PeerRecord]) -> Snapshot:
        """What the planner sees: measured, active peers and the links between them."""
        usable = {
            peer: record
            for peer, record in records.items()
            if record.capability is not None and record.state == "active" and peer not in self._unfit
        }
        views = [
            PeerView(peer=peer, capability=record.capability, held=max(record.held, key=len, default=None))
            for peer, record in sorted(usable.items())
            if record.capability is not None
        ]
        links = [
            Link(source=peer, target=link.target, round_trip_s=link.round_trip_s, bandwidth=link.bandwidth)
            for peer, record in sorted(usable.items())
            for link in sorted(record.links, key=lambda measure: measure.target)
            if link.target in usable and link.bandwidth > 0
        ]
        return Snapshot(
            manifest=self._manifest,
            peers=tuple(views),
            links=tuple(links),
            default_round_trip_s=self._config.default_round_trip_s,
            default_bandwidth=self._config.default_bandwidth,
        )

    def solved(self, outcome: Solved, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        """The planner answered: weigh it, and offer it if it pays."""
        if not self.term or self._solving_since is None:
            return []
        self._solving_since = None
        self._rest_until = now + self._config.rest * outcome.seconds
        self.problem = outcome.problem
        if outcome.placement is None:
            return [Emit(Event("plan.impossible", {"why": outcome.problem}))]
        placement = outcome.placement
        if any(a.peer not in records for a in placement.assignments):
            # In a large swarm somebody always leaves meanwhile: what is left will do until it is repaired.
            self.news(now)
            placement = _left(placement, records)
            if uncovered([a.span for a in placement.assignments], self._manifest.layers):
                return []
        held = {peer: record.held for peer, record in records.items()}
        verdict = weigh(outcome.current, placement, held, self._manifest, AdoptionConfig())
        weighed: dict[str, object] = {"adopt": verdict.adopt, "why": verdict.why, "seconds": outcome.seconds}
        effects: list[Effect] = [Emit(Event("plan.weighed", weighed))]
        if verdict.adopt:
            return effects + self._make_offer(placement, records, now)
        if outcome.current is not None and self._outdated(outcome.current):
            return effects + self._make_offer(outcome.current, records, now)
        return effects

    def _outdated(self, remaining: Placement) -> bool:
        """Whether the plan we follow needs a new number although nothing better was found.

        A new tenure carries the old plan on as its own, so that everyone follows one plan; and peers that
        are gone are taken out of it.
        """
        plan = self._current
        return plan is not None and (
            not self._is_ours(plan) or len(plan.placement.assignments) != len(remaining.assignments)
        )

    def _is_ours(self, plan: Plan) -> bool:
        return plan.term == self.term and plan.coordinator == self.me

    # --- offering ----------------------------------------------------------------------------------

    def _make_offer(self, placement: Placement, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        self._epoch += 1
        plan = Plan(
            term=self.term,
            epoch=self._epoch,
            coordinator=self.me,
            manifest_hash=self._manifest.hash,
            layers=self._manifest.layers,
            placement=placement,
        )
        self._offer = _Offer(plan, now, {a.peer for a in placement.assignments})
        self._choose_deputies(records, now)
        self._note_told(records, plan.number, now)
        return [self._offer_to(peer, plan) for peer in sorted(records)]

    def _choose_deputies(self, records: dict[PeerId, PeerRecord], now: float) -> None:
        """Those of highest rank: they claim the lease first when ours ends. Who is one is told whole plans already."""
        self._deputies_at = now + self._config.remind_s
        others = (
            Candidate(peer, record.uptime_s * (CHALLENGE if peer in self._deputies else 1.0))
            for peer, record in records.items()
            if peer != self.me
        )
        self._deputies = frozenset(steadiest(others, self._config.deputies))

    def _note_told(self, peers: Iterable[PeerId], number: PlanNumber, now: float) -> None:
        pause = self._config.remind_s
        self._told = {peer: _Told(number, now + pause, pause) for peer in peers}

    def _offer_to(self, peer: PeerId, plan: Plan) -> Effect:
        knows_all = peer == self.me or peer in self._deputies
        return Send(peer, wire.PlanOffer(plan=plan if knows_all else plan.part_of(peer)))

    def ready(
        self, sender: PeerId, message: wire.PlanReady, records: dict[PeerId, PeerRecord], now: float
    ) -> list[Effect]:
        """A peer holds what the offered plan gives it, or cannot."""
        offer = self._offer
        if offer is None or offer.plan.number != PlanNumber(message.term, message.epoch):
            return []
        if message.problem:
            self._unfit[sender] = now + self._config.unfit_s
            self._offer = None
            self.news(now)
            return [Emit(Event("plan.refused", {"peer": sender, "why": message.problem}))]
        offer.ready.add(sender)
        return self._activate(records, now) if self._is_carried(offer, records) else []

    def _is_carried(self, offer: _Offer, records: dict[PeerId, PeerRecord]) -> bool:
        """Whether all are ready; while nothing serves, whether enough are: routers go around the late."""
        if offer.wanted <= offer.ready:
            return True
        return not self._serves(records) and offer.covers(offer.ready & offer.wanted)

    def _serves(self, records: dict[PeerId, PeerRecord]) -> bool:
        """Whether what is left of the plan we follow covers the model."""
        plan = self._current
        spans = [a.span for a in plan.placement.assignments if a.peer in records] if plan is not None else []
        return not uncovered(spans, self._manifest.layers)

    def _offer_expired(self, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        offer = self._offer
        assert offer is not None, "the caller checked"
        if offer.covers(offer.ready & offer.wanted):
            return self._activate(records, now)
        late = sorted(offer.wanted - offer.ready)
        for peer in late:
            self._unfit[peer] = now + self._config.unfit_s
        self._offer = None
        self.news(now)
        return [Emit(Event("plan.expired", {"late": late}))]

    def _activate(self, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        assert self._offer is not None, "only an offer is activated"
        plan, self._offer = self._offer.plan, None
        self._current = plan
        message = wire.PlanActive(term=plan.term, epoch=plan.epoch)
        active: dict[str, object] = {"term": plan.term, "epoch": plan.epoch, "peers": len(plan.placement.assignments)}
        self._note_told(self._told, plan.number, now)
        told = [Send(peer, message) for peer in sorted(records)]
        return [*told, Emit(Event("plan.active", active)), *self._publish(records, now)]

    def remind(self, record: PeerRecord, now: float) -> list[Effect]:
        """A member reports another plan than ours: offer it the one it should follow, but not at every heartbeat."""
        followed = PlanNumber(*record.plan)
        if self._offer is not None:
            newest, is_active = self._offer.plan, False
        elif self._current is not None and self._is_ours(self._current):
            newest, is_active = self._current, True
        else:
            return []
        lacks = record.peer in self._deputies and not record.plan_whole
        if followed > newest.number or (followed == newest.number and record.plan_active == is_active and not lacks):
            return []
        told, pause = self._told.get(record.peer), self._config.remind_s
        if told is not None and told.number == newest.number:
            if now < told.again_at:
                return []
            pause = min(2 * told.pause_s, self._config.remind_s_max)
        self._told[record.peer] = _Told(newest.number, now + pause, pause)
        effects: list[Effect] = [self._offer_to(record.peer, newest)]
        if is_active:
            effects.append(Send(record.peer, wire.PlanActive(term=newest.term, epoch=newest.epoch)))
        return effects

    def lost(self, peer: PeerId, now: float) -> None:
        """A member is suspect, dead or leaving: an offer that cannot do without it is void."""
        if self._offer is not None and peer in self._offer.wanted:
            self._offer.wanted.discard(peer)
            if not self._offer.covers(self._offer.wanted):
                self._offer = None
        self.news(now)

    def _publish(self, records: dict[PeerId, PeerRecord], now: float) -> list[Effect]:
        self._pointer_at = now + self._config.pointer_renew_s
        plan = self._current
        if plan is None:
            return []
        mine = records.get(self.me)
        pointer = PlanPointer(
            term=plan.term,
            epoch=plan.epoch,
            plan_hash=plan.hash,
            coordinator=self.me,
            addresses=mine.addresses if mine else (),
        )
        return [Publish(self._pointer_key, encode_pointer(pointer), self._config.pointer_lifetime_s)]


def _still_there(plan: Plan | None, snapshot: Snapshot) -> Placement | None:
    """What is left of a plan's placement; the planner finds out what that is worth. None if it covers too little."""
    if plan is None:
        return None
    left = _left(plan.placement, {view.peer for view in snapshot.peers})
    return None if uncovered([a.span for a in left.assignments], plan.layers) else left


def _left(placement: Placement, live: Container[PeerId]) -> Placement:
    """Without what the others held and what flowed through them; the prediction stays."""
    return Placement(
        assignments=tuple(a for a in placement.assignments if a.peer in live),
        flows=tuple(f for f in placement.flows if all(end is None or end in live for end in (f.source, f.target))),
        prediction=placement.prediction,
    )

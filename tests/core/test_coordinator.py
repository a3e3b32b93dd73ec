"""The coordinator's side of a plan: an offer stays until it is carried, as long as what is left of it can carry."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec
import pytest

from helixnet.core.machine import Effect, Send, Solve, Solved
from helixnet.core.plan.coordinator import Coordinator, CoordinatorConfig
from helixnet.core.plan.plan import Assignment, Flow, Placement, Prediction
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId, Span
from helixnet.core.wire import messages as wire
from tests.virtual_swarm import MANIFEST, capability

ME, A, B, C = PeerId("me"), PeerId("a"), PeerId("b"), PeerId("c")
CONFIG = CoordinatorConfig()
RATE = Prediction(tokens_per_s=10.0, bound_tokens_per_s=10.0, ttft_s=0.1, tpot_s=0.1)


def record(peer: PeerId, *held: Span) -> PeerRecord:
    return PeerRecord(
        peer=peer,
        name=peer,
        addresses=(),
        model="toy",
        manifest_hash=MANIFEST.hash,
        state="active",
        capability=capability(10**9),
        held=held,
    )


def a_placement(rate: float = 10.0, **spans: tuple[int, int]) -> Placement:
    assignments = tuple(Assignment(PeerId(peer), Span(*span)) for peer, span in sorted(spans.items()))
    prediction = msgspec.structs.replace(RATE, tokens_per_s=rate)
    return Placement(assignments=assignments, flows=(Flow(None, A, rate),), prediction=prediction)


class Tenure:
    """A coordinator with three members, asked to plan at once."""

    def __init__(self, config: CoordinatorConfig = CONFIG) -> None:
        self.records = {peer: record(peer) for peer in (A, B, C)}
        self.coordinator = Coordinator(ME, "net", MANIFEST, config)
        self.coordinator.begin(1, None, 0.0)
        self.now = 0.0

    def tick(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.coordinator.tick(self.records, self.now)

    def offer(self, placement: Placement, seconds: float = 0.0) -> list[Effect]:
        effects: list[Effect] = []
        while not any(isinstance(effect, Solve) for effect in effects):
            effects = self.tick(1.0)
        return self.coordinator.solved(Solved(placement, None, "", seconds), self.records, self.now)

    def follow(self, placement: Placement) -> None:
        """Offer what A and B hold; they are ready, and so it is the active plan."""
        self.offer(placement)
        self.ready(A)
        assert activated(self.ready(B))

    def reminded(self, peer: PeerId, after_s: Iterable[float]) -> list[float]:
        """When, of these times of its heartbeats, it is offered the plan again."""
        times = [self.now + seconds for seconds in after_s]
        return [at for at in times if self.coordinator.remind(self.records[peer], at)]

    def ready(self, peer: PeerId, epoch: int = 1) -> list[Effect]:
        return self.coordinator.ready(peer, wire.PlanReady(term=1, epoch=epoch), self.records, self.now)


def activated(effects: list[Effect]) -> bool:
    return any(isinstance(effect, Send) and isinstance(effect.message, wire.PlanActive) for effect in effects)


def test_while_an_offer_is_open_nothing_else_is_planned() -> None:
    tenure = Tenure()
    tenure.offer(a_placement(a=(0, 3), b=(3, 6)))
    tenure.coordinator.news(tenure.now)
    for _ in range(int(CONFIG.offer_s) - 1):
        assert not any(isinstance(effect, Solve) for effect in tenure.tick(1.0))
    tenure.ready(A)
    assert activated(tenure.ready(B))
    assert any(isinstance(effect, Solve) for effect in tenure.tick(CONFIG.quiet_s_max)), "the news was kept"


def test_where_nothing_serves_a_plan_is_active_as_soon_as_the_ready_cover_the_model() -> None:
    tenure = Tenure()
    tenure.offer(a_placement(a=(0, 3), b=(3, 6), c=(0, 6)))
    assert not activated(tenure.ready(A))
    assert activated(tenure.ready(B)), "c may still be loading"


def test_where_a_plan_serves_the_next_waits_for_all_of_its_peers() -> None:
    tenure = Tenure()
    tenure.follow(a_placement(a=(0, 3), b=(3, 6)))
    tenure.offer(a_placement(rate=30.0, a=(0, 4), b=(3, 6), c=(0, 6)))
    assert not activated(tenure.ready(C, 2)) and not activated(tenure.ready(A, 2))
    assert activated(tenure.ready(B, 2))


def test_an_offer_outlives_a_peer_whose_layers_others_hold() -> None:
    tenure = Tenure()
    tenure.follow(a_placement(a=(0, 3), b=(3, 6)))
    tenure.offer(a_placement(rate=30.0, a=(0, 3), b=(3, 6), c=(0, 6)))
    tenure.ready(A, 2)
    tenure.ready(B, 2)
    del tenure.records[C]
    tenure.coordinator.lost(C, tenure.now)
    assert activated(tenure.tick(0.0)), "everybody who is left is ready"


def test_an_offer_that_cannot_do_without_a_peer_ends_with_it() -> None:
    tenure = Tenure()
    tenure.offer(a_placement(a=(0, 3), b=(3, 6)))
    del tenure.records[B]
    tenure.coordinator.lost(B, tenure.now)
    assert not activated(tenure.ready(A))
    assert any(isinstance(effect, Solve) for effect in tenure.tick(CONFIG.quiet_s_max))


@pytest.mark.parametrize(("gone", "offered"), [(C, {A, B}), (B, None)])
def test_who_left_while_it_was_planned_is_left_out_if_the_others_do_without(
    gone: PeerId, offered: set[PeerId] | None
) -> None:
    tenure = Tenure()
    del tenure.records[gone]
    effects = tenure.offer(a_placement(a=(0, 3), b=(3, 6), c=(0, 6) if gone == C else (0, 3)))
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    offers = [message.plan for message in sent if isinstance(message, wire.PlanOffer)]
    assert (offered is None) == (not offers)
    for plan in offers:
        assert {assignment.peer for assignment in plan.placement.assignments} <= (offered or set())
    assert any(isinstance(effect, Solve) for effect in tenure.tick(CONFIG.quiet_s_max)) == (offered is None)


def test_after_a_long_solve_the_planner_rests_unless_nothing_serves() -> None:
    tenure = Tenure()
    tenure.offer(a_placement(a=(0, 3), b=(3, 6)), seconds=30.0)
    tenure.ready(A)
    tenure.ready(B)
    tenure.coordinator.news(tenure.now)
    assert not any(isinstance(effect, Solve) for effect in tenure.tick(CONFIG.rest * 30.0 - 1.0))
    del tenure.records[B]
    assert any(isinstance(effect, Solve) for effect in tenure.tick(0.0)), "layers 3 to 5 are gone"


def test_a_member_that_does_not_take_up_the_plan_is_offered_it_again_but_not_at_every_heartbeat() -> None:
    tenure = Tenure()
    tenure.follow(a_placement(a=(0, 3), b=(3, 6)))
    reminded = tenure.reminded(C, range(1, 300))
    pauses = [later - earlier for earlier, later in pairwise([tenure.now, *reminded])]
    assert pauses[:4] == [CONFIG.remind_s * 2**n for n in range(4)], "the plan may still be on its way"
    assert pauses[4:] and set(pauses[4:]) == {CONFIG.remind_s_max}


def offered(effects: list[Effect]) -> dict[PeerId, bool]:
    """Who was offered a plan, and whether all of it."""
    sent = [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, wire.PlanOffer)]
    return {effect.to: effect.message.plan.whole for effect in sent if isinstance(effect.message, wire.PlanOffer)}


def test_only_deputies_are_told_whole_plans_the_others_their_own_part() -> None:
    config = msgspec.structs.replace(CONFIG, deputies=1)
    tenure = Tenure(config)
    tenure.records[B] = msgspec.structs.replace(tenure.records[B], uptime_s=3_600.0)
    effects = tenure.offer(a_placement(a=(0, 3), b=(3, 6), c=(0, 6)))
    assert offered(effects) == {A: False, B: True, C: False}
    sent = [effect.message for effect in effects if isinstance(effect, Send) and effect.to == A]
    (part,) = [message.plan for message in sent if isinstance(message, wire.PlanOffer)]
    assert part.span_of(A) == Span(0, 3) and part.span_of(C) is None and not part.placement.flows


def test_those_who_started_together_do_not_take_turns_as_deputies() -> None:
    tenure = Tenure(msgspec.structs.replace(CONFIG, deputies=1))
    tenure.records[C] = msgspec.structs.replace(tenure.records[C], uptime_s=3_600.0)
    tenure.follow(a_placement(a=(0, 3), b=(3, 6)))
    # Its record is newer: no more than that.
    tenure.records[B] = msgspec.structs.replace(
        tenure.records[B], uptime_s=4_500.0, plan=(1, 1), plan_active=True, plan_whole=False
    )
    tenure.tick(CONFIG.remind_s)
    assert tenure.coordinator.remind(tenure.records[B], tenure.now) == []


def test_who_came_after_an_offer_is_told_at_once() -> None:
    tenure = Tenure()
    late = tenure.records.pop(C)
    tenure.offer(a_placement(a=(0, 3), b=(3, 6)))
    tenure.records[C] = late
    tenure.ready(A)
    tenure.ready(B)
    assert tenure.coordinator.remind(late, tenure.now)


def test_a_new_deputy_is_told_the_rest_of_the_plan() -> None:
    tenure = Tenure(msgspec.structs.replace(CONFIG, deputies=1))
    tenure.records[B] = msgspec.structs.replace(tenure.records[B], uptime_s=3_600.0)
    tenure.follow(a_placement(a=(0, 3), b=(3, 6)))
    tenure.records[C] = msgspec.structs.replace(
        tenure.records[C], uptime_s=36_000.0, plan=(1, 1), plan_active=True, plan_whole=False
    )
    tenure.tick(CONFIG.remind_s)
    assert offered(tenure.coordinator.remind(tenure.records[C], tenure.now)) == {C: True}
    has_it = msgspec.structs.replace(tenure.records[C], plan_whole=True)
    assert tenure.coordinator.remind(has_it, tenure.now + CONFIG.remind_s) == []

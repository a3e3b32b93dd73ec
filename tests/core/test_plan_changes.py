"""When a new plan is worth it, and how a peer moves from one span to another without losing what it serves."""

from __future__ import annotations

import pytest

from helixnet.core.machine import DropLayers, Dropped, Effect, Loaded, LoadSpan, Send
from helixnet.core.plan.adoption import AdoptionConfig, moved_bytes, replicas_min, weigh
from helixnet.core.plan.follower import Follower, FollowerConfig
from helixnet.core.plan.plan import Assignment, Flow, Placement, Plan, Prediction, uncovered
from helixnet.core.stage.stage import StageConfig, StageMachine
from helixnet.core.types import PeerId, Span
from helixnet.core.wire import messages as wire
from tests.core.one_stage import reserve
from tests.virtual_swarm import LAYERS, MANIFEST

ME, BOSS, OTHER = PeerId("me"), PeerId("boss"), PeerId("other")


def placement(spans: dict[str, tuple[int, int]], rate: float, flow: float | None = None) -> Placement:
    prediction = Prediction(tokens_per_s=rate, bound_tokens_per_s=rate, ttft_s=0.1, tpot_s=0.1)
    assignments = tuple(Assignment(PeerId(p), Span(*s)) for p, s in sorted(spans.items()))
    return Placement(assignments=assignments, flows=(Flow(None, PeerId("a"), flow or rate),), prediction=prediction)


HALVES = {"a": (0, 3), "b": (3, 6)}
HELD: dict[PeerId, tuple[Span, ...]] = {PeerId("a"): (Span(0, 3),), PeerId("b"): (Span(3, 6),)}


@pytest.mark.parametrize(
    ("current", "candidate", "adopt"),
    [
        (None, placement(HALVES, 10), True),
        (placement(HALVES, 0), placement(HALVES, 10), True),
        (placement(HALVES, 10), placement(HALVES, 10), False),
        (placement(HALVES, 10), placement(HALVES, 10, flow=7), True),
        (placement(HALVES, 10), placement({"a": (0, 2), "b": (2, 6)}, 10.2), False),
        (placement(HALVES, 10), placement({"a": (0, 2), "b": (2, 6)}, 15), True),
        (placement(HALVES, 10), placement({**HALVES, "c": (0, 6)}, 10), True),
        (placement(HALVES, 10), placement({**HALVES, "c": (0, 6)}, 5), False),
    ],
    ids=["first", "nothing serves", "same", "flows", "noise", "pays", "helper", "slower"],
)
def test_a_new_plan_is_adopted_only_if_it_pays(current: Placement | None, candidate: Placement, adopt: bool) -> None:
    verdict = weigh(current, candidate, HELD, MANIFEST, AdoptionConfig())
    assert verdict.adopt is adopt and verdict.why


def test_a_gain_that_loading_eats_up_is_not_worth_it() -> None:
    slow = AdoptionConfig(horizon_s=10, load_bytes_per_s=MANIFEST.layer_bytes / 100)
    swapped = placement({"a": (3, 6), "b": (0, 3)}, 12)
    assert moved_bytes(HELD, swapped, MANIFEST) == 6 * MANIFEST.layer_bytes
    assert not weigh(placement(HALVES, 10), swapped, HELD, MANIFEST, slow).adopt


def test_gaps_and_replicas_are_counted() -> None:
    assert uncovered([Span(1, 2), Span(4, 6)], 6) == [Span(0, 1), Span(2, 4)]
    assert uncovered([Span(0, 6)], 6) == []
    assert replicas_min(placement({**HALVES, "c": (0, 6)}, 1), LAYERS) == 2


class Mover:
    """A peer that follows plans, with room for four layers and a little KV."""

    def __init__(self) -> None:
        memory = 4 * MANIFEST.layer_bytes + 100 * 16 * MANIFEST.kv_bytes
        self.stage = StageMachine(ME, MANIFEST, memory, StageConfig())
        self.follower = Follower(ME, self.stage, FollowerConfig(drain_s=30.0))

    def offer(self, span: tuple[int, int] | None, epoch: int, sender: PeerId = BOSS, now: float = 0.0) -> list[Effect]:
        spans = {"other": (0, LAYERS)} | ({"me": span} if span else {})
        plan = Plan(
            term=1,
            epoch=epoch,
            coordinator=BOSS,
            manifest_hash=MANIFEST.hash,
            layers=LAYERS,
            placement=placement(spans, 10),
        )
        return self.follower.offered(sender, plan, now)

    def activate(self, epoch: int, now: float = 0.0) -> list[Effect]:
        return self.follower.activated(wire.PlanActive(term=1, epoch=epoch), now)

    def hold(self, start: int, stop: int, epoch: int = 1) -> None:
        self.offer((start, stop), epoch)
        self.follower.loaded(Loaded((Span(start, stop),)), 0.0)
        self.activate(epoch)


def kinds(effects: list[Effect]) -> list[str]:
    return [type(e.message).__name__ if isinstance(e, Send) else type(e).__name__ for e in effects]


def test_what_is_new_is_loaded_before_what_is_old_is_dropped() -> None:
    mover = Mover()
    mover.hold(0, 2)
    (load,) = mover.offer((1, 4), 2)
    assert isinstance(load, LoadSpan) and load.span == Span(1, 4)
    assert kinds(mover.follower.loaded(Loaded((Span(0, 4),)), 1.0)) == ["PlanReady"]
    assert mover.stage.served == (Span(0, 4),), "the old span serves until the new plan is active"
    (drop,) = mover.activate(2)
    assert isinstance(drop, DropLayers) and drop.keep == Span(1, 4)


def test_a_span_with_sessions_drains_before_it_is_dropped() -> None:
    mover = Mover()
    mover.hold(0, 3)
    mover.stage.reserve(OTHER, reserve(), 0.0)
    mover.offer((1, 4), 2)
    mover.follower.loaded(Loaded((Span(0, 4),)), 1.0)
    assert mover.activate(2, 1.0) == [] and mover.stage.served == (Span(1, 4),)
    assert mover.follower.settled(2.0) == []
    mover.stage.release(next(iter(mover.stage.sessions)))
    assert kinds(mover.follower.settled(3.0)) == ["DropLayers"]


def test_a_drain_that_takes_too_long_breaks_its_sessions_so_that_they_go_on_elsewhere() -> None:
    mover = Mover()
    mover.hold(0, 3)
    mover.stage.reserve(OTHER, reserve(), 0.0)
    mover.offer((1, 4), 2)
    mover.follower.loaded(Loaded((Span(0, 4),)), 1.0)
    mover.activate(2, 1.0)
    assert mover.follower.tick(mover.follower.deadline() - 0.1) == []
    assert kinds(mover.follower.tick(mover.follower.deadline())) == ["Broken", "DropLayers"]


def test_without_room_for_both_the_old_layers_go_first() -> None:
    mover = Mover()
    mover.hold(0, 3)
    (drop,) = mover.offer((3, 6), 2)
    assert isinstance(drop, DropLayers)
    assert kinds(mover.follower.dropped(Dropped(()), 1.0)) == ["LoadSpan"]


def test_stale_foreign_and_borrowed_plans_are_refused() -> None:
    mover = Mover()
    mover.hold(0, 2, epoch=5)
    assert mover.offer((1, 4), 4) == [] and mover.follower.number.epoch == 5
    assert mover.offer((1, 4), 6, sender=OTHER) == [] and mover.follower.number.epoch == 5


def test_a_span_that_cannot_be_loaded_is_reported_with_the_reason() -> None:
    mover = Mover()
    mover.offer((0, 3), 1)
    (report,) = mover.follower.loaded(Loaded((), "the file is damaged"), 1.0)
    assert isinstance(report, Send) and isinstance(report.message, wire.PlanReady)
    assert report.message.problem == "the file is damaged"


def test_a_peer_the_plan_gives_nothing_drops_everything_once_it_is_active() -> None:
    mover = Mover()
    mover.hold(0, 3)
    assert kinds(mover.offer(None, 2)) == ["PlanReady"]
    (drop,) = mover.activate(2)
    assert isinstance(drop, DropLayers) and drop.keep is None

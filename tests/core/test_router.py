"""Routing: along the plan's flows, around the masked, always over whole pipelines."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.plan.plan import Assignment, Flow, Placement, Plan, Prediction
from helixnet.core.route.pipeline import Pipeline, Stage, check_pipeline
from helixnet.core.route.prefixes import Ways
from helixnet.core.route.router import AHEAD_TURNS, Router
from helixnet.core.types import PeerId, Span

LAYERS = 8


def plan_of(spans: dict[str, tuple[int, int]], flows: dict[tuple[str | None, str | None], float]) -> Plan:
    prediction = Prediction(tokens_per_s=1, bound_tokens_per_s=1, ttft_s=1, tpot_s=1)
    placement = Placement(
        assignments=tuple(Assignment(PeerId(p), Span(*s)) for p, s in sorted(spans.items())),
        flows=tuple(Flow(PeerId(a) if a else None, PeerId(b) if b else None, rate) for (a, b), rate in flows.items()),
        prediction=prediction,
    )
    return Plan(term=1, epoch=1, coordinator=PeerId("a"), manifest_hash="m", layers=LAYERS, placement=placement)


def all_held(plan: Plan) -> dict[PeerId, tuple[Span, ...]]:
    return {a.peer: (a.span,) for a in plan.placement.assignments}


def peers_of(pipeline: Pipeline | None) -> str:
    assert pipeline is not None
    return "".join(stage.peer for stage in pipeline)


DIAMOND = plan_of(
    {"a": (0, 4), "b": (0, 5), "c": (3, 8), "d": (4, 8)},
    {
        (None, "a"): 3.0,
        (None, "b"): 1.0,
        ("a", "c"): 1.0,
        ("a", "d"): 2.0,
        ("b", "c"): 0.5,
        ("b", "d"): 0.5,
        ("c", None): 1.5,
        ("d", None): 2.5,
    },
)


def test_pipelines_follow_the_flows_in_proportion() -> None:
    router = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    counts = Counter(peers_of(router.pick()) for _ in range(400))
    assert abs(counts["ad"] - 200) <= 3 and abs(counts["ac"] - 100) <= 3
    assert abs(counts["bc"] - 50) <= 3 and abs(counts["bd"] - 50) <= 3


def test_the_shares_hold_among_those_that_are_let_in() -> None:
    router = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    asked, let_in = Counter[str](), Counter[str]()
    while sum(let_in.values()) < 400:
        pipeline = router.pick()
        assert pipeline is not None
        way = peers_of(pipeline)
        asked[way] += 1
        if way[-1] == "d" and asked[way] % 3:  # full more often than not
            router.give_back(pipeline)
        else:
            let_in[way] += 1
    assert abs(let_in["ad"] - 200) <= 3 and abs(let_in["ac"] - 100) <= 3
    assert abs(let_in["bc"] - 50) <= 3 and abs(let_in["bd"] - 50) <= 3


def test_a_way_may_be_gone_again_as_long_as_it_costs_the_flows_little() -> None:
    router = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    known = router.pick({PeerId("a"), PeerId("d")})
    assert known is not None and peers_of(known) == "bc"
    counts, again = Counter[str](), 0
    for _ in range(400):
        taken = router.again(known)
        again += taken
        counts[peers_of(known if taken else router.pick())] += 1
    assert again > 40 and counts["bc"] + counts["bd"] <= 100 + AHEAD_TURNS + 1, "no more than its share, in the end"
    assert counts["ac"] + counts["bc"] <= 150 + 2 * AHEAD_TURNS
    fresh = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    assert AHEAD_TURNS <= [fresh.again(known) for _ in range(20)].count(True) <= 2 * AHEAD_TURNS


def test_a_way_that_the_flows_do_not_lead_is_not_gone_again() -> None:
    router = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    b, c, d = PeerId("b"), PeerId("c"), PeerId("d")
    known: Pipeline = (Stage(b, Span(0, 5)), Stage(c, Span(5, 8)))
    assert not router.again(known, {c}), "masked"
    assert not router.again((Stage(b, Span(0, 4)), Stage(c, Span(4, 8)))), "spans of another plan"
    assert not router.again((Stage(PeerId("gone"), Span(0, 5)), Stage(c, Span(5, 8)))), "a peer of another plan"
    assert not router.again((Stage(c, Span(0, 8)),)), "no flow begins there"
    router.held = {peer: spans for peer, spans in router.held.items() if peer != d}
    assert not router.again((Stage(b, Span(0, 5)), Stage(d, Span(5, 8)))), "not ready"


def test_ways_are_remembered_by_what_prompts_have_in_common_the_newest_the_longest() -> None:
    ways = Ways(blocks_max=4)
    first: Pipeline = (Stage(PeerId("a"), Span(0, LAYERS)),)
    second: Pipeline = (Stage(PeerId("b"), Span(0, LAYERS)),)
    ways.ran(first, (b"1", b"2", b"3"))
    assert ways.find((b"1", b"2", b"3", b"4")) == first and ways.find((b"x",)) is None and ways.find(()) is None
    ways.ran(second, (b"1", b"5"))
    assert ways.find((b"1", b"2")) == first and ways.find((b"1", b"9")) == second
    assert ways.find((b"1", b"2", b"3")) == first
    ways.ran(second, (b"6",))
    assert ways.find((b"1", b"2", b"3")) == first and ways.find((b"3",)) is None, "ends are forgotten first"


def test_a_stage_enters_a_span_where_the_one_before_stopped() -> None:
    router = Router(DIAMOND, all_held(DIAMOND), random.Random(0))
    pipeline = router.pick({PeerId("a"), PeerId("d")})
    assert pipeline == (Stage(PeerId("b"), Span(0, 5)), Stage(PeerId("c"), Span(5, 8)))


def test_a_peer_that_is_not_ready_is_not_used() -> None:
    held = all_held(DIAMOND)
    held[PeerId("c")] = (Span(3, 6),)
    router = Router(DIAMOND, held, random.Random(0))
    assert all(peers_of(router.pick())[-1] == "d" for _ in range(20))


def test_without_a_planned_way_any_peers_that_hold_the_layers_serve() -> None:
    plan = plan_of({"a": (0, 4), "b": (0, 8), "c": (4, 8)}, {(None, "a"): 1.0, ("a", "c"): 1.0, ("c", None): 1.0})
    router = Router(plan, all_held(plan), random.Random(0))
    assert peers_of(router.pick()) == "ac"
    assert peers_of(router.pick({PeerId("c")})) == "b"
    assert router.pick({PeerId("b"), PeerId("c")}) is None


@given(st.data())
def test_whatever_is_masked_a_pipeline_covers_every_layer_once_or_there_is_none(data: st.DataObject) -> None:
    cuts = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).filter(lambda pair: pair[0] < pair[1])
    spans = dict(zip("abcdef", data.draw(st.lists(cuts, min_size=1, max_size=6)), strict=False))
    flows: dict[tuple[str | None, str | None], float] = {}
    for a, (start, stop) in spans.items():
        if start == 0:
            flows[(None, a)] = data.draw(st.floats(0.1, 5))
        for b, (other_start, other_stop) in spans.items():
            if other_start <= stop < other_stop:
                flows[(a, b)] = data.draw(st.floats(0.0, 5))
    plan = plan_of(spans, flows)
    masked = {PeerId(p) for p in data.draw(st.sets(st.sampled_from(sorted(spans))))}
    router = Router(plan, all_held(plan), random.Random(1))
    for _ in range(5):
        pipeline = router.pick(masked)
        if pipeline is None:
            assert not _reachable(spans, masked)
        else:
            check_pipeline(pipeline, LAYERS)
            for stage in pipeline:
                assert stage.peer not in masked and Span(*spans[stage.peer]).holds(stage.layers)


def _reachable(spans: dict[str, tuple[int, int]], masked: set[PeerId]) -> bool:
    reached = 0
    while reached < LAYERS:
        stops = [stop for p, (start, stop) in spans.items() if p not in masked and start <= reached < stop]
        if not stops:
            return False
        reached = max(stops)
    return True


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ((), "1 to 64 stages"),
        ((("a", 0, 4),), "ends at layer 4"),
        ((("a", 0, 4), ("b", 5, 8)), "does not continue at layer 4"),
        ((("a", 0, 4), ("b", 3, 8)), "does not continue at layer 4"),
        ((("a", 0, 4), ("a", 4, 8)), "at most once"),
    ],
    ids=["empty", "short", "gap", "overlap", "twice"],
)
def test_a_bad_pipeline_is_refused(stages: tuple[tuple[str, int, int], ...], complaint: str) -> None:
    pipeline = tuple(Stage(PeerId(p), Span(a, b)) for p, a, b in stages)
    with pytest.raises(ValueError, match=complaint):
        check_pipeline(pipeline, LAYERS)

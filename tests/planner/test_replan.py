from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from helixnet.core.plan.adoption import moved_bytes
from helixnet.core.plan.plan import Assignment, Placement, Prediction
from helixnet.core.plan.snapshot import Snapshot
from helixnet.core.types import PeerId, Span
from helixnet.planner.climb import Climb, coverage_of
from helixnet.planner.fastflow import paper_max_flow, paper_routing
from helixnet.planner.flow import CapacityModel
from helixnet.planner.lay import kinds_of
from helixnet.planner.migration import Loading, Migration, Step, migration, steps
from helixnet.planner.problem import Matrix, Problem, Spans, from_snapshot
from helixnet.planner.replan import WORK, Repair, link_groups, repair, repaired_start
from helixnet.planner.starts import starts
from helixnet.planner.windows import Windows
from tests.planner.small_swarms import large_swarm, loopback_swarm, random_swarm


def climbed(problem: Problem, seed: int, work: int) -> Spans:
    best = Climb(problem, kinds_of(problem), random.Random(seed)).run(work, lambda: False)
    assert best is not None
    return best.spans


def only(problem: Problem, kept: Sequence[int]) -> Problem:
    both = np.ix_(kept, kept)
    return replace(
        problem,
        peers=tuple(problem.peers[n] for n in kept),
        link_tokens_per_s=problem.link_tokens_per_s[both],
        link_s=problem.link_s[both],
        prompt_link_s=problem.prompt_link_s[both],
    )


def without(problem: Problem, spans: Spans, gone: int) -> tuple[Problem, Spans]:
    kept = [n for n in range(len(spans)) if n != gone]
    return only(problem, kept), tuple(spans[n] for n in kept)


def loads(problem: Problem, spans: Spans) -> list[float]:
    return [peer.capacity[len(span)] if span else 0.0 for peer, span in zip(problem.peers, spans, strict=True)]


def check(problem: Problem, held: Spans, repaired: Repair) -> None:
    """Spans fit, nothing got worse, what is said is true, and the order leaves nothing uncovered."""
    for index, span in enumerate(repaired.spans):
        assert span is None or span == held[index] or problem.fits(index, span.start, span.stop)
    assert repaired.tokens_per_s >= repaired.unmoved_tokens_per_s
    changed = {i for i, span in enumerate(repaired.spans) if span != held[i]}
    assert changed == set(repaired.placed) | set(repaired.moved)
    if repaired.order is not None:
        replay(problem, held, repaired.spans, repaired.order)


def replay(problem: Problem, held: Spans, spans: Spans, order: Sequence[Step]) -> None:
    """Do the steps one by one: what was covered stays so, memory is kept to, and the end is as planned."""
    has = [set(span.layers()) if span else set() for span in held]
    covered = set().union(*has)
    for step in order:
        span = spans[step.index]
        wanted = set(span.layers()) if span else set()
        has[step.index] = has[step.index] | wanted if step.load else has[step.index] & wanted
        now = has[step.index]
        assert not now or len(now) <= problem.room(step.index, 0 in now, problem.layers - 1 in now)
        assert covered <= set().union(*has)
    assert has == [set(span.layers()) if span else set() for span in spans]


@pytest.mark.slow
def test_after_a_departure_a_repair_is_nearly_as_good_as_a_full_solve_and_moves_little() -> None:
    problem = large_swarm(1, peers=200, layers=80)
    spans = climbed(problem, 1, 30_000_000)
    most_loaded = int(np.argmax(loads(problem, spans)))
    for gone in (most_loaded, 77):
        smaller, held = without(problem, spans, gone)
        repaired = repair(smaller, held, random.Random(0))
        check(smaller, held, repaired)
        assert repaired.tokens_per_s >= 0.98 * coverage_of(smaller, climbed(smaller, 2, 30_000_000))
        assert len(repaired.moved) <= 0.05 * len(held) and not repaired.placed
        assert repaired.order is not None
        assert repaired.work <= 1.2 * WORK


def test_a_repair_raises_what_a_departure_left_thin() -> None:
    problem = large_swarm(2, peers=50, layers=24)
    spans = climbed(problem, 2, 1_000_000)
    gone = int(np.argmax(loads(problem, spans)))
    smaller, held = without(problem, spans, gone)
    repaired = repair(smaller, held, random.Random(0))
    check(smaller, held, repaired)
    assert len(repaired.moved) <= 3
    assert repaired.tokens_per_s >= 0.95 * coverage_of(smaller, climbed(smaller, 2, 1_000_000))
    assert repaired.tokens_per_s > 1.02 * repaired.unmoved_tokens_per_s


def test_layers_that_a_departure_uncovered_are_covered_again() -> None:
    problem = from_snapshot(loopback_swarm(700, 700, 700, 700))
    smaller, held = without(problem, (Span(0, 15), Span(15, 30), Span(0, 15), Span(0, 15)), 1)
    repaired = repair(smaller, held, random.Random(0))
    check(smaller, held, repaired)
    assert repaired.unmoved_tokens_per_s == 0
    assert repaired.tokens_per_s > 0
    assert len(repaired.moved) == 1


def test_a_newcomer_gets_the_window_where_it_helps_most_and_nobody_else_has_to_move() -> None:
    problem = large_swarm(3, peers=40, layers=24)
    smaller = only(problem, range(39))
    held = (*climbed(smaller, 1, 1_000_000), None)
    repaired = repair(problem, held, random.Random(0), moves_max=0)
    check(problem, held, repaired)
    assert repaired.placed == (39,)
    assert repaired.moved == ()
    supply = Windows(problem, held).supply
    span = repaired.spans[39]
    assert span is not None
    assert supply[span.start : span.stop].mean() <= supply.mean()


def test_when_a_peer_slows_down_others_take_over_some_of_its_work() -> None:
    problem = large_swarm(4, peers=50, layers=24)
    spans = climbed(problem, 1, 1_000_000)
    slow = int(np.argmax(loads(problem, spans)))
    peer = problem.peers[slow]
    slower = replace(peer, capacity=tuple(rate / 3 for rate in peer.capacity))
    today = replace(problem, peers=(*problem.peers[:slow], slower, *problem.peers[slow + 1 :]))
    repaired = repair(today, spans, random.Random(0))
    check(today, spans, repaired)
    assert repaired.tokens_per_s > 1.02 * repaired.unmoved_tokens_per_s


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_when_a_link_dies_the_flow_is_led_around_it(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, peers=8, layers=12))
    spans = max(starts(problem), key=lambda spans: paper_max_flow(problem, spans))
    edges = {edge: rate for edge, rate in paper_routing(problem, spans, limits=False).edges.items() if -1 not in edge}
    links = problem.link_tokens_per_s.copy()
    links[max(edges, key=lambda edge: edges[edge])] = 0.0
    today = replace(problem, link_tokens_per_s=links)
    repaired = repair(today, spans, random.Random(0), moves_max=2)
    check(today, spans, repaired)
    assert repaired.tokens_per_s > repaired.unmoved_tokens_per_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("model", CapacityModel)
def test_whatever_happened_a_repair_is_valid_and_the_same_again(seed: int, model: CapacityModel) -> None:
    rng = random.Random(seed)
    problem = from_snapshot(random_swarm(seed, rng.randint(2, 8), rng.randint(1, 9)))
    held: list[Span | None] = []
    for _ in problem.peers:
        start = rng.randrange(problem.layers)
        held.append(rng.choice((None, Span(start, rng.randint(start + 1, problem.layers)))))
    misfits = sum(span is not None and not problem.fits(i, span.start, span.stop) for i, span in enumerate(held))
    allowed = rng.randint(0, 4)
    repaired = repair(problem, tuple(held), random.Random(seed), 200_000, model, allowed)
    check(problem, tuple(held), repaired)
    assert len(repaired.moved) <= allowed + misfits
    assert repair(problem, tuple(held), random.Random(seed), 200_000, model, allowed) == repaired


def test_nothing_moves_when_the_flow_is_enough() -> None:
    problem = large_swarm(2, peers=50, layers=24)
    smaller, held = without(problem, climbed(problem, 2, 1_000_000), 7)
    enough = 0.5 * paper_max_flow(smaller, held)
    assert repair(smaller, held, random.Random(0), target=enough).moved == ()


def two_regions() -> tuple[Problem, Spans]:
    """Each region holds every layer; between them links are a hundred times narrower."""
    problem = large_swarm(6, peers=48, layers=16)
    near = np.arange(48) % 2
    links: Matrix = np.where(near[:, None] == near[None], 1000.0, 10.0)
    np.fill_diagonal(links, np.inf)
    spans: list[Span | None] = [None] * 48
    for region in (0, 1):
        members = [n for n in range(48) if n % 2 == region]
        for index, span in zip(members, climbed(only(problem, members), 1, 500_000), strict=True):
            spans[index] = span
    return replace(problem, link_tokens_per_s=links), tuple(spans)


def test_peers_with_wide_links_between_them_are_a_group() -> None:
    problem, _ = two_regions()
    assert link_groups(problem) == [frozenset(range(0, 48, 2)), frozenset(range(1, 48, 2))]
    assert link_groups(large_swarm(1, 5, 4)) == []
    assert link_groups(large_swarm(1, 1, 4)) == []


def test_a_region_repairs_what_a_departure_left_thin_in_it() -> None:
    problem, spans = two_regions()
    gone = int(np.argmax(loads(problem, spans)))
    today, held = without(problem, spans, gone)
    repaired = repair(today, held, random.Random(0))
    check(today, held, repaired)
    assert repaired.tokens_per_s > 1.02 * repaired.unmoved_tokens_per_s
    moved = {today.peers[index].peer for index in repaired.moved}
    assert moved <= {problem.peers[index].peer for index in range(48) if index % 2 == gone % 2}


def test_the_best_window_is_what_trying_them_all_finds() -> None:
    problem = from_snapshot(random_swarm(8, peers=5, layers=7))
    held = (Span(0, 3), Span(2, 5), Span(4, 7), None, Span(0, 1))
    windows, goal = Windows(problem, held), 900.0

    def shortage(spans: Spans) -> float:
        return float((np.maximum(0.0, goal - Windows(problem, spans).supply) ** 2).sum())

    covered = Windows(problem, held).supply > 0
    tried = {}
    for index in range(5):
        for start in range(7):
            for stop in range(start + 1, 8):
                spans = (*held[:index], Span(start, stop), *held[index + 1 :])
                if problem.fits(index, start, stop) and (Windows(problem, spans).supply[covered] > 0).all():
                    tried[index, Span(start, stop)] = shortage(held) - shortage(spans)
    found = windows.best(np.arange(5), goal)
    assert found is not None
    assert found[2] == pytest.approx(max(tried.values()))
    assert tried[found[:2]] == pytest.approx(found[2])


def test_what_peers_hold_is_a_start_when_most_hold_something() -> None:
    snapshot = loopback_swarm(700, 700, 700, held={0: Span(0, 15), 1: Span(15, 30)})
    problem = from_snapshot(snapshot)
    found = repaired_start(problem)
    assert found is not None
    assert found[:2] == (Span(0, 15), Span(15, 30))
    assert found[2] is not None
    assert repaired_start(from_snapshot(loopback_swarm(700, 700, 700, held={0: Span(0, 15)}))) is None
    assert repaired_start(from_snapshot(loopback_swarm(400, 400, held={0: Span(0, 5), 1: Span(0, 5)}))) is None


def swap_problem(room: int, peers: int) -> Problem:
    problem = from_snapshot(loopback_swarm(*[700.0] * peers))
    return replace(
        problem, layers=6, peers=tuple(replace(peer, layers_max=(room, room, room, 0)) for peer in problem.peers)
    )


def test_who_has_room_for_both_loads_first_and_drops_when_all_have_loaded() -> None:
    held, spans = (Span(0, 3), Span(3, 6)), (Span(0, 2), Span(2, 6))
    order = steps(swap_problem(4, 2), held, spans)
    assert order == (Step(0, True), Step(1, True), Step(0, False), Step(1, False))


def test_two_peers_cannot_swap_when_neither_has_room_for_both() -> None:
    held, spans = (Span(0, 3), Span(3, 6)), (Span(3, 6), Span(0, 3))
    assert steps(swap_problem(3, 2), held, spans) is None


def test_a_third_holder_lets_two_peers_swap_and_who_may_be_spared_goes_first() -> None:
    problem = swap_problem(3, 3)
    held, spans = (Span(0, 3), Span(3, 6), Span(3, 6)), (Span(3, 6), Span(0, 3), Span(3, 6))
    order = steps(problem, held, spans)
    assert order == (Step(1, False), Step(1, True), Step(0, False), Step(0, True))
    replay(problem, held, spans, order)


def test_a_migration_counts_layers_ends_and_the_slowest_peer() -> None:
    problem = from_snapshot(loopback_swarm(700, 700, 700))
    links = np.full((3, 3), np.inf)
    links[0, 2], links[1, 2], links[1, 0] = 1.0, 2.0, 0.0
    problem = replace(problem, link_tokens_per_s=links)
    loading = Loading(layer_bytes=100, flow_bytes=50.0, read_bytes_per_s=80.0)
    held, spans = (Span(0, 15), Span(15, 30), None), (Span(0, 17), Span(15, 30), Span(12, 16))
    # Peer 0: two layers from its own copy, as nothing comes from peer 1; peer 2: three from 0, one from 1.
    assert migration(problem, held, spans, loading) == Migration(600, 3 * 100 / 50 + 100 / 80)
    whole = migration(problem, (None, None, None), (Span(0, 1), Span(29, 30), None), loading)
    assert whole.bytes == 200 + problem.first_bytes + problem.last_bytes


def test_layers_to_load_are_counted_as_the_coordinator_counts_them() -> None:
    snapshot = loopback_swarm(700, 700)
    problem, model = from_snapshot(snapshot), snapshot.manifest
    held, spans = (Span(0, 15), Span(15, 30)), (Span(0, 20), Span(12, 29))
    names = [peer.peer for peer in problem.peers]
    placed = Placement(
        assignments=tuple(Assignment(name, span) for name, span in zip(names, spans, strict=True)),
        flows=(),
        prediction=Prediction(tokens_per_s=1, bound_tokens_per_s=1, ttft_s=1, tpot_s=1),
    )
    have: dict[PeerId, tuple[Span, ...]] = {name: (span,) for name, span in zip(names, held, strict=True)}
    cost = migration(problem, held, spans, Loading.of(model))
    assert cost.bytes == moved_bytes(have, placed, model) == 8 * model.layer_bytes
    assert cost.seconds == pytest.approx(5 * model.layer_bytes / 100e6)  # loopback is faster than reading


def test_the_bandwidth_of_a_planned_link_is_found_again() -> None:
    snapshot = replace_bandwidth(2e6)
    problem = from_snapshot(snapshot)
    cost = migration(problem, (Span(0, 15), None), (Span(0, 15), Span(1, 15)), Loading.of(snapshot.manifest))
    assert cost.seconds == pytest.approx(14 * snapshot.manifest.layer_bytes / 2e6)


def replace_bandwidth(bandwidth: float) -> Snapshot:
    swarm = loopback_swarm(700, 700)
    return Snapshot(manifest=swarm.manifest, peers=swarm.peers, default_bandwidth=bandwidth)

"""The search for flow alone: never below its starts, never above the bound, near the best; and no plan is ever bad."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixnet.core.errors import CapacityError
from helixnet.planner.bounds import proven_bound
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.flow import CapacityModel
from helixnet.planner.largest import Found, largest_flow
from helixnet.planner.objective import PRESETS, score
from helixnet.planner.problem import Matrix, Problem, Spans, from_snapshot, require_room
from helixnet.planner.solve import Budget, place
from helixnet.planner.starts import starts
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import loopback_swarm, random_swarm, spread_links

pytestmark = pytest.mark.slow

TINY = Budget(
    work=500,
    work_per_peer=100,
    milp_nodes=200,
    flow_work=1_000_000,
    flow_work_per_peer=0,
    laying_work=200_000,
    laying_work_per_peer=50_000,
)


def swarm(seed: int, peers: int, layers: int, decades: float = 2.0) -> Problem:
    """The first that has room for the model, from this seed on; its links bind."""
    while not (problem := from_snapshot(random_swarm(seed, peers, layers))).has_room():
        seed += 1
    return spread_links(problem, random.Random(seed), decades)


def found_in(problem: Problem, work: int, seed: int = 1) -> Found:
    return largest_flow(problem, starts(problem), random.Random(seed), work, lambda: False)


def check(problem: Problem, spans: Spans) -> None:
    assert len(spans) == len(problem.peers)
    covered = [0] * problem.layers
    for index, span in enumerate(spans):
        if span is not None:
            assert problem.fits(index, span.start, span.stop)
            covered[span.start : span.stop] = [1] * len(span)
    assert all(covered)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_at_least_its_best_start_and_at_most_the_bound(seed: int) -> None:
    problem = swarm(10 * seed, peers=3 + seed, layers=4 + seed, decades=0.5 + seed / 3)
    found = found_in(problem, 1_000_000)
    check(problem, found.spans)
    assert found.tokens_per_s == paper_max_flow(problem, found.spans)
    assert found.tokens_per_s >= max(paper_max_flow(problem, spans) for spans in starts(problem))
    assert found.tokens_per_s <= proven_bound(problem) * (1 + 1e-6)


def test_cancelled_at_once_it_gives_the_best_start() -> None:
    for seed in range(5):
        problem = swarm(10 * seed, peers=8, layers=9)
        built = starts(problem)
        found = largest_flow(problem, built, random.Random(1), 10**12, lambda: True)
        assert found.spans in built
        assert found.tokens_per_s == max(paper_max_flow(problem, spans) for spans in built)


@pytest.mark.slow
def test_cancelled_on_the_way_it_gives_the_best_so_far() -> None:
    problem, asked = swarm(3, peers=9, layers=12), 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 60

    found = largest_flow(problem, starts(problem), random.Random(1), 10**12, cancelled)
    check(problem, found.spans)
    assert asked < 100


def test_a_start_that_serves_nothing_is_better_than_none() -> None:
    problem = swarm(1, peers=4, layers=6)
    cut = replace(problem, link_tokens_per_s=np.zeros((4, 4)))
    found = found_in(cut, 300_000)
    assert any(found.spans)


def test_the_same_seed_finds_the_same() -> None:
    problem = swarm(4, peers=9, layers=12)
    assert found_in(problem, 1_000_000, 5) == found_in(problem, 1_000_000, 5)


def test_regions_that_hold_the_model_are_swarms_of_their_own_where_links_between_them_carry_nothing() -> None:
    problem = from_snapshot(loopback_swarm(*[350.0, 450.0, 300.0] * 2))
    region = np.arange(6) // 3
    near = region[:, None] == region[None]
    links: Matrix = np.where(near, 1000.0, 0.001)
    np.fill_diagonal(links, np.inf)
    hops: Matrix = np.where(near, 0.001, 0.2)
    apart = replace(problem, link_tokens_per_s=links, link_s=hops)
    found = found_in(apart, 5_000_000)
    alone = [
        paper_max_flow(apart, tuple(s if n in team else None for n, s in enumerate(found.spans)))
        for team in (range(3), range(3, 6))
    ]
    assert min(alone) > 0
    assert sum(alone) == pytest.approx(found.tokens_per_s, rel=1e-3)
    assert found.tokens_per_s >= 0.999 * 2 * found_in(apart.only(range(3)), 5_000_000).tokens_per_s


@pytest.mark.slow
@pytest.mark.parametrize(("peers", "layers"), [(4, 5), (3, 7)])
def test_where_links_bind_it_finds_nearly_the_best_in_most_tiny_swarms(peers: int, layers: int) -> None:
    # Measured: 13 of 16 and 11 of 14 reach 95 %, the worst 66 %. (Plans of so few peers come from the exact solver.)
    shares = []
    for seed in range(16):
        problem = from_snapshot(random_swarm(seed, peers, layers))
        if problem.has_room():
            linked = spread_links(problem, random.Random(seed), 2.0)
            best = best_of_all(linked, CapacityModel.PAPER).tokens_per_s
            shares.append(found_in(linked, 10_000_000).tokens_per_s / best)
    assert len(shares) > 13
    assert max(shares) <= 1 + 1e-6
    assert sum(share >= 0.95 for share in shares) >= 0.75 * len(shares)
    assert min(shares) >= 0.6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    peers=st.integers(1, 7),
    layers=st.integers(1, 9),
    decades=st.none() | st.floats(0.0, 5.0),
    goal=st.sampled_from(sorted(PRESETS)),
    exact=st.booleans(),
)
@pytest.mark.slow
def test_every_goal_gets_a_placement_that_fits_and_covers(
    seed: int, peers: int, layers: int, decades: float | None, goal: str, exact: bool
) -> None:
    problem = from_snapshot(random_swarm(seed, peers, layers))
    if decades is not None:
        problem = spread_links(problem, random.Random(seed), decades)
    budget = TINY if exact else msgspec.structs.replace(TINY, milp_nodes=0)
    try:
        require_room(problem)
    except CapacityError:
        with pytest.raises(CapacityError):
            place(problem, seed, budget, PRESETS[goal])
        return
    spans = place(problem, seed, budget, PRESETS[goal])
    check(problem, spans)
    best = max(score(problem, PRESETS[goal], built) for built in starts(problem))
    assert score(problem, PRESETS[goal], spans) >= best - 1e-3

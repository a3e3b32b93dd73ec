from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helixnet.planner.bounds import coverage_bound
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.flow import CapacityModel
from helixnet.planner.milp_coverage import least_supply, solve_coverage
from helixnet.planner.problem import Problem, from_snapshot
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import random_swarm

pytestmark = pytest.mark.slow

NODES_MAX = 100_000


def wide(seed: int, peers: int, layers: int) -> Problem:
    """Links that never bind; the second and the third peer alike, so that kinds count."""
    problem = from_snapshot(random_swarm(seed, peers, layers))
    alike = replace(problem.peers[1], peer=problem.peers[2].peer)
    return replace(
        problem,
        peers=(*problem.peers[:2], alike, *problem.peers[3:]),
        link_tokens_per_s=np.full((peers, peers), 1e12),
    )


@pytest.mark.parametrize("seed", range(12))
def test_it_proves_what_trying_everything_finds_where_links_are_wide(seed: int) -> None:
    problem = wide(seed, 4, 5)
    best = best_of_all(problem, CapacityModel.PAPER).tokens_per_s
    found = solve_coverage(problem, NODES_MAX)
    if best == 0:
        assert found.tokens_per_s == 0
        return
    assert found.proven
    assert found.tokens_per_s == pytest.approx(best, rel=1e-4)
    assert found.tokens_per_s <= found.bound <= coverage_bound(problem) * (1 + 1e-9)
    assert found.spans is not None
    assert paper_max_flow(problem, found.spans) == pytest.approx(found.tokens_per_s, rel=1e-6)
    assert all(problem.fits(i, s.start, s.stop) for i, s in enumerate(found.spans) if s is not None)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6, 7, 8])
def test_where_links_bind_its_bound_still_holds(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, 4, 5))
    assert best_of_all(problem, CapacityModel.PAPER).tokens_per_s <= solve_coverage(problem, NODES_MAX).bound


def test_an_incumbent_that_nothing_exceeds_is_proven_and_a_worse_one_is_replaced() -> None:
    problem = wide(3, 4, 5)
    best = best_of_all(problem, CapacityModel.PAPER)
    assert best.tokens_per_s > 0
    kept = solve_coverage(problem, NODES_MAX, incumbent=best.spans)
    assert kept.proven
    assert kept.tokens_per_s == pytest.approx(best.tokens_per_s)
    worse = (None,) * len(best.spans)
    assert solve_coverage(problem, NODES_MAX, incumbent=worse).tokens_per_s == pytest.approx(
        best.tokens_per_s, rel=1e-4
    )


def test_without_nodes_it_keeps_the_incumbent_and_a_valid_bound() -> None:
    problem = wide(3, 4, 5)
    best = best_of_all(problem, CapacityModel.PAPER)
    kept = solve_coverage(problem, 0, seconds_max=0.0, incumbent=best.spans)
    assert kept.tokens_per_s == pytest.approx(least_supply(problem, best.spans))
    assert kept.bound >= best.tokens_per_s

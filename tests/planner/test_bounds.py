from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from helixnet.planner.bounds import coverage_bound, link_bound, proven_bound
from helixnet.planner.flow import CapacityModel
from helixnet.planner.problem import from_snapshot
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import random_swarm
from tests.planner.test_fastflow import spread_links


@pytest.mark.slow
@pytest.mark.parametrize("decades", [1.0, 3.0])
def test_no_placement_exceeds_the_bounds_in_either_model(decades: float) -> None:
    tight = 0
    for seed in range(40):
        problem = spread_links(from_snapshot(random_swarm(seed, 3 + seed % 2, 4)), random.Random(seed), decades)
        for model in CapacityModel:
            best = best_of_all(problem, model).tokens_per_s
            assert best <= link_bound(problem) * (1 + 1e-6)
            tight += best > 0.5 * link_bound(problem)
    assert tight > 10


def test_the_link_bound_is_at_most_the_coverage_bound_and_meets_it_where_links_are_wide() -> None:
    for seed in range(10):
        problem = from_snapshot(random_swarm(seed, 6, 8))
        assert link_bound(problem) <= coverage_bound(problem) * (1 + 1e-9)
        wide = replace(problem, link_tokens_per_s=np.full((6, 6), 1e12))
        assert proven_bound(wide) == pytest.approx(link_bound(wide))

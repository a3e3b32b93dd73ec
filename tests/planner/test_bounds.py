from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from helixnet.planner.bounds import LINK_PEERS_MAX, coverage_bound, link_bound, proven_bound
from helixnet.planner.flow import CapacityModel
from helixnet.planner.problem import from_snapshot
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import random_swarm, spread_links


@pytest.mark.slow
@pytest.mark.parametrize("decades", [1.0, 3.0])
def test_no_placement_exceeds_the_bounds_in_either_model(decades: float) -> None:
    tight = 0
    for seed in range(16):
        problem = spread_links(from_snapshot(random_swarm(seed, 3 + seed % 2, 4)), random.Random(seed), decades)
        for model in CapacityModel:
            best = best_of_all(problem, model).tokens_per_s
            assert best <= link_bound(problem) * (1 + 1e-6)
            tight += best > 0.5 * link_bound(problem)
    assert tight > 10


def test_a_region_without_room_for_all_layers_needs_links_to_the_rest() -> None:
    # Two pairs of peers, quick within, slow between; no pair can hold all layers.
    problem = from_snapshot(random_swarm(1, 4, 8))
    half = replace(problem.peers[0], layers_max=(4, 4, 4, 0), capacity=(1000.0,) * 9)
    links = np.full((4, 4), 1.0)
    links[:2, :2] = links[2:, 2:] = 1e6
    narrow = replace(problem, layers=16, peers=(half,) * 4, link_tokens_per_s=links)
    assert coverage_bound(narrow) == pytest.approx(250.0)
    assert link_bound(narrow) == pytest.approx(8.0, rel=1e-3)  # eight links between the pairs


def test_more_peers_than_the_program_takes_are_bounded_by_their_links_added_up() -> None:
    count = LINK_PEERS_MAX + 1
    problem = from_snapshot(random_swarm(1, 2, 8))
    small = replace(problem.peers[0], layers_max=(1, 1, 1, 0), capacity=(1000.0,) * 9)
    many = replace(problem, peers=(small,) * count, link_tokens_per_s=np.full((count, count), 0.01))
    assert link_bound(many) == pytest.approx(2.0 * (count - 1) * 0.01 * count / 8, rel=1e-6)


def test_the_link_bound_is_at_most_the_coverage_bound_and_meets_it_where_links_are_wide() -> None:
    for seed in range(10):
        problem = from_snapshot(random_swarm(seed, 6, 8))
        assert link_bound(problem) <= coverage_bound(problem) * (1 + 1e-9)
        wide = replace(problem, link_tokens_per_s=np.full((6, 6), 1e12))
        assert proven_bound(wide) == pytest.approx(link_bound(wide))

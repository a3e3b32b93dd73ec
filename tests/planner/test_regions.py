"""Groups are found in the links alone, and what is made of them keeps to the problem."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from helixnet.planner.lay import kinds_of
from helixnet.planner.problem import Matrix, Problem, from_snapshot
from helixnet.planner.random_swarm import geo_swarm
from helixnet.planner.regions import groups_of, teams_of, throttled, windows
from tests.planner.small_swarms import large_swarm, loopback_swarm, random_swarm


def with_hops(problem: Problem, groups: Sequence[int], within_s: float, between_s: float) -> Problem:
    """Hops that take about so long, some half as much more; nothing from a peer to itself."""
    near = np.array(groups)[:, None] == np.array(groups)[None]
    noise = np.random.default_rng(1).uniform(1.0, 1.5, near.shape)
    seconds: Matrix = np.where(near, within_s, between_s) * noise
    np.fill_diagonal(seconds, 0.0)
    return replace(problem, link_s=seconds)


def swarm(*memory_mb: float) -> Problem:
    return from_snapshot(loopback_swarm(*memory_mb))


@pytest.mark.parametrize("groups", [(0, 1) * 5, (0, 0, 1, 0, 2, 2, 1, 0, 1, 2), (0,) * 9 + (1,)], ids=str)
def test_peers_with_quick_hops_between_them_are_a_group(groups: tuple[int, ...]) -> None:
    found = groups_of(with_hops(swarm(*[500.0] * 10), groups, 0.001, 0.05))
    assert set(found) == set(range(len(set(groups))))
    assert len(set(zip(found, groups, strict=True))) == len(set(groups))


def test_there_is_one_group_where_hops_are_even_or_peers_are_few() -> None:
    ten = swarm(*[500.0] * 10)
    assert groups_of(ten) == (0,) * 10
    assert groups_of(with_hops(ten, (0, 1) * 5, 0.010, 0.012)) == (0,) * 10
    assert groups_of(with_hops(swarm(700, 700), (0, 1), 0.001, 0.1)) == (0, 0)
    assert groups_of(swarm(3000)) == (0,)


def test_no_link_at_all_is_a_long_hop() -> None:
    six = swarm(*[500.0] * 6)
    apart = np.where(np.arange(6)[:, None] // 3 == np.arange(6)[None] // 3, 0.001, np.inf)
    assert groups_of(replace(six, link_s=apart)) == (0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_peers_of_a_drawn_swarm_have_a_group_each(seed: int) -> None:
    found = groups_of(from_snapshot(geo_swarm(seed, 30, 5)))
    assert len(found) == 30
    assert set(found) == set(range(max(found) + 1))


def test_groups_with_room_for_the_model_are_teams() -> None:
    problem = with_hops(swarm(*[700.0] * 6), (0, 0, 1, 1, 0, 1), 0.001, 0.05)
    assert teams_of(problem, groups_of(problem)) == [(0, 1, 4), (2, 3, 5)]


def test_a_group_without_room_joins_the_nearest() -> None:
    groups = (0, 0, 1, 1, 2)
    problem = with_hops(swarm(*[500.0] * 5), groups, 0.001, 0.05)
    seconds = problem.link_s.copy()
    seconds[4, 2:4] = 0.02
    problem = replace(problem, link_s=seconds)
    assert teams_of(problem, groups) == [(0, 1), (2, 3, 4)]


def test_groups_without_room_even_together_are_one_team_of_all() -> None:
    groups = (0, 1, 2, 2)
    for memory in ((20.0, 20.0, 20.0, 700.0), (100.0, 100.0, 100.0, 100.0)):
        problem = with_hops(swarm(*memory), groups, 0.001, 0.05)
        assert teams_of(problem, groups) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("seed", range(10))
def test_teams_part_the_peers_and_each_has_room_unless_there_is_only_one(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, 9, 6))
    groups = [random.Random(seed).randrange(4) for _ in problem.peers]
    teams = teams_of(problem, groups)
    assert sorted(index for team in teams for index in team) == list(range(9))
    assert len(teams) == 1 or all(problem.only(team).has_room() for team in teams)


@pytest.mark.parametrize("seed", range(10))
def test_windows_of_the_groups_lie_end_to_end_over_all_layers(seed: int) -> None:
    problem = large_swarm(seed, peers=30, layers=24)
    groups = [n % (2 + seed % 4) for n in range(30)]
    kinds = kinds_of(problem, groups)
    found = windows(problem, kinds, groups, 100.0, random.Random(seed))
    assert found.shape == (len(kinds.members), 2)
    by_group = {groups[members[0]]: tuple(row) for members, row in zip(kinds.members, found.tolist(), strict=True)}
    assert all(
        by_group[groups[members[0]]] == tuple(row) for members, row in zip(kinds.members, found.tolist(), strict=True)
    )
    reached = 0
    for start, stop in sorted(by_group.values()):
        assert start == reached
        reached = stop
    assert reached == 24
    assert max(stop - start for start, stop in by_group.values()) < 24


def test_one_group_has_all_layers_for_its_window() -> None:
    problem = large_swarm(1, peers=10, layers=24)
    kinds = kinds_of(problem)
    assert {tuple(row) for row in windows(problem, kinds, (0,) * 10, 50.0, random.Random(1)).tolist()} == {(0, 24)}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_throttled_rates_are_finite_and_no_higher_than_the_rates(scale: float) -> None:
    for seed in range(5):
        problem = from_snapshot(random_swarm(seed, 8, 9))
        assert np.isinf(problem.link_tokens_per_s.diagonal()).all()
        kinds = kinds_of(problem)
        fed = throttled(problem, kinds, scale)
        assert np.isfinite(fed.rates).all()
        assert (fed.rates >= 0).all()
        assert (fed.rates <= kinds.rates).all()
        assert fed.members == kinds.members


def test_links_without_limits_throttle_nothing() -> None:
    problem = swarm(500, 600, 700)
    problem = replace(problem, link_tokens_per_s=np.full((3, 3), np.inf))
    kinds = kinds_of(problem)
    assert throttled(problem, kinds, 1.0).rates.tolist() == kinds.rates.tolist()


def test_longer_spans_are_fed_by_more_peers() -> None:
    problem = replace(swarm(*[500.0] * 4), link_tokens_per_s=np.full((4, 4), 30.0))
    kinds = kinds_of(problem)
    fed = throttled(problem, kinds, 1.0).rates
    # 30 tokens/s from each of the four peers' thirtieths that stop within a layer on average.
    expected = np.minimum(kinds.rates[0], 30.0 * 4 / 30 * np.arange(kinds.rates.shape[1]))
    assert fed[0] == pytest.approx(expected)

"""Climbing only gets better, tells the truth about what it found, and ends at the bound."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from helixnet.planner.bounds import coverage_bound
from helixnet.planner.climb import BOUND_MET, Climb, coverage_of
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.flow import CapacityModel
from helixnet.planner.lay import kinds_of
from helixnet.planner.problem import Problem, from_snapshot
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import random_swarm


def swarm(seed: int, peers: int, layers: int) -> Problem:
    """The first that has room for the model, from this seed on."""
    while not (problem := from_snapshot(random_swarm(seed, peers, layers, wide_links=True))).has_room():
        seed += 1
    return problem


def climb_of(problem: Problem, seed: int = 1) -> Climb:
    return Climb(problem, kinds_of(problem), random.Random(seed))


def alike(peers: int, layers: int, room: int) -> Problem:
    """Equally fast peers with equal room, which the whole model exceeds."""
    problem = swarm(1, 2, layers)
    one = replace(problem.peers[0], layers_max=(room, room, room, 0), capacity=(600.0,) * (layers + 1))
    return replace(problem, peers=(one,) * peers)


@pytest.mark.parametrize("seed", range(6))
def test_a_climb_never_gets_worse_and_what_it_says_is_so(seed: int) -> None:
    problem = swarm(10 * seed, peers=6 + seed, layers=12)
    climb, before = climb_of(problem), 0.0
    for _ in range(12):
        better = climb.step()
        assert (climb.value > before) == better
        before = climb.value
        if climb.best is not None:
            assert climb.value == coverage_of(problem, climb.best.spans) == climb.best.tokens_per_s
            assert climb.value <= coverage_bound(problem) * (1 + 1e-9)
            spans = climb.best.spans
            assert all(problem.fits(i, span.start, span.stop) for i, span in enumerate(spans) if span is not None)
            assert all(span is not None for i, span in enumerate(spans) if any(problem.peers[i].layers_max))
    assert climb.value > 0


def test_more_work_goes_on_from_where_less_work_ends() -> None:
    problem = swarm(3, peers=12, layers=16)
    values = []
    for work in (50_000, 200_000, 800_000):
        climb = climb_of(problem)
        climb.run(work, lambda: False)
        assert climb.work >= work or climb.value >= climb.bound * BOUND_MET
        values.append(climb.value)
    assert values == sorted(values)
    assert values[-1] > 0.85 * coverage_bound(problem)


@pytest.mark.parametrize(("peers", "layers", "room"), [(12, 6, 2), (10, 30, 6), (40, 20, 5), (3, 3, 1)])
def test_equal_peers_that_divide_the_layers_meet_the_bound(peers: int, layers: int, room: int) -> None:
    problem = alike(peers, layers, room)
    climb = climb_of(problem)
    climb.run(8_000_000, lambda: False)
    assert climb.value == pytest.approx(peers * 600.0 / layers, rel=1e-4)
    assert climb.bound == pytest.approx(peers * 600.0 / layers)


def test_in_tiny_swarms_a_climb_finds_nearly_the_best() -> None:
    for seed in range(10):
        problem = swarm(7 * seed, peers=3, layers=5)
        climb = climb_of(problem)
        climb.run(2_000_000, lambda: False)
        best = coverage_of(problem, best_of_all(problem, CapacityModel.PAPER).spans)
        assert 0.97 * best <= climb.value <= best * (1 + 1e-9)


def test_coverage_is_the_flow_where_links_are_wide() -> None:
    problem = swarm(2, peers=8, layers=10)
    climb = climb_of(problem)
    best = climb.run(200_000, lambda: False)
    assert best is not None
    assert paper_max_flow(problem, best.spans) == pytest.approx(best.tokens_per_s, rel=1e-6)


def test_a_cancelled_climb_has_done_nothing() -> None:
    climb = climb_of(swarm(1, peers=5, layers=8))
    assert climb.run(10**9, lambda: True) is None
    assert (climb.value, climb.work) == (0.0, 0)

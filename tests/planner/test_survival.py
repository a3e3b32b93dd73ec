"""What is left when a peer leaves, and plans that keep a share of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixnet.core.types import Span
from helixnet.planner import survival as survival_module
from helixnet.planner.objective import (
    BALANCED,
    SERVES_MIN,
    THROUGHPUT,
    Objective,
    left_by_supply,
    score,
    score_at_most,
)
from helixnet.planner.problem import Problem, Spans, from_snapshot
from helixnet.planner.solve import Budget, place
from helixnet.planner.starts import starts
from helixnet.planner.survival import FLOOR_MAX, TRIES, place_surviving, survival
from tests.planner.small_swarms import loopback_swarm, random_swarm

HALVES: Spans = (Span(0, 15), Span(15, 30), None, None)
TWO_PIPELINES: Spans = (Span(0, 15), Span(15, 30), Span(0, 15), Span(15, 30))
SMALL = Budget(work=20_000, work_per_peer=0, laying_work=1_000_000)


@pytest.fixture
def problem() -> Problem:
    return from_snapshot(loopback_swarm(900, 900, 900, 900))


def test_of_two_equal_pipelines_half_is_left_and_of_one_nothing(problem: Problem) -> None:
    assert survival(problem, TWO_PIPELINES).share == pytest.approx(0.5, rel=1e-3)
    assert survival(problem, HALVES).share == 0


def test_what_serves_nothing_leaves_nothing(problem: Problem) -> None:
    assert survival(problem, (Span(0, 15), None, None, None)).share == 0


def test_it_is_the_worst_departure_that_counts(problem: Problem) -> None:
    spans: Spans = (Span(0, 15), Span(15, 30), Span(0, 15), None)
    found = survival(problem, spans)
    assert (found.share, found.peer) == (0, 1)


def test_very_large_swarms_get_an_estimate_that_says_so(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survival_module, "PEERS_MAX", 3)
    found = survival(problem, TWO_PIPELINES)
    assert found.estimated
    assert found.share == pytest.approx(0.5, abs=0.05)


def test_the_estimate_is_the_least_that_other_holders_supply(problem: Problem) -> None:
    rate = problem.peers[0].tokens_per_s(15)
    share, peer = left_by_supply(problem, TWO_PIPELINES, 2 * rate)
    assert share == pytest.approx(0.5)
    assert peer == 0
    assert left_by_supply(problem, HALVES, rate) == (0.0, 0)


@pytest.mark.parametrize("base", [THROUGHPUT, BALANCED])
def test_a_floor_costs_where_it_is_missed_but_never_as_much_as_an_uncovered_layer(
    problem: Problem, base: Objective
) -> None:
    floored = replace(base, floor=0.4)
    assert score(problem, floored, TWO_PIPELINES) == pytest.approx(score(problem, base, TWO_PIPELINES))
    assert SERVES_MIN < score(problem, floored, HALVES) < score(problem, base, HALVES) - 5


def test_scores_with_a_floor_stay_below_what_is_said_of_them_at_most() -> None:
    objective = replace(BALANCED, floor=0.7)
    for seed in range(20):
        swarm = from_snapshot(random_swarm(seed, peers=5, layers=6, wide_links=seed % 2 == 0))
        for spans in starts(swarm) if swarm.has_room() else []:
            assert score_at_most(swarm, objective, spans) >= score(swarm, objective, spans) - 1e-6


def test_plans_keep_the_share_asked_for_where_others_do_not() -> None:
    swarm = from_snapshot(random_swarm(4, peers=7, layers=8, wide_links=True))

    def solver(objective: Objective) -> Spans:
        return place(swarm, 0, SMALL, objective)

    usual = survival(swarm, solver(THROUGHPUT)).share
    floor = min(0.6, usual + 0.2)
    found = survival(swarm, place_surviving(swarm, THROUGHPUT, floor, solver))
    assert usual < floor
    assert found.reaches(floor)


def test_a_try_whose_estimate_was_too_good_is_followed_by_one_that_aims_higher(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survival_module, "left_by_supply", lambda *_: (1.0, 0))
    aims: list[float] = []

    def solver(objective: Objective) -> Spans:
        aims.append(objective.floor)
        return TWO_PIPELINES if len(aims) == 2 else HALVES

    assert place_surviving(problem, BALANCED, 0.6, solver) == TWO_PIPELINES
    assert aims[0] == 0.6
    assert aims == sorted(aims)
    assert len(aims) <= TRIES
    assert max(aims) <= FLOOR_MAX


def test_a_try_that_cannot_even_by_its_estimate_is_the_last(problem: Problem) -> None:
    aims: list[float] = []

    def solver(objective: Objective) -> Spans:
        aims.append(objective.floor)
        return HALVES

    assert place_surviving(problem, BALANCED, 0.6, solver) == HALVES
    assert aims == [0.6]

from __future__ import annotations

import random
from dataclasses import replace

from helixnet.planner.flow import CapacityModel
from helixnet.planner.objective import THROUGHPUT, Objective
from helixnet.planner.pareto import FrontPoint, front, pareto_optimal
from helixnet.planner.predict import NO_FORECAST
from helixnet.planner.problem import Spans, from_snapshot
from helixnet.planner.search import Search
from helixnet.planner.served import served
from helixnet.planner.starts import starts
from tests.planner.small_swarms import random_swarm


def point(tokens_per_s: float, tpot_s: float, weight: float = 0.0) -> FrontPoint:
    return FrontPoint(weight, (), replace(NO_FORECAST, tokens_per_s=tokens_per_s, tpot_s=tpot_s))


def test_what_another_beats_in_both_is_left_out() -> None:
    fast, slow, between, beaten = point(10, 0.1), point(30, 0.9), point(20, 0.4), point(15, 0.5)
    assert pareto_optimal([fast, beaten, slow, between]) == (slow, between, fast)


def test_of_equals_the_first_stays_and_half_equals_go() -> None:
    first, again = point(10, 0.1, 0.0), point(10, 0.1, 3.0)
    assert pareto_optimal([first, again, point(10, 0.2), point(9, 0.1)]) == (first,)


def test_what_serves_nothing_is_no_point_of_the_front() -> None:
    assert pareto_optimal([point(0, 0)]) == ()


def test_the_front_is_what_no_pair_of_candidates_disproves() -> None:
    rng = random.Random(5)
    for _ in range(50):
        candidates = [point(rng.randint(1, 6), rng.randint(1, 6), n) for n in range(8)]
        kept = pareto_optimal(candidates)
        figures = {(p.outlook.tokens_per_s, p.outlook.tpot_s) for p in kept}
        expected = {
            (a.outlook.tokens_per_s, a.outlook.tpot_s)
            for a in candidates
            if not any(
                b.outlook.tokens_per_s >= a.outlook.tokens_per_s
                and b.outlook.tpot_s <= a.outlook.tpot_s
                and (b.outlook.tokens_per_s, b.outlook.tpot_s) != (a.outlook.tokens_per_s, a.outlook.tpot_s)
                for b in candidates
            )
        }
        assert figures == expected
        assert len(kept) == len(figures)


def test_the_front_asks_for_each_weight_and_predicts_what_is_found() -> None:
    problem = from_snapshot(random_swarm(3, peers=6, layers=8))
    asked: list[Objective] = []

    def solver(objective: Objective) -> Spans:
        asked.append(objective)
        return Search(problem, objective, random.Random(1), 5_000).run(starts(problem)).spans

    points = front(solver, problem, (0.0, 1.0, 3.0))
    assert asked == [replace(THROUGHPUT, latency=weight) for weight in (0.0, 1.0, 3.0)]
    assert points
    assert [p.outlook.tpot_s for p in points] == sorted((p.outlook.tpot_s for p in points), reverse=True)
    for found in points:
        assert found.outlook == served(problem, found.spans, CapacityModel.EXACT)[1]

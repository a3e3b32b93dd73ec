from __future__ import annotations

import random

import pytest

from helixnet.core.errors import CapacityError
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.milp import solve_exactly
from helixnet.planner.objective import BALANCED, PAPER, Objective, score, score_at_most
from helixnet.planner.problem import Problem, from_snapshot, require_room
from helixnet.planner.search import Search
from helixnet.planner.starts import starts
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import every_placement, random_swarm, spread_links

FLOW_ONLY = Objective(CapacityModel.EXACT, predicted=False)


def feasible(count: int, peers: int, layers: int) -> list[Problem]:
    """So many problems that have a solution, from consecutive seeds."""
    found: list[Problem] = []
    seed = 0
    while len(found) < count:
        seed += 1
        problem = from_snapshot(random_swarm(seed, peers, layers))
        try:
            require_room(problem)
        except CapacityError:
            continue
        found.append(problem)
    return found


def best_flow(problem: Problem, model: CapacityModel) -> float:
    return max(max_flow(problem, spans, model).tokens_per_s for spans in every_placement(problem))


def searched(problem: Problem, objective: Objective) -> float:
    return Search(problem, objective, random.Random(0), 60_000).run(starts(problem)).score


@pytest.mark.slow
def test_the_bound_holds_for_every_placement_in_both_models() -> None:
    for problem in feasible(6, peers=3, layers=4):
        for model in CapacityModel:
            assert best_flow(problem, model) <= coverage_bound(problem) * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decades", [None, 4.0], ids=["random links", "wide-ranging links"])
@pytest.mark.parametrize(("peers", "layers"), [(3, 7), (4, 5), (5, 3)])
def test_the_exact_solver_finds_what_trying_everything_finds(peers: int, layers: int, decades: float | None) -> None:
    for seed, problem in enumerate(feasible(6, peers, layers)):  # scripts/bench_planner tries larger ones, and more
        linked = spread_links(problem, random.Random(seed), decades) if decades else problem
        exact = solve_exactly(linked, nodes_max=100_000)
        best = best_of_all(linked, CapacityModel.PAPER)
        assert exact is not None
        assert exact.tokens_per_s == pytest.approx(best.tokens_per_s, rel=1e-4)
        assert paper_max_flow(linked, exact.spans) == pytest.approx(best.tokens_per_s, rel=1e-4)
        assert all(problem.fits(i, s.start, s.stop) for i, s in enumerate(exact.spans) if s is not None)


@pytest.mark.slow
def test_the_exact_solver_finds_the_same_from_an_incumbent_and_no_more_with_fewer_links() -> None:
    for problem in feasible(4, peers=4, layers=5):
        best = solve_exactly(problem, nodes_max=100_000)
        assert best is not None
        begun = solve_exactly(problem, nodes_max=100_000, incumbent=best.spans)
        fewer = solve_exactly(problem, nodes_max=100_000, links_kept=2)
        assert begun is not None
        assert fewer is not None
        assert begun.tokens_per_s == pytest.approx(best.tokens_per_s, rel=1e-4)
        assert fewer.tokens_per_s <= best.tokens_per_s * (1 + 1e-4)
        assert paper_max_flow(problem, fewer.spans) >= fewer.tokens_per_s * (1 - 1e-4)


def test_the_exact_solver_gives_up_at_its_limit() -> None:
    (problem,) = feasible(1, peers=6, layers=12)
    assert solve_exactly(problem, nodes_max=0) is None


@pytest.mark.slow
@pytest.mark.parametrize("objective", [FLOW_ONLY, PAPER, BALANCED], ids=["flow", "paper", "balanced"])
def test_search_finds_the_best_of_all_placements_in_tiny_swarms(objective: Objective) -> None:
    problems = feasible(6, peers=3, layers=4)
    reached = 0
    for problem in problems:
        best = max(score(problem, objective, spans) for spans in every_placement(problem))
        reached += searched(problem, objective) >= best - 1e-4
    assert reached == len(problems)


@pytest.mark.parametrize("objective", [FLOW_ONLY, PAPER, BALANCED], ids=["flow", "paper", "balanced"])
def test_what_search_passes_over_could_not_have_been_better(objective: Objective) -> None:
    for problem in feasible(4, peers=3, layers=4):
        placements = list(every_placement(problem))
        for spans in random.Random(1).sample(placements, min(100, len(placements))):
            assert score_at_most(problem, objective, spans) >= score(problem, objective, spans) - 1e-6

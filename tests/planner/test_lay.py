"""Laying keeps what it promises, and a failure that tried everything is right."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helixnet.planner.bounds import coverage_bound
from helixnet.planner.climb import coverage_of
from helixnet.planner.flow import CapacityModel
from helixnet.planner.lay import KINDS_TRIED, Counts, Laid, Order, kinds_of, lay
from helixnet.planner.problem import Problem, from_snapshot
from tests.planner.best_of_all import best_of_all
from tests.planner.small_swarms import large_swarm, loopback_swarm, random_swarm

ROOT = Path(__file__).parents[2]


def wide_swarms(count: int, peers: int, layers: int) -> list[Problem]:
    """So many problems that have a solution, links so wide that they never bind."""
    found: list[Problem] = []
    seed = 0
    while len(found) < count:
        seed += 1
        problem = from_snapshot(random_swarm(seed, peers, layers, wide_links=True))
        if problem.has_room():
            found.append(replace(problem, link_tokens_per_s=np.full((peers, peers), np.inf)))
    return found


def laid_at(problem: Problem, flow: float, *, width: int = 20, share_min: float = 0.5, seed: int = 1) -> Laid:
    kinds = kinds_of(problem)
    order = Order(flow, np.ones(len(kinds.members)), width, share_min)
    return lay(problem, kinds, order, random.Random(seed))


def check(problem: Problem, laid: Laid, flow: float) -> None:
    """Spans fit, everyone is placed or left over, and what is reached has the flow."""
    assert len(laid.spans) == len(problem.peers)
    supply = np.zeros(problem.layers)
    for index, span in enumerate(laid.spans):
        if span is not None:
            assert problem.fits(index, span.start, span.stop)
            supply[span.start : span.stop] += problem.peers[index].tokens_per_s(len(span))
    assert (supply[: laid.reached] >= flow * (1 - 1e-8)).all()
    with_room = sum(any(peer.layers_max) for peer in problem.peers)
    assert sum(span is not None for span in laid.spans) + laid.left.sum() == with_room


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 1.5])
def test_what_is_laid_has_the_flow_asked_for_as_far_as_it_reaches(share: float) -> None:
    reached = 0
    for problem in wide_swarms(8, peers=9, layers=12):
        flow = share * sum(peer.capacity[1] for peer in problem.peers) / problem.layers
        laid = laid_at(problem, flow)
        check(problem, laid, flow)
        whole = laid.reached == problem.layers
        assert whole == (coverage_of(problem, laid.spans) >= flow * (1 - 1e-8))
        assert laid.work > 0, "also where it fails at once"
        reached += whole
    assert reached >= 6 if share == 0.2 else reached == 0 if share > 1 else True


def test_peers_are_of_one_kind_when_nothing_tells_them_apart() -> None:
    problem = from_snapshot(loopback_swarm(350, 350, 10, 450, 350))
    assert kinds_of(problem).members == ((0, 1, 4), (3,))  # one has no room
    assert kinds_of(problem, (0, 1, 0, 0, 1)).members == ((0,), (1, 4), (3,))
    rates = kinds_of(problem).rates
    assert (np.diff(rates[:, 1:], axis=1) <= 0).all()
    assert (rates[:, 0] == 0).all()


def test_rates_are_taken_as_they_are_even_where_they_rise_with_more_layers() -> None:
    (problem,) = wide_swarms(1, peers=2, layers=4)
    odd = replace(problem.peers[0], layers_max=(4, 4, 4, 4), capacity=(100.0, 100.0, 240.0, 240.0, 400.0))
    kinds = kinds_of(replace(problem, peers=(odd, odd)))
    assert kinds.rates.tolist() == [[0.0, 100.0, 120.0, 80.0, 100.0]]


@pytest.mark.parametrize(("peers", "layers"), [(1, 3), (2, 4), (3, 2), (3, 4)])
def test_with_every_state_kept_laying_is_exact(peers: int, layers: int) -> None:
    for problem in wide_swarms(10, peers, layers):
        best = best_of_all(problem, CapacityModel.PAPER).spans
        most = coverage_of(problem, best)
        laid = laid_at(problem, most * (1 - 1e-6), width=10**6, share_min=0.0)
        assert laid.reached == problem.layers
        check(problem, laid, most * (1 - 1e-6))
        failed = laid_at(problem, most * (1 + 1e-6), width=10**6, share_min=0.0)
        assert failed.reached < problem.layers
        assert failed.exhaustive


def test_a_failure_that_claims_to_have_tried_everything_is_right_however_narrow_the_beam() -> None:
    claims = 0
    for problem in wide_swarms(12, peers=3, layers=4):
        most = coverage_of(problem, best_of_all(problem, CapacityModel.PAPER).spans)
        for share in (0.9, 0.99, 1.01, 1.1):
            for width in (1, 3, 30):
                laid = laid_at(problem, most * share, width=width, share_min=0.0)
                if laid.reached < problem.layers and laid.exhaustive:
                    claims += 1
                    assert share > 1
    assert claims > 40


def test_leaving_lengths_or_rates_out_is_not_trying_everything() -> None:
    (problem,) = wide_swarms(1, peers=3, layers=4)
    kinds = kinds_of(problem)
    for share_min, rate_max in ((0.5, math.inf), (0.0, 1e6)):
        order = Order(1e9, np.ones(len(kinds.members)), 100, share_min, rate_max)
        assert not lay(problem, kinds, order, random.Random(1)).exhaustive


def test_a_span_passes_no_more_than_allowed_unless_the_peer_cannot_hold_a_longer_one() -> None:
    problem = wide_swarms(1, peers=8, layers=10)[0]
    kinds = kinds_of(problem)
    most = float(np.median(kinds.rates[kinds.rates > 0]))
    laid = lay(problem, kinds, Order(most / 2, np.ones(len(kinds.members)), 20, 0.0, most), random.Random(1))
    for index, span in enumerate(laid.spans):
        if span is not None:
            peer = problem.peers[index]
            assert peer.tokens_per_s(len(span)) <= max(most, peer.tokens_per_s(max(peer.layers_max)))


def test_nobody_is_placed_outside_the_window_of_its_kind() -> None:
    placed = 0
    for seed, problem in enumerate(wide_swarms(10, peers=10, layers=12)):
        kinds, rng = kinds_of(problem), random.Random(seed)
        windows: Counts = np.array([rng.choice(((0, 7), (5, 12), (0, 12))) for _ in kinds.members])
        order = Order(20.0, np.ones(len(kinds.members)), 20, 0.7, windows=windows)
        laid = lay(problem, kinds, order, rng)
        check(problem, laid, 20.0)
        for members, (start, stop) in zip(kinds.members, windows.tolist(), strict=True):
            for span in filter(None, (laid.spans[index] for index in members)):
                placed += 1
                assert start <= span.start < span.stop <= stop
    assert placed > 20


def test_among_more_kinds_than_are_tried_at_once_a_failure_is_no_proof() -> None:
    problem = large_swarm(1, peers=KINDS_TRIED + 10, layers=16)
    kinds = kinds_of(problem)
    assert len(kinds.members) > KINDS_TRIED
    bound = coverage_bound(problem)
    laid = laid_at(problem, 0.8 * bound)
    check(problem, laid, 0.8 * bound)
    assert laid.reached == problem.layers
    failed = laid_at(problem, 0.9999 * bound, width=2, share_min=0.0)
    assert failed.reached < problem.layers
    assert not failed.exhaustive
    assert laid_at(problem, 1.01 * bound, share_min=0.0).exhaustive  # more than there is takes no trying


def test_the_same_seed_lays_the_same() -> None:
    problem = wide_swarms(1, peers=9, layers=12)[0]
    flow = 0.6 * sum(peer.capacity[1] for peer in problem.peers) / problem.layers
    one, two = laid_at(problem, flow), laid_at(problem, flow)
    assert (one.spans, one.reached, one.exhaustive, one.work) == (two.spans, two.reached, two.exhaustive, two.work)
    assert one.left.tolist() == two.left.tolist()


@pytest.mark.slow
def test_the_same_seed_lays_and_places_the_same_in_another_process() -> None:
    program = "\n".join(
        (
            "import random; import numpy as np",
            "from helixnet.planner.lay import *; from helixnet.planner.objective import PAPER",
            "from helixnet.planner.problem import from_snapshot; from helixnet.planner.solve import *",
            "from tests.planner.small_swarms import random_swarm",
            "problem = from_snapshot(random_swarm(5, 8, 9))",
            "kinds = kinds_of(problem)",
            "print(lay(problem, kinds, Order(50.0, np.ones(len(kinds.members)), 5, 0.5), random.Random(3)))",
            "print(place(problem, 7, Budget(flow_work=3_000_000, flow_work_per_peer=0, milp_nodes=0), PAPER))",
        )
    )
    answers = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        answers.append(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=50))
    assert answers[0] == answers[1]
    assert answers[0].count(b"Span(") > 6


def test_a_try_that_fails_at_once_counts_as_work() -> None:
    """Tries end when they have worked enough: in a swarm where each fails there would be no end to them."""
    (problem,) = wide_swarms(1, 4, 12)
    kinds = kinds_of(problem)
    nowhere = np.zeros((len(kinds.members), 2), dtype=int)
    order = Order(coverage_bound(problem) / 2, np.ones(len(kinds.members)), 20, 0.5, windows=nowhere)
    laid = lay(problem, kinds, order, random.Random(1))
    assert laid.reached == 0 and laid.work > 0

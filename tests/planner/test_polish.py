"""Polishing tells the truth about its flow, loses nothing, and adds up links right however many spans changed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from helixnet.core.types import Span
from helixnet.planner.bounds import proven_bound
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.polish import LOOKS, Polish
from helixnet.planner.problem import Problem, Spans, from_snapshot
from helixnet.planner.starts import starts
from tests.planner.small_swarms import random_swarm, spread_links


def swarm(seed: int, peers: int, layers: int) -> Problem:
    """The first that has room for the model, from this seed on; its links bind."""
    while not (problem := from_snapshot(random_swarm(seed, peers, layers))).has_room():
        seed += 1
    return spread_links(problem, random.Random(seed), 2.0)


def polish_of(problem: Problem, goal: float | None = None, seed: int = 1) -> Polish:
    bound = proven_bound(problem)
    flow = lambda spans: paper_max_flow(problem, spans)  # noqa: E731
    return Polish(problem, flow, bound, random.Random(seed), goal or bound)


def best_start(problem: Problem) -> Spans:
    return max(starts(problem), key=lambda spans: paper_max_flow(problem, spans))


@pytest.mark.parametrize("seed", range(8))
def test_what_it_says_is_the_flow_of_spans_that_fit_and_no_less_than_it_began_with(seed: int) -> None:
    problem = swarm(10 * seed, peers=4 + seed, layers=6 + seed)
    begun = best_start(problem)
    polish = polish_of(problem)
    polish.run(begun, 0.03, 1_500_000, lambda: False)
    assert polish.value == paper_max_flow(problem, polish.best)
    assert polish.value >= paper_max_flow(problem, begun)
    assert polish.value <= polish.bound * (1 + 1e-6)
    for index, span in enumerate(polish.best):
        assert span is None or problem.fits(index, span.start, span.stop)


@pytest.mark.slow
def test_it_gets_better_where_links_bind() -> None:
    gains = []
    for seed in range(6):
        problem = swarm(10 * seed, peers=10, layers=12)
        begun = best_start(problem)
        flow = paper_max_flow(problem, begun)
        polish = polish_of(problem, flow * 1.02)
        polish.run(begun, 0.03, 2_000_000, lambda: False)
        gains.append(polish.value / flow)
    assert sorted(gains)[2] > 1.1, gains


def test_rounds_go_on_with_the_best_of_those_before() -> None:
    problem = swarm(3, peers=8, layers=10)
    begun, polish, before = best_start(problem), polish_of(problem), 0.0
    for _ in range(4):
        polish.run(begun, 0.03, 500_000, lambda: False)
        assert polish.value >= before
        before = polish.value
    assert polish.work >= 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_links_of_changed_spans_add_up_as_from_the_beginning(seed: int) -> None:
    problem = swarm(10 * seed, peers=3 + 2 * seed, layers=4 + 3 * seed)
    polish, rng = polish_of(problem), np.random.default_rng(seed)
    here = polish._whole(best_start(problem))
    for _ in range(150):
        looks = polish._changed(here) if rng.random() < 0.9 else polish._shifted(here)
        row = looks.one(int(rng.integers(len(looks.start))))
        whole = polish._linked(row.start, row.stop)
        size = np.abs(whole.taken).max() + np.abs(whole.given).max() + polish.bound
        assert row.taken == pytest.approx(whole.taken, abs=1e-9 * size)
        assert row.given == pytest.approx(whole.given, abs=1e-9 * size)
        if np.isfinite(polish._costs(row)[0][0]):
            here = row


def test_changes_stay_within_the_model_and_concern_at_most_two_peers() -> None:
    problem = swarm(4, peers=9, layers=11)
    polish = polish_of(problem)
    here = polish._whole(best_start(problem))
    for _ in range(50):
        looks = polish._changed(here)
        assert len(looks.start) == LOOKS
        assert (looks.start >= 0).all()
        assert (looks.stop <= 11).all()
        assert (((looks.start != here.start) | (looks.stop != here.stop)).sum(axis=1) <= 2).all()


def test_the_supply_it_counts_is_at_least_the_flow() -> None:
    for seed in range(3):
        problem = swarm(10 * seed, peers=7, layers=8)
        polish = polish_of(problem)
        here = polish._whole(best_start(problem))
        for _ in range(40):
            looks = polish._changed(here)
            costs, supply = polish._costs(looks)
            for row in np.flatnonzero(np.isfinite(costs))[:4]:
                spans = tuple(
                    Span(int(a), int(b)) if b > a else None
                    for a, b in zip(looks.start[row], looks.stop[row], strict=True)
                )
                assert supply[row] >= paper_max_flow(problem, spans) * (1 - 1e-6) - 1e-9 * polish.bound
                here = looks.one(int(row))


def test_cancelling_stops_it_between_two_steps() -> None:
    problem = swarm(2, peers=8, layers=10)
    begun, polish, asked = best_start(problem), polish_of(problem), 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    polish.run(begun, 0.03, 10**12, cancelled)
    assert asked == 21
    assert polish.value >= paper_max_flow(problem, begun)
    at_once = polish_of(problem)
    at_once.run(begun, 0.03, 10**12, lambda: True)
    assert at_once.best == begun


def test_the_same_seed_polishes_the_same() -> None:
    problem = swarm(5, peers=8, layers=10)
    found = []
    for _ in range(2):
        polish = polish_of(problem, seed=7)
        polish.run(best_start(problem), 0.03, 1_000_000, lambda: False)
        found.append((polish.best, polish.value, polish.work))
    assert found[0] == found[1]


def test_a_model_of_one_layer_and_a_peer_without_room_are_no_trouble() -> None:
    problem = swarm(1, peers=3, layers=1)
    none = replace(problem.peers[1], layers_max=(0, 0, 0, 0))
    problem = replace(problem, peers=(problem.peers[0], none, problem.peers[2]))
    polish = polish_of(problem)
    polish.bound *= 2  # so that it is not met at once
    polish.run((Span(0, 1), None, Span(0, 1)), 0.03, 1_000_000, lambda: False)
    assert polish.best == (Span(0, 1), None, Span(0, 1))

"""Where a peer that has no span yet is put: against the rule said plainly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.types import Span
from helixnet.planner.problem import Problem, from_snapshot
from helixnet.planner.starts import longest_from, weakest_window
from tests.planner.small_swarms import random_swarm


def one_peer(layers: int, rooms: tuple[int, int, int, int]) -> Problem:
    problem = from_snapshot(random_swarm(0, 1, layers))
    return replace(problem, peers=(replace(problem.peers[0], layers_max=rooms),))


def plainly(problem: Problem, supply: list[float]) -> Span | None:
    """Of the longest spans from each layer on: most uncovered layers, then least supply on average, then the first."""

    def weakness(window: Span) -> tuple[int, float, int]:
        covered = sum(supply[layer] > 0 for layer in window.layers()) - len(window)
        return covered, sum(supply[layer] for layer in window.layers()) / len(window), window.start

    lengths = [longest_from(problem, 0, start) for start in range(problem.layers)]
    return min((Span(s, s + n) for s, n in enumerate(lengths) if n), key=weakness, default=None)


@given(st.data(), st.integers(1, 30))
def test_a_peer_is_put_where_the_swarm_is_weakest(data: st.DataObject, layers: int) -> None:
    inner = data.draw(st.integers(0, layers))
    ends = st.integers(0, inner)
    rooms = (inner, data.draw(ends), data.draw(ends), data.draw(st.sampled_from([0, layers])))
    rates = st.sampled_from([0.0, 0.1, 0.7, 1.0]) | st.floats(0.0, 100.0)
    supply = data.draw(st.lists(rates, min_size=layers, max_size=layers))
    problem = one_peer(layers, rooms)
    assert weakest_window(problem, np.array(supply), 0) == plainly(problem, supply)

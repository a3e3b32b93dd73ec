"""The best of all placements, found by trying them: an oracle for swarms of a few peers and layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from helixnet.core.types import Span
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.problem import Problem, SpanOrNone, Spans

PLACEMENTS_MAX = 5_000_000
"""Of which the coverage is kept in memory at once."""


@dataclass(frozen=True, slots=True)
class Best:
    """A placement with the largest flow."""

    spans: Spans
    tokens_per_s: float
    flows: int
    """How many were computed."""


def best_of_all(problem: Problem, model: CapacityModel) -> Best:
    """Exact flows in descending order of what no flow exceeds, until that falls below the best.

    A flow is at most the least supply of any layer and, in the exact model, the compute of all peers spread over all
    layers.
    """
    choices = [_choices(problem, index) for index in range(len(problem.peers))]
    count = int(np.prod([len(spans) for spans in choices]))
    assert count <= PLACEMENTS_MAX, "too many placements to try"
    supply = np.zeros((1, problem.layers))
    total = np.zeros(1)
    for index, spans in enumerate(choices):
        given = np.array([_supply(problem, model, index, span) for span in spans])
        supply = (supply[:, None, :] + given[None, :, :]).reshape(-1, problem.layers)
        held = np.array([0.0 if span is None else problem.peers[index].capacity[len(span)] for span in spans])
        total = (total[:, None] + held[None, :]).reshape(-1)
    most = np.minimum(supply.min(axis=1), total / problem.layers)
    best, flows = Best((None,) * len(choices), 0.0, 0), 0
    shape = [len(spans) for spans in choices]
    for number in np.argsort(-most, kind="stable"):
        if most[number] <= best.tokens_per_s * (1 + 1e-9):
            break
        picked = np.unravel_index(number, shape)
        placed: Spans = tuple(spans[int(n)] for spans, n in zip(choices, picked, strict=True))
        flows += 1
        rate = max_flow(problem, placed, model).tokens_per_s
        if rate > best.tokens_per_s:
            best = Best(placed, rate, flows)
    return Best(best.spans, best.tokens_per_s, flows)


def _choices(problem: Problem, index: int) -> list[SpanOrNone]:
    ends = itertools.combinations(range(problem.layers + 1), 2)
    return [Span(*pair) for pair in ends if problem.fits(index, *pair)] or [None]


def _supply(problem: Problem, model: CapacityModel, index: int, span: SpanOrNone) -> list[float]:
    """What the peer could contribute to each layer."""
    if span is None:
        return [0.0] * problem.layers
    peer = problem.peers[index]
    rate = peer.tokens_per_s(len(span)) if model is CapacityModel.PAPER else peer.capacity[len(span)]
    return [rate if span.start <= layer < span.stop else 0.0 for layer in range(problem.layers)]

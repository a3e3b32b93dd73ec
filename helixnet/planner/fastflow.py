"""The max flow under the paper's capacity model, fast enough for a search and for a thousand peers.

Dinic's algorithm of SciPy on 32-bit capacities: each is counted in 2**30ths of a flow that cannot be exceeded, and
rounded down. tests/planner/preflow.py is the reference: networkx, edge by edge as the paper states it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from helixnet.planner.flow import NOTHING, OUTSIDE, Edge, Indices, Routing, edge_arrays, routing
from helixnet.planner.problem import Problem, Spans

UNITS = 2**30
"""Steps that the largest possible flow is counted in."""
UNLIMITED = 2**31 - 1
"""Capacity of what cannot limit the flow."""
UNITS_MIN = UNITS // 64
"""With fewer steps in the flow found, capacities are counted again in finer ones: narrow links, much compute."""
PASSES_MAX = 4
"""Each pass but the last makes steps finer by 2**30 over the number of edges, at most."""


def paper_max_flow(problem: Problem, spans: Spans) -> float:
    """Tokens/s through `spans` when a peer that holds k layers passes T(k), however many layers they run there."""
    solved = _solve(problem, spans)
    return solved.tokens_per_s if solved is not None else 0.0


def paper_routing(problem: Problem, spans: Spans, *, limits: bool) -> Routing:
    """The same with the flow on every edge and, if asked for, the minimum cut: what together bounds the flow."""
    solved = _solve(problem, spans)
    if solved is None:
        return NOTHING
    flows = np.asarray(solved.flow[solved.rows, solved.columns]).ravel() * solved.unit
    used = np.flatnonzero((flows > 0) & ~solved.inside)
    edges = zip(solved.tails[used].tolist(), solved.heads[used].tolist(), strict=True)
    by_edge = dict(zip(edges, flows[used].tolist(), strict=True))
    return routing(problem, spans, by_edge, _cut(solved) if limits else ())


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Each peer is split in two, with its capacity between the halves (arXiv 2406.01566, section 4.3).

    Node i lets flow into peer i, node count + i out of it. Arrays have one entry for each edge of that graph.
    """

    rows: Indices
    columns: Indices
    tails: Indices
    """Peers by index, or OUTSIDE; the same as the head for a peer's own capacity."""
    heads: Indices
    capacity: NDArray[np.float64]
    """Tokens/s; infinite where nothing limits."""
    size: int
    """Nodes; the last two are source and sink."""


@dataclass(frozen=True, slots=True, eq=False)
class _Solved:
    """A max flow in whole steps of `unit` tokens/s."""

    rows: Indices
    columns: Indices
    tails: Indices
    heads: Indices
    inside: NDArray[np.bool_]
    """Which edges stand for a peer's own capacity."""
    whole: csr_array
    flow: csr_array
    steps: int
    unit: float

    @property
    def tokens_per_s(self) -> float:
        return self.steps * self.unit


def _graph(problem: Problem, spans: Spans) -> _Graph:
    count = len(spans)
    tails, heads = edge_arrays(problem, spans)
    held = [(index, len(span)) for index, span in enumerate(spans) if span is not None]
    own = np.array([problem.peers[index].tokens_per_s(layers) for index, layers in held])
    peers = np.array([index for index, _ in held], dtype=np.intp)
    limited = (tails != OUTSIDE) & (heads != OUTSIDE)
    links = np.where(limited, problem.link_tokens_per_s[tails, heads], np.inf)  # clients do not limit
    return _Graph(
        rows=np.concatenate([peers, np.where(tails == OUTSIDE, 2 * count, count + tails)]),
        columns=np.concatenate([count + peers, np.where(heads == OUTSIDE, 2 * count + 1, heads)]),
        tails=np.concatenate([peers, tails]),
        heads=np.concatenate([peers, heads]),
        capacity=np.concatenate([own, links]),
        size=2 * count + 2,
    )


def _solve(problem: Problem, spans: Spans) -> _Solved | None:
    """None if nothing flows."""
    most = _supply_min(problem, spans)
    if most <= 0:
        return None
    graph = _graph(problem, spans)
    for _ in range(PASSES_MAX):
        unit = most / UNITS
        whole = np.minimum(graph.capacity / unit, UNLIMITED).astype(np.int32)
        some = whole > 0
        rows, columns = graph.rows[some], graph.columns[some]
        matrix = csr_array((whole[some], (rows, columns)), shape=(graph.size, graph.size))
        result = maximum_flow(matrix, graph.size - 2, graph.size - 1, method="dinic")
        steps = int(result.flow_value)
        if steps >= UNITS_MIN:
            break
        most = unit * (steps + len(whole))  # rounding down took less than one step from each edge
    if not steps:
        return None
    tails, heads = graph.tails[some], graph.heads[some]
    return _Solved(rows, columns, tails, heads, tails == heads, matrix, result.flow, steps, unit)


def _supply_min(problem: Problem, spans: Spans) -> float:
    """The flow if no link limited it: the least summed T(k) of the holders of any layer."""
    change = np.zeros(problem.layers + 1)
    holders = np.zeros(problem.layers + 1, dtype=np.intp)
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None:
            rate = peer.tokens_per_s(len(span))
            change[span.start] += rate
            change[span.stop] -= rate
            holders[span.start] += 1
            holders[span.stop] -= 1
    if not np.cumsum(holders)[:-1].all():
        return 0.0
    return float(np.cumsum(change)[:-1].min())


def _cut(solved: _Solved) -> tuple[tuple[Edge, float], ...]:
    """The minimum cut nearest the source: which peers and links together bound the flow, with their shares of it."""
    residual = csr_array(solved.whole - solved.flow)
    residual.eliminate_zeros()
    size = residual.shape[0]
    reached = np.zeros(size, dtype=bool)
    reached[breadth_first_order(residual, size - 2, return_predecessors=False)] = True
    crossing = np.flatnonzero(reached[solved.rows] & ~reached[solved.columns])
    shares = np.asarray(solved.whole[solved.rows[crossing], solved.columns[crossing]]).ravel() / solved.steps
    edges = zip(solved.tails[crossing].tolist(), solved.heads[crossing].tolist(), strict=True)
    return tuple(sorted(zip(edges, shares.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])))

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
    return solved.steps * solved.unit if solved is not None else 0.0


def paper_routing(problem: Problem, spans: Spans, *, limits: bool) -> Routing:
    """The same with the flow on every edge and, if asked for, the minimum cut: what together bounds the flow."""
    solved = _solve(problem, spans)
    if solved is None:
        return NOTHING
    flow, count = solved.flow.tocoo(), len(spans)
    used = np.flatnonzero((flow.data > 0) & (flow.row >= count))  # edges between nodes of one peer begin before
    tails = np.where(flow.row[used] == 2 * count, OUTSIDE, flow.row[used] - count)
    heads = np.where(flow.col[used] == 2 * count + 1, OUTSIDE, flow.col[used])
    edges = zip(tails.tolist(), heads.tolist(), strict=True)
    rates = (flow.data[used] * solved.unit).tolist()
    return routing(problem, spans, dict(zip(edges, rates, strict=True)), _cut(solved) if limits else ())


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Each peer is split in two, with its capacity between the halves (arXiv 2406.01566, section 4.3).

    Node i lets flow into peer i, node count + i out of it; the last two are source and sink. Arrays have one entry for
    each edge of that graph, by row and column.
    """

    rows: Indices
    columns: Indices
    tails: Indices
    """Peers by index, or OUTSIDE; the same as the head for a peer's own capacity."""
    heads: Indices
    capacity: NDArray[np.float64]
    """Tokens/s; infinite where nothing limits."""
    starts: NDArray[np.int32]
    """Where each node's edges start."""


@dataclass(frozen=True, slots=True, eq=False)
class _Solved:
    """A max flow in whole steps of `unit` tokens/s."""

    graph: _Graph
    whole: NDArray[np.int32]
    """Capacity of each edge."""
    flow: csr_array
    steps: int
    unit: float


def _graph(problem: Problem, spans: Spans) -> _Graph:
    count = len(spans)
    tails, heads = edge_arrays(problem, spans)
    held = [(index, len(span)) for index, span in enumerate(spans) if span is not None]
    own = np.array([problem.peers[index].tokens_per_s(layers) for index, layers in held])
    peers = np.array([index for index, _ in held], dtype=np.intp)
    limited = (tails != OUTSIDE) & (heads != OUTSIDE)
    links = np.where(limited, problem.link_tokens_per_s[tails, heads], np.inf)  # clients do not limit
    rows = np.concatenate([peers, np.where(tails == OUTSIDE, 2 * count, count + tails)])
    columns = np.concatenate([count + peers, np.where(heads == OUTSIDE, 2 * count + 1, heads)])
    order = np.lexsort((columns, rows))
    return _Graph(
        rows=rows[order],
        columns=columns[order],
        tails=np.concatenate([peers, tails])[order],
        heads=np.concatenate([peers, heads])[order],
        capacity=np.concatenate([own, links])[order],
        starts=np.searchsorted(rows[order], np.arange(2 * count + 3)).astype(np.int32),
    )


def _solve(problem: Problem, spans: Spans) -> _Solved | None:
    """None if nothing flows."""
    most = _supply_min(problem, spans)
    if most <= 0:
        return None
    graph = _graph(problem, spans)
    size = 2 * len(spans) + 2
    for _ in range(PASSES_MAX):
        unit = most / UNITS
        whole = np.minimum(graph.capacity / unit, UNLIMITED).astype(np.int32)
        matrix = csr_array((whole, graph.columns.astype(np.int32), graph.starts), shape=(size, size))
        result = maximum_flow(matrix, size - 2, size - 1, method="dinic")
        steps = int(result.flow_value)
        if steps >= UNITS_MIN:
            break
        most = unit * (steps + len(whole))  # rounding down took less than one step from each edge
    return _Solved(graph, whole, result.flow, steps, unit) if steps else None


def _supply_min(problem: Problem, spans: Spans) -> float:
    """The flow if no link limited it: the least summed T(k) of the holders of any layer."""
    supply = np.zeros(problem.layers)
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None:
            supply[span.start : span.stop] += peer.tokens_per_s(len(span))
    return float(supply.min())


def _cut(solved: _Solved) -> tuple[tuple[Edge, float], ...]:
    """The minimum cut nearest the source: which peers and links together bound the flow, with their shares of it."""
    graph, size = solved.graph, len(solved.graph.starts) - 1
    residual = csr_array((solved.whole, graph.columns, graph.starts), shape=(size, size)) - solved.flow
    residual.eliminate_zeros()
    reached = np.zeros(size, dtype=bool)
    reached[breadth_first_order(residual, size - 2, return_predecessors=False)] = True
    crossing = np.flatnonzero(reached[graph.rows] & ~reached[graph.columns])
    edges = zip(graph.tails[crossing].tolist(), graph.heads[crossing].tolist(), strict=True)
    shares = (solved.whole[crossing] / solved.steps).tolist()
    ranked = sorted(zip(edges, shares, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple((edge, share) for edge, share in ranked if share > 0)

"""The max flow of a placement: how many tokens/s fit through its peers and links, and along which edges.

A request may enter a span at any layer it holds and runs it to the span's end (partial inference), so an edge
i -> j stands for the layers [stop_i, stop_j) at j and exists where start_j <= stop_i < stop_j. Stops grow along
every edge: there are no cycles. Two capacity models:

* exact: a token costs a peer the layers it really runs there. Layers held beyond those cost nothing but memory,
  so overlap is redundancy for free. A linear program, solved with HiGHS.
* paper (arXiv 2406.01566, section 4): a token costs 1/T(k) however many of the k layers it runs. A plain max flow.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from helixnet.planner.problem import Problem, Spans

Edge = tuple[int, int]
Indices = NDArray[np.intp]
OUTSIDE = -1
"""Stands for the clients: the source of flow into entries, the target of flow out of exits."""
FLOW_MIN = 1e-6
"""Share of the whole flow below which an edge is rounding, not a route."""
LATENCY_WEIGHT = 1e-4
"""Flow given up, as a share, to avoid hops as slow as the whole model on the fastest peer: only a tie-break."""
SPREAD_WEIGHT = 1e-3
"""Likewise for peers that run close to their capacity while others could share the work."""
EASY_SHARE = 0.6
"""A peer's capacity up to here is preferred to the rest of any other's."""


class CapacityModel(enum.Enum):
    """What a token costs a peer."""

    EXACT = "exact"
    PAPER = "paper"


@dataclass(frozen=True, slots=True)
class Routing:
    """Flow on every edge that has some, and what it asks of the peers."""

    tokens_per_s: float
    edges: dict[Edge, float]
    """Tokens/s by (source, target), peers by index; sorted."""
    loads: tuple[float, ...]
    """Token-layers/s each peer runs."""
    limits: tuple[tuple[Edge, float], ...] = ()
    """What bounds the flow, most important first: an edge, or (i, i) for peer i's compute; with its share."""


NOTHING = Routing(0.0, {}, ())


def edges_of(problem: Problem, spans: Spans) -> list[Edge]:
    """Every edge that a request may take, clients' ends included."""
    tails, heads = edge_arrays(problem, spans)
    return list(zip(tails.tolist(), heads.tolist(), strict=True))


def edge_arrays(problem: Problem, spans: Spans) -> tuple[Indices, Indices]:
    """The same as sources and targets: first the entries, then the exits, then from peer to peer."""
    held = np.array([index for index, span in enumerate(spans) if span is not None], dtype=np.intp)
    start = np.array([span.start for span in spans if span is not None], dtype=np.intp)
    stop = np.array([span.stop for span in spans if span is not None], dtype=np.intp)
    tails, heads = np.nonzero((start[None, :] <= stop[:, None]) & (stop[:, None] < stop[None, :]))
    first, last = held[start == 0], held[stop == problem.layers]
    return (
        np.concatenate([np.full_like(first, OUTSIDE), last, held[tails]]),
        np.concatenate([first, np.full_like(last, OUTSIDE), held[heads]]),
    )


def max_flow(problem: Problem, spans: Spans, model: CapacityModel, *, final: bool = False) -> Routing:
    """The largest flow through `spans`, of equally large ones that with the quickest hops.

    `final` also spreads the flow over peers that could share it, and says what limits it; that takes longer.
    """
    if model is CapacityModel.PAPER and final:
        from helixnet.planner.fastflow import paper_routing

        return paper_routing(problem, spans, limits=True)
    edges = edges_of(problem, spans)
    if not any(source == OUTSIDE for source, _ in edges) or not any(target == OUTSIDE for _, target in edges):
        return NOTHING
    return _Program(problem, spans, edges, model).solve(final)


class _Program:
    """The linear program of one placement, scaled so that flows are about 1.

    Columns: a flow for each edge, then (final only) two for each peer's use beyond EASY_SHARE of its capacity.
    Rows: conservation at each peer, then capacity of each peer.
    """

    def __init__(self, problem: Problem, spans: Spans, edges: list[Edge], model: CapacityModel) -> None:
        self.problem, self.spans, self.edges, self.model = problem, spans, edges, model
        self.unit = max(peer.capacity[1] for peer in problem.peers) / problem.layers
        token_s = min(peer.decode_s for peer in problem.peers) * problem.layers
        self.hop_weight = LATENCY_WEIGHT / token_s
        self.hop_weight_max = 0.1 / len(problem.peers)  # a path of any length must stay worth its flow
        self.costs: list[float] = []
        self.upper: list[float] = []
        self.starts: list[int] = []
        self.rows: list[int] = []
        self.values: list[float] = []
        self.capacity = [self._capacity(index) for index in range(len(spans))]

    def solve(self, final: bool) -> Routing:
        """Build, solve, read."""
        for edge in self.edges:
            self._add_edge(edge)
        if final:
            self._add_spread()
        lp = self._lp(final)
        solver = _solver()
        solver.passModel(lp)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"HiGHS could not solve a flow: {solver.modelStatusToString(solver.getModelStatus())}")
        solution = solver.getSolution()
        flows = np.asarray(solution.col_value[: len(self.edges)]) * self.unit
        limits = self._limits(np.asarray(solution.row_dual), np.asarray(solution.col_dual)) if final else ()
        return routing(self.problem, self.spans, dict(zip(self.edges, flows.tolist(), strict=True)), limits)

    def _capacity(self, index: int) -> float:
        span = self.spans[index]
        if span is None:
            return 0.0
        return self.problem.peers[index].capacity[len(span)] / self.unit

    def _add_edge(self, edge: Edge) -> None:
        source, target = edge
        count = len(self.spans)
        self.starts.append(len(self.rows))
        if source == OUTSIDE:
            self.costs.append(1.0)
            self.upper.append(highspy.kHighsInf)
        elif target == OUTSIDE:
            self.costs.append(0.0)
            self.upper.append(highspy.kHighsInf)
        else:
            hop_s = float(self.problem.link_s[edge])
            self.costs.append(-min(self.hop_weight * hop_s, self.hop_weight_max))
            self.upper.append(float(self.problem.link_tokens_per_s[edge]) / self.unit)
        if source != OUTSIDE:
            self._put(source, -1.0)
        if target != OUTSIDE:
            self._put(target, 1.0)
            self._put(count + target, self._layers_charged(edge))

    def _layers_charged(self, edge: Edge) -> float:
        span = self.spans[edge[1]]
        assert span is not None, "edges lead to peers with spans"
        if self.model is CapacityModel.PAPER:
            return float(len(span))
        return float(layers_run(self.spans, edge))

    def _add_spread(self) -> None:
        count = len(self.spans)
        for step in (1.0, 2.0):
            for index, capacity in enumerate(self.capacity):
                room = capacity * (1 - EASY_SHARE) / 2
                self.starts.append(len(self.rows))
                # Penalties of all peers together stay below SPREAD_WEIGHT of a flow of about 1.
                self.costs.append(-SPREAD_WEIGHT * step / (2 * count * max(capacity, 1e-9)))
                self.upper.append(room)
                self._put(count + index, -1.0)

    def _put(self, row: int, value: float) -> None:
        self.rows.append(row)
        self.values.append(value)

    def _lp(self, final: bool) -> highspy.HighsLp:
        count, share = len(self.spans), EASY_SHARE if final else 1.0
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.costs), 2 * count
        lp.col_cost_, lp.col_upper_ = np.array(self.costs), np.array(self.upper)
        lp.col_lower_ = np.zeros(len(self.costs))
        lp.row_lower_ = np.array([0.0] * count + [-highspy.kHighsInf] * count)
        lp.row_upper_ = np.array([0.0] * count + [capacity * share for capacity in self.capacity])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.array([*self.starts, len(self.rows)], dtype=np.int32)
        lp.a_matrix_.index_ = np.array(self.rows, dtype=np.int32)
        lp.a_matrix_.value_ = np.array(self.values)
        lp.sense_ = highspy.ObjSense.kMaximize
        return lp

    def _limits(self, row_dual: np.ndarray, col_dual: np.ndarray) -> tuple[tuple[Edge, float], ...]:
        """By how much the flow depends on each capacity: shadow price times capacity."""
        count = len(self.spans)
        shares: list[tuple[Edge, float]] = []
        for index, capacity in enumerate(self.capacity):
            shares.append(((index, index), abs(float(row_dual[count + index])) * capacity))
        for column, edge in enumerate(self.edges):
            if OUTSIDE not in edge and self.upper[column] < highspy.kHighsInf:
                shares.append((edge, max(0.0, float(col_dual[column])) * self.upper[column]))
        total = sum(share for _, share in shares)
        ranked = sorted(shares, key=lambda pair: (-pair[1], pair[0]))
        return tuple((edge, share / total) for edge, share in ranked if total > 0 and share > 0.01 * total)


def layers_run(spans: Spans, edge: Edge) -> int:
    """How many layers the target of an edge runs for what comes over it; 0 for the clients."""
    source, target = edge
    if target == OUTSIDE:
        return 0
    before, span = (None if source == OUTSIDE else spans[source]), spans[target]
    assert span is not None, "edges lead to peers with spans"
    return span.stop - (before.stop if before is not None else 0)


def routing(
    problem: Problem, spans: Spans, flows: dict[Edge, float], limits: tuple[tuple[Edge, float], ...] = ()
) -> Routing:
    """A routing from raw flows by edge: rounding is dropped, the rest sorted and added up."""
    total = sum(rate for (source, _), rate in sorted(flows.items()) if source == OUTSIDE)
    edges = {edge: rate for edge, rate in sorted(flows.items()) if rate > FLOW_MIN * total}
    loads = [0.0] * len(problem.peers)
    for edge, rate in edges.items():
        if edge[1] != OUTSIDE:
            loads[edge[1]] += rate * layers_run(spans, edge)
    return Routing(total, edges, tuple(loads), limits)


_SOLVERS: list[highspy.Highs] = []


def _solver() -> highspy.Highs:
    """The solver of this process: making one costs more than a small flow."""
    if not _SOLVERS:
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (("output_flag", False), ("threads", 1), ("presolve", "off"), ("solver", "simplex")):
            solver.setOptionValue(option, value)
        _SOLVERS.append(solver)
    return _SOLVERS[0]

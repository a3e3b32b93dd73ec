"""The max flow of a placement: how many tokens/s fit through its peers and links, and along which edges.

A request may enter a span at any layer it holds and runs it to the span's end (partial inference), so an edge
i -> j stands for the layers [stop_i, stop_j) at j and exists where start_j <= stop_i < stop_j. Stops grow along
every edge: there are no cycles. Two capacity models:

* exact: a token costs a peer the layers it really runs there. Layers held beyond those cost nothing but memory,
  so overlap is redundancy for free. A linear program, solved with HiGHS.
* paper (arXiv 2406.01566, section 4): a token costs 1/T(k) however many of the k layers it runs. A plain max flow,
  in fastflow.py.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from helixnet.planner.prices import coarse, known_prices, remember, spread_out
from helixnet.planner.problem import Problem, Spans

Edge = tuple[int, int]
Indices = NDArray[np.intp]
Floats = NDArray[np.float64]
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
EDGES_AT_ONCE = 6000
"""With more edges the exact model's program starts from prices (prices.py) and with the edges that may pay at those,
and takes in others that would improve the flow: a fifth of the time with 64 000 edges."""
EDGES_FIRST, EDGES_MORE = 6, 3
"""Where there are no prices, how many it starts with and how many it takes in at once, from and to each peer."""
NEAR = 3e-3
"""An edge may pay if it is dearer by less than this share of a token's whole way."""
LEFT_MAX = 1e-3
"""Share of the flow that edges left out may be worth together."""
GAIN_MIN = 1e-4
"""What a unit of flow over an edge must gain for it to be taken in: hops matter less than this."""
ROUNDS_MAX = 50
"""In practice it takes about five."""


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


def edge_count(problem: Problem, spans: Spans) -> int:
    """How many edges that are, without making them."""
    stops = [0] * (problem.layers + 1)
    for span in spans:
        if span is not None:
            stops[span.stop] += 1
    before = [0, *itertools.accumulate(stops)]  # how many spans stop before a layer
    leading = sum(before[span.stop] - before[span.start] for span in spans if span is not None)
    return leading + sum(span.start == 0 for span in spans if span is not None) + stops[problem.layers]


def max_flow(problem: Problem, spans: Spans, model: CapacityModel, *, final: bool = False) -> Routing:
    """The largest flow through `spans`.

    In the exact model, of equally large ones that with the quickest hops. `final` also spreads that flow over peers
    that could share it, and says in either model what limits it; that takes longer.
    """
    if model is CapacityModel.PAPER:
        from helixnet.planner.fastflow import paper_routing

        return paper_routing(problem, spans, limits=final)
    program = _Program(problem, spans, final)
    if not (program.tails == OUTSIDE).any() or not (program.heads == OUTSIDE).any():
        return NOTHING
    return program.solve()


class _Program:
    """The linear program of one placement in the exact model, scaled so that flows are about 1.

    Columns: a flow for each edge, then (final only) two for each peer's use beyond EASY_SHARE of its capacity; each
    is in three rows at most, which the arrays [column, 3] hold. Rows: conservation at each peer, then its capacity.
    """

    def __init__(self, problem: Problem, spans: Spans, final: bool) -> None:
        self.problem, self.spans, self.final = problem, spans, final
        self.unit = max(peer.capacity[1] for peer in problem.peers) / problem.layers
        held = zip(problem.peers, spans, strict=True)
        self.capacity = np.array([0.0 if span is None else peer.capacity[len(span)] for peer, span in held]) / self.unit
        self.tails, self.heads = edge_arrays(problem, spans)
        self.inner = (self.tails != OUTSIDE) & (self.heads != OUTSIDE)
        stops = np.array([0 if span is None else span.stop for span in spans])
        before = np.where(self.tails == OUTSIDE, 0, stops[self.tails])
        count, leads = len(spans), self.heads != OUTSIDE
        self.rows = np.stack([self.tails, self.heads, count + self.heads], axis=1)
        self.values = np.ones(self.rows.shape)
        self.values[:, 0], self.values[:, 2] = -1.0, stops[self.heads] - before
        self.filled = np.stack([self.tails != OUTSIDE, leads, leads], axis=1)
        self.upper = np.where(self.inner, problem.link_tokens_per_s[self.tails, self.heads] / self.unit, np.inf)
        self.costs = np.where(self.tails == OUTSIDE, 1.0, np.where(self.inner, -self._hops(), 0.0))
        if final:
            self._add_spread()
        self.large = len(self.tails) > EDGES_AT_ONCE
        self.prices: Floats | None = None
        if self.large:
            self._add_slack()
            self.prices = self._guessed()
        self.worth = self.costs - self._charged(self.prices) if self.prices is not None else self.costs
        """What each column is worth at the prices."""

    def solve(self) -> Routing:
        """Build, solve, read."""
        columns = self._first_columns()
        solver = _solver()
        solver.passModel(self._lp(columns))
        for _ in range(ROUNDS_MAX):
            solver.run()
            status = solver.getModelStatus()
            if status != highspy.HighsModelStatus.kOptimal:
                raise RuntimeError(f"HiGHS could not solve a flow: {solver.modelStatusToString(status)}")
            solution = solver.getSolution()
            duals = np.asarray(solution.row_dual)
            missing = self._missing(columns, duals, self._entering(columns, np.asarray(solution.col_value)))
            if not len(missing):
                break
            starts, rows, values = self._entries(missing)
            lower, upper = np.zeros(len(missing)), self.upper[missing]
            solver.addCols(len(missing), self.worth[missing], lower, upper, len(rows), starts[:-1], rows, values)
            columns = np.concatenate([columns, missing])
        if self.prices is not None:
            duals = duals + self.prices
        if self.large:
            remember(self.problem, self.spans, duals)
        self.duals = duals
        edges = len(self.tails)
        flows = np.zeros(len(self.costs))
        flows[columns] = solution.col_value
        used = np.flatnonzero(flows[:edges] > 0)
        named = zip(self.tails[used].tolist(), self.heads[used].tolist(), strict=True)
        by_edge = dict(zip(named, (flows[used] * self.unit).tolist(), strict=True))
        limits = self._limits(columns, duals, np.asarray(solution.col_dual)) if self.final else ()
        return routing(self.problem, self.spans, by_edge, limits)

    def _hops(self) -> Floats:
        """What each edge's latency costs."""
        token_s = min(peer.decode_s for peer in self.problem.peers) * self.problem.layers
        most = 0.1 / len(self.spans)  # a path of any length must stay worth its flow
        return np.minimum(LATENCY_WEIGHT / token_s * self.problem.link_s[self.tails, self.heads], most)

    def _add_spread(self) -> None:
        count = len(self.spans)
        room = self.capacity * (1 - EASY_SHARE) / 2
        # Penalties of all peers together stay below SPREAD_WEIGHT of a flow of about 1.
        penalty = SPREAD_WEIGHT / (2 * count * np.maximum(self.capacity, 1e-9))
        self.costs = np.concatenate([self.costs, -penalty, -2 * penalty])
        self.upper = np.concatenate([self.upper, room, room])
        rows, values = np.zeros((2 * count, 3), dtype=np.intp), np.zeros((2 * count, 3))
        rows[:, 0], values[:, 0] = count + np.tile(np.arange(count), 2), -1.0
        self.rows, self.values = np.concatenate([self.rows, rows]), np.concatenate([self.values, values])
        self.filled = np.concatenate([self.filled, values != 0])

    def _add_slack(self) -> None:
        """Columns for what peers leave idle, so that their work has prices too, and bounds for every edge."""
        count, edges = len(self.spans), len(self.tails)
        runs = np.where(self.heads == OUTSIDE, 1.0, self.values[:edges, 2])
        busy = self.capacity[np.where(self.heads == OUTSIDE, self.tails, self.heads)] / runs
        self.upper[:edges] = np.minimum(self.upper[:edges], busy)
        rows, values = np.zeros((count, 3), dtype=np.intp), np.zeros((count, 3))
        rows[:, 0], values[:, 0] = count + np.arange(count), 1.0
        self.costs = np.concatenate([self.costs, np.zeros(count)])
        self.upper = np.concatenate([self.upper, self.capacity])
        self.rows, self.values = np.concatenate([self.rows, rows]), np.concatenate([self.values, values])
        self.filled = np.concatenate([self.filled, values != 0])

    def _guessed(self) -> Floats | None:
        """Prices near the right ones, if there is a way to know."""
        known = known_prices(self.problem, self.spans)
        if known is not None:
            return known
        smaller = coarse(self.problem, self.spans)
        if smaller is None:
            return None
        whole, spans, places = smaller
        program = _Program(whole, spans, self.final)
        program.solve()
        return spread_out(program.duals, places)

    def _entering(self, columns: Indices, values: Floats) -> float:
        """The whole flow of a solution, in units."""
        return float(values[np.isin(columns, np.flatnonzero(self.tails == OUTSIDE))].sum())

    def _charged(self, prices: Floats) -> Floats:
        """What each column's entries cost at these prices."""
        charged: Floats = np.where(self.filled, self.values * prices[self.rows], 0.0).sum(axis=1)
        return charged

    def _first_columns(self) -> Indices:
        """All, if they are few; else all but most edges between peers: those that may pay stay.

        Without prices these are the best to and from each peer.
        """
        every, edges = np.arange(len(self.costs)), len(self.tails)
        if not self.large:
            return every
        between = every[:edges][self.inner]
        if self.prices is not None:
            return np.setdiff1d(every, between[self.worth[between] < -NEAR], assume_unique=True)
        heads = self.heads[between]
        worth = np.minimum(self.upper[between], self.capacity[heads] / self.values[between, 2])
        kept = np.ones(len(self.costs), dtype=bool)
        kept[between] = False
        kept[self._best(between, worth, EDGES_FIRST)] = True
        return every[kept]

    def _missing(self, columns: Indices, duals: Floats, flow: float) -> Indices:
        """Edges left out that would improve the flow at these prices; without a guess only so many at each peer."""
        edges = len(self.tails)
        if len(columns) == len(self.costs):
            return columns[:0]
        gains = (self.worth - self._charged(duals))[:edges]
        gains[columns[columns < edges]] = 0.0
        better = np.flatnonzero(gains > GAIN_MIN)
        if self.prices is None:
            return self._best(better, gains[better] * np.minimum(self.upper[better], 1.0), EDGES_MORE)
        left = float((gains[better] * self.upper[better]).sum())
        return better if left > LEFT_MAX * flow else better[:0]

    def _best(self, edges: Indices, worth: Floats, most: int) -> Indices:
        """Of these edges, the `most` worthiest from each peer and those to each peer, sorted."""
        best = []
        for ends in (self.tails[edges], self.heads[edges]):
            order = np.lexsort((-worth, ends))
            ranked = ends[order]
            best.append(edges[order[np.arange(len(ranked)) - np.searchsorted(ranked, ranked) < most]])
        return np.union1d(*best)

    def _entries(self, columns: Indices) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
        """Where each column's entries start, their rows and values."""
        filled = self.filled[columns]
        starts = np.concatenate([[0], np.cumsum(filled.sum(axis=1))])
        rows, values = self.rows[columns][filled], self.values[columns][filled]
        return starts.astype(np.int32), rows.astype(np.int32), values

    def _lp(self, columns: Indices) -> highspy.HighsLp:
        count, share = len(self.spans), EASY_SHARE if self.final else 1.0
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(columns), 2 * count
        lp.col_cost_, lp.col_upper_ = self.worth[columns], self.upper[columns]
        lp.col_lower_ = np.zeros(len(columns))
        most = self.capacity * share
        lp.row_lower_ = np.concatenate([np.zeros(count), most if self.large else np.full(count, -highspy.kHighsInf)])
        lp.row_upper_ = np.concatenate([np.zeros(count), most])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = self._entries(columns)
        lp.sense_ = highspy.ObjSense.kMaximize
        return lp

    def _limits(self, columns: Indices, row_dual: Floats, col_dual: Floats) -> tuple[tuple[Edge, float], ...]:
        """By how much the flow depends on each capacity: shadow price times capacity."""
        edges, count = len(self.tails), len(self.spans)
        shares = [((i, i), share) for i, share in enumerate((np.abs(row_dual[count:]) * self.capacity).tolist())]
        finite = np.flatnonzero((columns < edges) & np.isfinite(self.upper[columns]))
        linked = columns[finite]
        links = np.maximum(0.0, col_dual[finite]) * self.upper[linked]
        named = zip(self.tails[linked].tolist(), self.heads[linked].tolist(), strict=True)
        shares += zip(named, links.tolist(), strict=True)
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

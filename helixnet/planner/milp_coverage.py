"""The placement problem where links do not bind, as a mixed-integer program with few symmetries, for HiGHS.

In the paper's capacity model the max flow is then the least supply of any layer: the summed T(k) of its holders.
Peers with the same curve and the same room are one kind, of which only the number in each span counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from scipy.sparse import coo_array

from helixnet.core.types import Span
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.problem import PlanPeer, Problem, SpanOrNone, Spans

BETTER = 1e-5
"""By how much, as a share, a placement must exceed the incumbent to be looked for."""
SLACK = 1e-6
"""The solver's own tolerances, as a share, which what it proves may be wrong by."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the solver found and proved."""

    spans: Spans | None
    """The best placement: the incumbent, if nothing better was found; None if there was none either."""
    tokens_per_s: float
    """Its flow, if no link limits it."""
    bound: float
    """What no placement exceeds in the paper's model, links or not."""
    proven: bool
    """Whether the bound is met, but for BETTER."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """So many peers of a kind may hold a span."""

    kind: int
    span: Span
    rate: float
    """T(k), at most the bound; scaled."""


def solve_coverage(
    problem: Problem, nodes_max: int, seconds_max: float = np.inf, incumbent: Spans | None = None
) -> Coverage:
    """The placement whose thinnest layer has the most supply; only what exceeds `incumbent` is looked for.

    Limited by nodes, not seconds, where plans must be reproducible.
    """
    bound = coverage_bound(problem)
    known = least_supply(problem, incumbent) if incumbent is not None else 0.0
    if known >= bound * (1 - BETTER):
        return Coverage(incumbent, known, max(bound, known), proven=True)
    kinds = _kinds(problem)
    choices = _choices(problem, kinds, bound)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": BETTER, "mip_abs_gap": 0.0}
    for option, value in {**options, "time_limit": seconds_max, "mip_max_nodes": nodes_max}.items():
        solver.setOptionValue(option, value)
    solver.passModel(_program(problem.layers, kinds, choices, known * (1 + BETTER) / bound))
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        return Coverage(incumbent, known, known * (1 + BETTER + SLACK), proven=True)  # nothing is better
    proven = min(bound, float(info.mip_dual_bound) * bound * (1 + SLACK))
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Coverage(incumbent, known, proven, proven=False)
    spans = _spans(problem, kinds, choices, solver.getSolution().col_value)
    found = least_supply(problem, spans)
    return Coverage(spans, found, max(proven, found), status == highspy.HighsModelStatus.kOptimal)


def least_supply(problem: Problem, spans: Spans) -> float:
    """The flow of a placement in the paper's model, if no link limits it."""
    supply = np.zeros(problem.layers)
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None:
            supply[span.start : span.stop] += peer.tokens_per_s(len(span))
    return float(supply.min())


def _kinds(problem: Problem) -> list[list[int]]:
    """Peers with room, grouped by curve and room."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, peer in enumerate(problem.peers):
        if any(peer.layers_max):
            kinds.setdefault(_curve(peer), []).append(index)
    return list(kinds.values())


def _curve(peer: PlanPeer) -> tuple[object, ...]:
    return peer.layers_max, peer.capacity[: max(peer.layers_max) + 1]


def _choices(problem: Problem, kinds: Sequence[Sequence[int]], bound: float) -> list[_Choice]:
    choices: list[_Choice] = []
    for kind, members in enumerate(kinds):
        peer = problem.peers[members[0]]
        for k in range(1, max(peer.layers_max) + 1):
            rate = min(1.0, peer.tokens_per_s(k) / bound)
            starts = (s for s in range(problem.layers - k + 1) if problem.fits(members[0], s, s + k))
            choices += (_Choice(kind, Span(start, start + k), rate) for start in starts)
    return choices


def _program(layers: int, kinds: Sequence[Sequence[int]], choices: Sequence[_Choice], least: float) -> highspy.HighsLp:
    """Columns: the flow, then how many peers take each choice. Rows: supply of each layer, peers of each kind."""
    covered = [(layer, column) for column, choice in enumerate(choices, 1) for layer in choice.span.layers()]
    values = [choices[column - 1].rate for _, column in covered] + [-1.0] * layers + [1.0] * len(choices)
    rows = [layer for layer, _ in covered] + [*range(layers)] + [layers + choice.kind for choice in choices]
    columns = [column for _, column in covered] + [0] * layers + [*range(1, len(choices) + 1)]
    counts = np.array([float(len(members)) for members in kinds])
    matrix = coo_array((values, (rows, columns)), shape=(layers + len(kinds), 1 + len(choices))).tocsr()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = 1 + len(choices), layers + len(kinds)
    lp.col_cost_ = np.eye(1, 1 + len(choices))[0]
    lp.col_lower_ = np.concatenate([[least], np.zeros(len(choices))])
    lp.col_upper_ = np.concatenate([[1.0], counts[[choice.kind for choice in choices]]])
    lp.row_lower_ = np.concatenate([np.zeros(layers), np.full(len(kinds), -np.inf)])
    lp.row_upper_ = np.concatenate([np.full(layers, np.inf), counts])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    lp.integrality_ = [highspy.HighsVarType.kContinuous] + [highspy.HighsVarType.kInteger] * len(choices)
    lp.sense_ = highspy.ObjSense.kMaximize
    return lp


def _spans(
    problem: Problem, kinds: Sequence[Sequence[int]], choices: Sequence[_Choice], values: Sequence[float]
) -> Spans:
    placed: list[SpanOrNone] = [None] * len(problem.peers)
    left = [list(members) for members in kinds]
    for choice, value in zip(choices, values[1:], strict=True):
        for _ in range(round(value)):
            placed[left[choice.kind].pop(0)] = choice.span
    return tuple(placed)

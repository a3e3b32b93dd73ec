"""Throughput against latency: placements of which no other serves more tokens/s at no more seconds per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from helixnet.planner.objective import THROUGHPUT, Objective
from helixnet.planner.predict import Forecast
from helixnet.planner.problem import Problem, Spans
from helixnet.planner.served import served

LATENCY_WEIGHTS = (0.0, 0.2, 1.0, 3.0)
"""From throughput alone to the preset `latency`."""


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A placement, the weight of latency it was solved for, and what it serves."""

    weight: float
    spans: Spans
    outlook: Forecast


def front(
    solver: Callable[[Objective], Spans],
    problem: Problem,
    weights: Sequence[float] = LATENCY_WEIGHTS,
    base: Objective = THROUGHPUT,
) -> tuple[FrontPoint, ...]:
    """What `solver` finds for `base` at each weight of latency, without what others beat; quickest last."""
    points = []
    for weight in weights:
        spans = solver(replace(base, latency=weight))
        _, outlook = served(problem, spans, base.model)
        points.append(FrontPoint(weight, spans, outlook))
    return pareto_optimal(points)


def pareto_optimal(candidates: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Those that serve and of which no other is as good in both and better in one; most tokens/s first.

    Of equally good ones the first is kept.
    """
    serving = [point for point in candidates if point.outlook.tokens_per_s > 0]
    kept: list[FrontPoint] = []
    for point in sorted(serving, key=lambda point: (-point.outlook.tokens_per_s, point.outlook.tpot_s)):
        if not kept or point.outlook.tpot_s < kept[-1].outlook.tpot_s:
            kept.append(point)
    return tuple(kept)

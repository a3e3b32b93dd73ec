"""`helixnet plan --compare`: the plan beside what other systems would do, and throughput against time per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from helixnet.core.types import Span
from helixnet.daemon.wording import rate, seconds
from helixnet.planner.baselines import BASELINES
from helixnet.planner.case import Case
from helixnet.planner.compare import Comparison, compare, table
from helixnet.planner.objective import THROUGHPUT, Objective
from helixnet.planner.pareto import LATENCY_WEIGHTS, FrontPoint, front, pareto_optimal
from helixnet.planner.problem import Problem, Spans
from helixnet.planner.regions import groups_of
from helixnet.planner.served import served

THIS_PLAN = "this plan"
FRONT_SOLVES = len(LATENCY_WEIGHTS)
"""Further solves that a comparison takes."""


@dataclass(frozen=True, slots=True)
class FrontLine:
    """One placement of the front."""

    weight: float
    """Of latency, that it was solved for."""
    placement: dict[str, Span]
    row: Comparison


@dataclass(frozen=True, slots=True)
class PlanComparison:
    """All rows, the plan first; and those of the front, most tokens/s first."""

    rows: tuple[Comparison, ...]
    front: tuple[FrontLine, ...]

    def as_json(self) -> dict[str, object]:
        """What `--json` adds."""
        return {
            "comparison": [asdict(row) for row in self.rows],
            "front": [
                {
                    "weight": line.weight,
                    "placement": {peer: [span.start, span.stop] for peer, span in line.placement.items()},
                    **asdict(line.row),
                }
                for line in self.front
            ],
        }

    def lines(self) -> str:
        """The tables as people read them."""
        points = "; ".join(
            f"{line.row.name} ({rate(line.row.tokens_per_s)}, {seconds(line.row.tpot_s)})" for line in self.front
        )
        return (
            f"{table(self.rows)}\n"
            "all routed by the same max flow, whatever their systems do; a dash: serves nothing\n"
            f"Pareto front of tokens/s against time per token: {points or 'nothing serves'}"
        )


def comparison(
    case: Case, spans: Spans, objective: Objective, stored: Mapping[str, Spans], solver: Callable[[Objective], Spans]
) -> PlanComparison:
    """The plan `spans`, the baselines that find a placement, those stored, and what `solver` finds for the front."""
    problem = case.problem
    baselines = {name: rule(problem) for name, rule in BASELINES.items()}
    placements: dict[str, Spans | None] = {THIS_PLAN: spans}
    placements |= {name: placed for name, placed in baselines.items() if placed is not None}
    placements |= {f"stored {name}": placed for name, placed in stored.items()}
    # The front is of what will be served, in whatever capacity model the plan is for.
    found = front(solver, problem, base=replace(THROUGHPUT, model=objective.model))
    points = {f"latency weight {point.weight:g}": point for point in found if point.spans != spans}
    placements |= {name: point.spans for name, point in points.items()}
    rows = compare(problem, placements, objective.model, _regions(case))
    _, outlook = served(problem, spans, objective.model)
    points = {THIS_PLAN: FrontPoint(objective.latency, spans, outlook)} | points
    by_name = {row.name: row for row in rows}
    kept = pareto_optimal(points.values())
    lines = [
        FrontLine(point.weight, _placement(problem, point.spans), by_name[name])
        for best in kept
        for name, point in points.items()
        if point is best
    ]
    return PlanComparison(rows, tuple(lines))


def _placement(problem: Problem, spans: Spans) -> dict[str, Span]:
    return {peer.peer: span for peer, span in zip(problem.peers, spans, strict=True) if span is not None}


def _regions(case: Case) -> Sequence[object] | None:
    """Where each peer stands: as given, else by groups in the links; None where neither tells any apart."""
    named = [machine.region for machine in case.machines]
    regions: Sequence[object] = named if len(set(named)) > 1 else groups_of(case.problem)
    return regions if len(set(regions)) > 1 else None

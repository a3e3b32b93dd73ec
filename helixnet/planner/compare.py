"""Placements of one problem side by side: what flows, what is served, how fast, over how many hops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helixnet.planner.flow import OUTSIDE, CapacityModel, Routing
from helixnet.planner.problem import Problem, Spans
from helixnet.planner.served import served


@dataclass(frozen=True, slots=True)
class Comparison:
    """One placement's figures; all zero if it cannot serve."""

    name: str
    flow: float
    """Largest flow, tokens/s in the problem's own unit (`Problem.flow_per_token`)."""
    tokens_per_s: float
    """Decoded tokens/s that are predicted when saturated."""
    ttft_s: float
    tpot_s: float
    hops: float
    """Of an average token; as many as the stages it passes."""
    crossings: float | None
    """Those of them that take an activation into another region; None where regions are not known."""
    sessions: float
    """Requests in flight that fit the KV room."""


def compare(
    problem: Problem,
    placements: Mapping[str, Spans | None],
    model: CapacityModel = CapacityModel.EXACT,
    regions: Sequence[object] | None = None,
) -> tuple[Comparison, ...]:
    """The figures of each placement, in the order given, all routed by the same max flow.

    None stands for a method that found no placement. `regions` says where each peer of the problem stands.
    """
    return tuple(_compared(problem, name, spans, model, regions) for name, spans in placements.items())


def table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table, aligned so that a terminal shows it well; a dash where nothing is served."""
    with_regions = any(row.crossings is not None for row in comparisons)
    header = ["placement", "flow", "tokens/s", "TTFT s", "TPOT ms", "hops", "crossings", "requests"]
    rows = [_cells(row) for row in comparisons]
    lines = [header, *rows]
    if not with_regions:
        lines = [[*cells[:6], *cells[7:]] for cells in lines]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(lines[0]))]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    aligned = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [aligned[0], rule, *aligned[1:]])


def _compared(
    problem: Problem, name: str, spans: Spans | None, model: CapacityModel, regions: Sequence[object] | None
) -> Comparison:
    crossings = 0.0 if regions is not None else None
    if spans is None:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, crossings, 0.0)
    routing, outlook = served(problem, spans, model)
    return Comparison(
        name=name,
        flow=routing.tokens_per_s,
        tokens_per_s=outlook.tokens_per_s,
        ttft_s=outlook.ttft_s,
        tpot_s=outlook.tpot_s,
        hops=outlook.hops,
        crossings=_crossings(routing, regions) if regions is not None else None,
        sessions=outlook.sessions,
    )


def _crossings(routing: Routing, regions: Sequence[object]) -> float:
    """Hops of an average token between regions, without the way back to the entry: only a token goes there."""
    crossing = sum(
        rate
        for (source, target), rate in routing.edges.items()
        if OUTSIDE not in (source, target) and regions[source] != regions[target]
    )
    return crossing / routing.tokens_per_s if routing.tokens_per_s > 0 else 0.0


def _cells(row: Comparison) -> list[str]:
    if row.flow <= 0:
        return [row.name, *["-"] * 7]
    return [
        row.name,
        f"{row.flow:.1f}",
        f"{row.tokens_per_s:.1f}",
        f"{row.ttft_s:.2f}",
        f"{row.tpot_s * 1000:.0f}",
        f"{row.hops:.1f}",
        f"{row.crossings:.1f}" if row.crossings is not None else "-",
        f"{row.sessions:.0f}",
    ]

"""The placements that the authors of the paper stored beside their instances."""

from __future__ import annotations

import msgspec

from helixnet.core.errors import UsageError
from helixnet.core.types import Span
from helixnet.planner.artifact_file import PlacementData

FIRST_MACHINE = 2
"""The number of the first machine: 0 and 1 are the coordinator's."""
NODE = "compute_node_"


def stored_machines(
    row: PlacementData, nodes: tuple[str, ...], layers: int, where: str
) -> dict[int, tuple[Span, float]] | None:
    """The spans of one stored placement by number of the cluster's machines; None if there are not so many.

    With each the flow through it (tokens/s) in the authors' own simulation, 0 where none is stored.

    Raises:
        UsageError: an interval is malformed or outside the model.
    """
    placed: list[tuple[int, str, tuple[Span, float]]] = []
    for name, interval in row.intervals.items():
        try:
            kind, start, stop = msgspec.convert(interval[:3], tuple[str, int, int])
            flow = msgspec.convert(interval[3], float | None) or 0.0 if len(interval) > 3 else 0.0
            span = Span(start, stop)
        except (msgspec.ValidationError, ValueError) as error:
            raise UsageError(f"{where}: the interval of {name} is bad: {error}.") from None
        number = name.removeprefix(NODE)
        if not (name.startswith(NODE) and number.isascii() and number.isdigit() and len(number) <= 9):
            raise UsageError(f"{where}: {name!r} is not {NODE} and a number.")
        if span.stop > layers:
            raise UsageError(f"{where}: {name} holds {span}, but the model has {layers} layers.")
        placed.append((int(number) - FIRST_MACHINE, kind, (span, flow)))
    placed.sort(key=lambda each: each[0])
    own_numbers = not all(0 <= n < len(nodes) and nodes[n] == kind for n, kind, _ in placed)
    left = {each: [n for n, other in enumerate(nodes) if other == each] for each in nodes}
    found: dict[int, tuple[Span, float]] = {}
    for index, kind, held in placed:
        if own_numbers and not left.get(kind):
            return None
        found[left[kind].pop(0) if own_numbers else index] = held
    return found

"""The sections of the evaluation: which cells each needs, and what it was to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helixnet.sim.evaluation import calibration, like_for_like, ours, predictions, shares
from helixnet.sim.evaluation.cells import Cell, Ended, Target


def no_targets(ended: Sequence[Ended]) -> tuple[Target, ...]:
    """For comparison alone."""
    return ()


@dataclass(frozen=True, slots=True)
class Section:
    """One chapter of the document."""

    name: str
    what: str
    cells: Callable[[bool], tuple[Cell, ...]]
    """In full, or (True) a quick look."""
    targets: Callable[[Sequence[Ended]], tuple[Target, ...]] = no_targets
    needs_data: bool = True


SECTIONS = {
    section.name: section
    for section in (
        Section(
            "calibration",
            "the published offline throughput of Helix and Swarm in the paper's system",
            calibration.cells,
            calibration.targets,
        ),
        Section("published", "what else was published of the same simulator", calibration.further_cells),
        Section(
            "like-for-like",
            "every method with every router under one load and one rule of admission",
            like_for_like.cells,
        ),
        Section("ours", "the 70B instances in several ways from theirs to ours", ours.cells, ours.targets),
        Section(
            "shares",
            "what IWRR makes of a plan on random mixed clusters",
            shares.cells,
            shares.targets,
            needs_data=False,
        ),
        Section(
            "predictions",
            "what the planner predicts of random clusters",
            predictions.cells,
            predictions.targets,
            needs_data=False,
        ),
    )
}

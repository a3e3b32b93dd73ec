"""What the planner predicts of random clusters against what the simulator serves there."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import ClassVar

from helixnet.sim.evaluation.cells import Cell, Data, Ended, Row, Target
from helixnet.sim.prediction_check import Check, check

WITHIN = 0.15
CLUSTERS, QUICK_CLUSTERS = 50, 4


KINDS = ("throughput", "TTFT", "TPOT")
"""Of errors, in their order."""


class Cluster(Cell, frozen=True, kw_only=True, tag="predictions"):
    """One random cluster."""

    row: ClassVar[type[Row]] = Check
    seed: int

    def title(self) -> str:
        """See Cell."""
        return f"predictions: cluster {self.seed}"

    def run(self, data: Data) -> Check:
        """See Cell."""
        return check(self.seed)


def cells(quick: bool) -> tuple[Cell, ...]:
    """The first so many seeds, none left out."""
    return tuple(Cluster(seed=seed) for seed in range(QUICK_CLUSTERS if quick else CLUSTERS))


def rows_of(ended: Sequence[Ended]) -> list[tuple[int, Check]]:
    """By seed."""
    return [(one.cell.seed, one.row) for one in ended if isinstance(one.cell, Cluster) and isinstance(one.row, Check)]


def targets(ended: Sequence[Ended]) -> tuple[Target, ...]:
    """Every cluster's errors within WITHIN, of each kind."""
    asked = sum(isinstance(one.cell, Cluster) for one in ended)
    errors = [row.errors() for _, row in rows_of(ended)]
    found = []
    for kind, name in enumerate(KINDS):
        mine = [error[kind] for error in errors]
        near = sum(abs(error) <= WITHIN for error in mine)
        words = f"{near} of {asked}"
        if mine:
            worst = max(mine, key=abs)
            words += f"; median of the error's size {median(map(abs, mine)):.1%}, worst {worst:+.1%}"
        wanted = f"{name} simulated within {WITHIN:.0%} of what is predicted, on each of {asked} random clusters"
        found.append(Target(wanted, words, 0 < near == asked))
    return tuple(found)

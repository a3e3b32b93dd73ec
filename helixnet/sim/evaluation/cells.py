"""One simulation of the evaluation as a value: what determines it, how it is run, the row that comes of it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import msgspec

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact

Row = msgspec.Struct
"""What came of a cell; frozen."""


class Cell(msgspec.Struct, frozen=True, kw_only=True, tag_field="section"):
    """All that determines a simulation but for code and data. Equal cells give equal rows, in any process."""

    row: ClassVar[type[Row]]

    def title(self) -> str:
        """For progress: what is being simulated."""
        raise NotImplementedError

    def run(self, data: Data) -> Row:
        """Simulate it.

        Raises:
            UsageError: there is no such thing, for instance because no request fits this placement.
        """
        raise NotImplementedError


class Data(Protocol):
    """Where cells get the paper's data from; those that need none never ask."""

    def artifact(self) -> Artifact:
        """Raises UsageError: it is missing or malformed."""


class Folder(msgspec.Struct, frozen=True):
    """The paper's data in a folder, read once in each process; None if there is none."""

    path: str | None

    def artifact(self) -> Artifact:
        """See Data."""
        if self.path is None:
            raise UsageError("The paper's data is needed: give its folder with --artifact DIR or HELIXNET_ARTIFACT.")
        return _artifact(self.path)


class Target(msgspec.Struct, frozen=True):
    """Something that was to be reached, and whether it was."""

    wanted: str
    found: str
    met: bool


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that has run: its row, or why there can be none."""

    cell: Cell
    row: Row | None
    problem: str = ""
    seconds: float = 0.0
    """Of wall clock."""


@lru_cache(maxsize=1)
def _artifact(path: str) -> Artifact:
    return Artifact(Path(path))

"""Cells of the evaluation: kept as they end, never run twice, never used for other code, data or cells."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from helixnet.core.errors import UsageError
from helixnet.sim.evaluation.calibration import Published
from helixnet.sim.evaluation.cells import Cell, Data, Folder, Row
from helixnet.sim.evaluation.pool import Kept, edition, run
from helixnet.sim.evaluation.sources import PACKAGE, closure

NO_DATA = Folder(None)
RAN: list[int] = []


def version_1(cell: Cell) -> str:
    return "v1"


class SquareRow(Row, frozen=True, kw_only=True):
    """Of a number."""

    square: int


class Square(Cell, frozen=True, kw_only=True, tag="square"):
    """A number's square; none of a negative one."""

    row: ClassVar[type[Row]] = SquareRow
    number: int

    def title(self) -> str:
        return f"square of {self.number}"

    def run(self, data: Data) -> SquareRow:
        RAN.append(self.number)
        if self.number < 0:
            raise UsageError("it is negative")
        if self.number > 99:
            raise ZeroDivisionError("a bug")
        return SquareRow(square=self.number**2)


def squares(*numbers: int) -> list[Cell]:
    return [Square(number=number) for number in numbers]


def results(path: Path, *numbers: int, version: str = "v1", told: list[str] | None = None) -> list[Row | None]:
    RAN.clear()
    tell = (told if told is not None else []).append
    ended = run(squares(*numbers), NO_DATA, Kept(path, lambda cell: version), 1, lambda: 0.0, tell)
    return [ended[cell].row for cell in squares(*numbers)]


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with pytest.raises(ZeroDivisionError):
        results(path, 2, 3, 100, 4)
    assert results(path, 2, 3, 4, 2) == [SquareRow(square=number**2) for number in (2, 3, 4, 2)]
    assert RAN == [4]


def test_half_a_line_is_run_again_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results(path, 2, 3)
    path.write_bytes(path.read_bytes()[:-20])
    results(path, 2, 3, 4)
    assert RAN == [3, 4]
    assert results(path, 2, 3, 4) and not RAN


def test_rows_of_other_sources_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results(path, 2)
    results(path, 2, version="v2")
    assert RAN == [2]


def test_why_there_is_no_row_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    told: list[str] = []
    assert results(path, -1, told=told) == [None]
    assert "it is negative" in told[0]
    ended = run(squares(-1), NO_DATA, Kept(path, version_1), 1, lambda: 0.0, told.append)
    assert ended[Square(number=-1)].problem == "it is negative"


def test_progress_says_how_many_and_how_long(tmp_path: Path) -> None:
    told: list[str] = []
    clock = iter(range(0, 10_000, 600))
    run(
        squares(1, 2),
        NO_DATA,
        Kept(tmp_path / "results.jsonl", version_1),
        1,
        lambda: float(next(clock)),
        told.append,
    )
    assert told[0].startswith("[1/2] square of 1: 600 s") and told[0].endswith("30 min left")


def test_several_processes_give_what_one_gives(tmp_path: Path) -> None:
    cells = [Published(figure="nothing of this name"), Published(figure="nor of this")]
    one, two = (
        run(
            cells,
            NO_DATA,
            Kept(tmp_path / f"{workers}.jsonl", version_1),
            workers,
            time.perf_counter,
            lambda _: None,
        )
        for workers in (1, 2)
    )
    assert {cell: ended.problem for cell, ended in one.items()} == {cell: ended.problem for cell, ended in two.items()}
    assert "nor of this" in two[cells[1]].problem


def test_the_edition_changes_with_the_data(tmp_path: Path) -> None:
    cell, file = Published(figure="any"), tmp_path / "clusters.json"
    file.write_text("{}")
    before = edition(tmp_path)(cell)
    assert edition(tmp_path)(cell) == before != edition(None)(cell)
    file.write_text("[]")
    assert edition(tmp_path)(cell) != before


def test_a_cell_rests_on_all_that_is_loaded_to_run_it() -> None:
    code = "import sys, helixnet.sim.evaluation.ours; print(*(n for n in sys.modules if n.startswith('helixnet')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    known = {path.relative_to(PACKAGE.parent).as_posix() for path in closure("helixnet.sim.evaluation.ours")}
    for name in loaded:
        path = name.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & known, name


def test_what_only_shows_rows_or_runs_other_cells_does_not_matter() -> None:
    paper = {path.name for path in closure("helixnet.sim.evaluation.like_for_like")}
    assert "run.py" in paper and not {"pictures.py", "page.py", "plots.py", "swarm.py"} & paper
    assert closure("nothing.of.ours") == ()

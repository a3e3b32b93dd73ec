"""Cells on several processes, and a file of what has come of them, so that a run that was cut short goes on.

Each line of the file is one cell with its row, kept under a key of everything that determines it: the cell itself, the
sources that it rests on, the data, the libraries that compute. A line of other sources is never used again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from helixnet.core.errors import UsageError
from helixnet.sim.evaluation.cells import Cell, Data, Ended
from helixnet.sim.evaluation.sources import PACKAGE, closure

Clock = Callable[[], float]
Edition = Callable[[Cell], str]
"""Changes with everything that determines the row of a cell besides the cell."""
LIBRARIES = ("highspy", "msgspec", "numpy")


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file."""

    key: str
    cell: msgspec.Raw
    row: msgspec.Raw
    problem: str
    seconds: float


class Kept:
    """The file of results. Only one process writes it."""

    def __init__(self, path: Path, edition: Edition) -> None:
        self._path, self._edition = path, edition
        self._lines = {line.key: line for line in _lines(path)}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever was cut short may have left half a line.
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0

    def get(self, cell: Cell) -> Ended | None:
        """What came of a cell, if that is known."""
        line = self._lines.get(self._key(cell))
        if line is None:
            return None
        row = msgspec.json.decode(line.row, type=cell.row | None)
        return Ended(cell=cell, row=row, problem=line.problem, seconds=line.seconds)

    def add(self, ended: Ended) -> None:
        """Keep it."""
        encode = msgspec.json.encode
        line = Line(
            key=self._key(ended.cell),
            cell=msgspec.Raw(encode(ended.cell)),
            row=msgspec.Raw(encode(ended.row)),
            problem=ended.problem,
            seconds=round(ended.seconds, 3),
        )
        with self._path.open("ab") as file:
            file.write(b"\n" * self._torn + encode(line) + b"\n")
        self._torn = False
        self._lines[line.key] = line

    def _key(self, cell: Cell) -> str:
        return hashlib.sha256(self._edition(cell).encode() + msgspec.json.encode(cell)).hexdigest()[:32]


def run(
    cells: Sequence[Cell], data: Data, kept: Kept, workers: int, clock: Clock, tell: Callable[[str], None]
) -> dict[Cell, Ended]:
    """What came of each cell; those already in `kept` are not run again. `tell` hears how far it is.

    Raises whatever a cell raises that is not a UsageError; what had ended by then is kept.
    """
    wanted = list(dict.fromkeys(cells))
    ended = {cell: known for cell in wanted if (known := kept.get(cell)) is not None}
    missing = [cell for cell in wanted if cell not in ended]
    if ended:
        tell(f"{len(ended)} of {len(wanted)} cells are known already")
    began = clock()
    for count, one in enumerate(_each(missing, data, workers, clock), start=1):
        kept.add(one)
        ended[one.cell] = one
        left_s = (clock() - began) / count * (len(missing) - count)
        result = f" ({one.problem})" if one.problem else ""
        tell(f"[{len(ended)}/{len(wanted)}] {one.cell.title()}: {one.seconds:.0f} s{result}; {_time(left_s)} left")
    return ended


def edition(folder: Path | None) -> Edition:
    """Of cells that are run with the data in this folder, here and now."""
    known: dict[str, str] = {}

    def of(cell: Cell) -> str:
        module = type(cell).__module__
        if module not in known:
            known[module] = _edition(module, folder)
        return known[module]

    return of


def _edition(module: str, folder: Path | None) -> str:
    digest = hashlib.sha256()
    for path in closure(module):
        _absorb(digest, path.relative_to(PACKAGE).as_posix(), path.read_bytes())
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        _absorb(digest, path.name, path.read_bytes())
    used = [f"{name} {version(name)}" for name in LIBRARIES]
    _absorb(digest, "libraries", " ".join([platform.python_version(), *used]).encode())
    return digest.hexdigest()[:16]


def _absorb(digest: Any, name: str, content: bytes) -> None:
    digest.update(f"{name} {len(content)}\n".encode() + content)


def _lines(path: Path) -> Iterator[Line]:
    """Those that are whole."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=Line)
            except msgspec.DecodeError:
                continue


def _each(cells: Sequence[Cell], data: Data, workers: int, clock: Clock) -> Iterator[Ended]:
    """As they end."""
    if workers <= 1 or len(cells) <= 1:
        for cell in cells:
            yield _run(cell, data, clock)
        return
    # Not forked: threads of numpy and the solver do not survive that.
    executor = ProcessPoolExecutor(min(workers, len(cells)), multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([executor.submit(_run, cell, data, clock) for cell in cells]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _run(cell: Cell, data: Data, clock: Clock) -> Ended:
    began = clock()
    try:
        row, problem = cell.run(data), ""
    except UsageError as error:
        row, problem = None, str(error)
    return Ended(cell=cell, row=row, problem=problem, seconds=clock() - began)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"

"""How far a simulation is, on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helixnet.daemon.wording import amount
from helixnet.sim.simulation import Simulation


class SimProgress:
    """A bar with simulated time, events/s and what is left of the wall clock's; nothing where there is no terminal."""

    def __init__(self, name: str, simulation: Simulation) -> None:
        console = Console(stderr=True, highlight=False)
        self._simulation = simulation
        self._began = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[simulated]}"),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._name = name
        self._task = self._bar.add_task(f"{name}: the first plan", total=None, simulated="", pace="")

    def advanced(self, share: float) -> None:
        """So much of the load's time is over."""
        simulation = self._simulation
        events = simulation.engine.events / max(1e-9, time.perf_counter() - self._began)
        over = share >= 1.0
        self._bar.update(
            self._task,
            description=f"{self._name}: the last answers" if over else self._name,
            completed=min(1.0, share),
            total=1.0,
            simulated=f"{_clock(share * simulation.setup.seconds)} of {_clock(simulation.setup.seconds)}",
            pace=f"{amount(events)} events/s",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


@contextlib.contextmanager
def seeds_progress(count: int) -> Iterator[Callable[[int], None]]:
    """A bar over `count` seeds; what it yields is called after each."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("stories", total=count)
        yield lambda seed: bar.advance(task)


def _clock(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"

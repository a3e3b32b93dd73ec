"""Discrete events under virtual time: what is scheduled happens in order of time, then in order of scheduling."""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush

Action = Callable[..., None]
GC_THRESHOLDS = (100_000, 20, 20)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Within it, the garbage collector looks for cycles less often.

    A simulation's heap is millions of objects that it would walk through again and again, and hardly any cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Engine:
    """The event heap of one simulation. Nothing here knows the wall clock; all chance comes from `rng`.

    `events` counts what has happened. `digest()` covers their number and all that was noted, with its time: two runs
    of one seed have the same, in whatever process.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.events = 0
        self._heap: list[tuple[float, int, Action, tuple[object, ...]]] = []
        self._scheduled = 0
        self._trace = hashlib.blake2b(digest_size=16)

    def at(self, time: float, action: Action, *arguments: object) -> None:
        """Do `action(*arguments)` at `time` (now, if that is past)."""
        self._scheduled += 1
        heappush(self._heap, (time if time > self.now else self.now, self._scheduled, action, arguments))

    def after(self, delay_s: float, action: Action, *arguments: object) -> None:
        """Do `action(*arguments)` so much later."""
        self._scheduled += 1
        heappush(self._heap, (self.now + delay_s if delay_s > 0.0 else self.now, self._scheduled, action, arguments))

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> bool:
        """Let time pass up to `until`; `stop` is asked after every event. Returns whether it said so."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action, arguments = heappop(heap)
            self.events += 1
            action(*arguments)
            if stop is not None and stop():
                return True
        self.now = max(self.now, until)
        return False

    def note(self, what: str) -> None:
        """Add something that happened now to the trace."""
        self._trace.update(f"{self.now!r} {what}\n".encode())

    def digest(self) -> str:
        """Of everything noted so far and of the number of events, in hex."""
        trace = self._trace.copy()
        trace.update(f"{self.events} {self.now!r}".encode())
        return trace.hexdigest()

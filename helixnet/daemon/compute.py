"""The engine's own thread: effects go in, outcomes come back to the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from helixnet.core.errors import EngineGone, HelixError
from helixnet.core.machine import (
    BatchDone,
    DropLayers,
    Dropped,
    Event,
    EvictKv,
    ExtendKv,
    Loaded,
    LoadSpan,
    OpenKv,
    Outcome,
    ReleaseKv,
    RunBatch,
    SealKv,
)
from helixnet.core.stage.work import Done
from helixnet.engine.base import Engine
from helixnet.net.driver import ComputeEffect

Finish = Callable[[Outcome], None]


class EngineThread:
    """Runs batches on one thread, in order; loads weights on another, so that serving goes on meanwhile.

    The queue is bounded by the stage machine: at most one batch and a few small effects per session.
    """

    def __init__(
        self, engine: Engine, on_event: Callable[[Event], None], on_gone: Callable[[EngineGone], None]
    ) -> None:
        self.engine = engine
        self._on_event = on_event
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[ComputeEffect, Finish] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, effect: ComputeEffect, done: Finish) -> None:
        """Queue an effect; `done` is called in the event loop with its outcome, if it has one."""
        self._queue.put((effect, done))

    def close(self) -> None:
        """End the thread after what is queued, and the engine; waits a moment for it."""
        self._queue.put(None)
        self._thread.join(timeout=2.0)
        self.engine.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            effect, done = item
            if isinstance(effect, LoadSpan):  # now, not before: what it takes the room of has been freed
                threading.Thread(target=self._load, args=(effect, done), name="loader", daemon=True).start()
                continue
            try:
                outcome = self._carry_out(effect)
            except EngineGone as error:
                self._gone(error)
                outcome = None
            if outcome is not None:
                self._back(done, outcome)

    def _back(self, done: Finish, outcome: Outcome) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(done, outcome)

    def _carry_out(self, effect: ComputeEffect) -> Outcome | None:
        match effect:
            case RunBatch():
                return self._batch(effect)
            case OpenKv():
                self._try(lambda: self.engine.open(effect.session, effect.layers, effect.tokens, effect.begun))
            case ExtendKv():
                self._try(lambda: self.engine.extend(effect.session, effect.tokens))
            case SealKv():
                self._try(lambda: self.engine.seal(effect.session, effect.blocks))
            case EvictKv():
                self.engine.evict(effect.blocks)
            case ReleaseKv():
                self.engine.release(effect.session)
            case DropLayers():
                self.engine.drop(effect.keep)
                return Dropped(self.engine.held())
        return None

    def _try(self, room: Callable[[], None]) -> None:
        """Make room; whoever has none after all learns of it when its work is run."""
        try:
            room()
        except EngineGone:
            raise
        except HelixError as error:
            self._emit(Event("engine.refused", {"why": str(error)}))

    def _batch(self, effect: RunBatch) -> BatchDone:
        began = time.perf_counter()
        try:
            results = tuple(self.engine.run(effect.batch))
        except EngineGone:
            raise
        except Exception as error:
            # The engine promises never to raise; if it does all the same (a driver reset, out of
            # memory), the sessions must learn of it and go on elsewhere instead of waiting for ever.
            self._emit(Event("engine.failed", {"why": f"{type(error).__name__}: {error}"}))
            results = tuple(Done(session=work.session, error=type(error).__name__) for work in effect.batch)
        return BatchDone(results, time.perf_counter() - began)

    def _load(self, effect: LoadSpan, done: Finish) -> None:
        began = time.perf_counter()
        problem = ""
        try:
            self.engine.load(effect.span, lambda read, total: self._progress(effect, read, total))
        except EngineGone as error:
            self._gone(error)
            return
        except (HelixError, OSError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
        seconds = time.perf_counter() - began
        self._emit(Event("span.loaded", {"span": str(effect.span), "seconds": seconds, "problem": problem}))
        self._back(done, Loaded(self.engine.held(), problem))

    def _gone(self, error: EngineGone) -> None:
        """There is no outcome any more, of this or of anything: the peer is to end."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_gone, error)

    def _progress(self, effect: LoadSpan, read: int, total: int) -> None:
        self._emit(Event("span.loading", {"span": str(effect.span), "bytes": read, "of_bytes": total}))

    def _emit(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

"""One peer's stage, entry and engine without a network: what a request costs there, measured in its own process."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from engine_workers import MEMORY_BYTES, an_engine

PREFIX, QUESTION = 1000, 24
LONG_PROMPT = 4000
ANSWERED = 1000
"""Tokens before the answer whose gaps are measured: it grows while the long prompt runs, by less than that."""
QUIET_TOKENS = 60
"""Tokens of an undisturbed answer whose gaps are the measure."""


class OnePeer:
    """Carries the machines' effects out, one after the other; the engine runs in this thread."""

    def __init__(self, engine: Any) -> None:
        from helixnet.core.route.pipeline import Stage
        from helixnet.core.stage.entry import EntryConfig, EntryMachine
        from helixnet.core.stage.stage import StageConfig, StageMachine
        from helixnet.core.types import PeerId, Span

        manifest = engine.manifest
        self.engine, self.manifest = engine, manifest
        self.me, self.client = PeerId("me"), PeerId("client")
        self.pipeline = (Stage(self.me, Span(0, manifest.layers)),)
        self.stage = StageMachine(self.me, manifest, int(MEMORY_BYTES / engine.weight_factor), StageConfig())
        self.stage.set_held(engine.held(), engine.held())
        self.entry = EntryMachine(self.me, self.stage, EntryConfig())
        self.tokens: dict[str, list[float]] = {}
        """When each session's tokens came."""
        self.prompt_tokens = 0
        """That were run."""
        self._numbers = itertools.count()
        self._inbox: deque[Any] = deque()
        self._batch: Any = None

    def ask(self, prompt: list[int], tokens: int) -> str:
        """Open a session; what comes of it is in `tokens`."""
        from helixnet.core.sampling import Sampling
        from helixnet.core.types import SessionId
        from helixnet.core.wire import messages as wire

        session = SessionId(f"s{next(self._numbers)}")
        self.tokens[session] = []
        message = wire.Open(
            session=session,
            pipeline=self.pipeline,
            manifest_hash=self.manifest.hash,
            prompt=tuple(prompt),
            tokens_max=tokens,
            sampling=Sampling(),
        )
        self._apply(self.entry.open(self.client, message, self._now))
        return session

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let messages pass and batches run until the condition holds."""
        while not condition():
            if self._inbox:
                self._hear(self._inbox.popleft())
            elif self._batch is not None:
                self._run()
            else:
                raise SystemExit("nothing is left to do, and what was waited for has not come")

    @property
    def _now(self) -> float:
        return time.perf_counter()

    def _run(self) -> None:
        from helixnet.core.machine import BatchDone

        batch, self._batch = self._batch, None
        began = self._now
        results = tuple(self.engine.run(batch))
        self.prompt_tokens += sum(work.tokens for work in batch if not work.decode)
        self._apply(self.stage.done(BatchDone(results, self._now - began), self._now))

    def _hear(self, message: Any) -> None:
        from helixnet.core.wire import messages as wire

        match message:
            case wire.Reserve():
                self._apply(self.stage.reserve(self.me, message, self._now))
            case wire.Reserved():
                self._apply(self.entry.reserved(self.me, message, self._now))
            case wire.Sampled():
                self._apply(self.entry.sampled(self.me, message, self._now))
            case wire.Release():
                self._apply(self.stage.end(message))
            case _:
                raise SystemExit(f"not expected here: {message}")

    def _apply(self, effects: list[Any]) -> None:
        from helixnet.core import machine as effect_of
        from helixnet.core.wire import messages as wire

        for effect in effects:
            match effect:
                case effect_of.Send() if effect.to == self.me:
                    self._inbox.append(effect.message)
                case effect_of.Send(message=wire.Token() as token):
                    self.tokens[token.session].append(self._now)
                case effect_of.Send(message=wire.Broken() | wire.Refused() as refusal):
                    raise SystemExit(f"the peer gave up: {refusal.reason}")
                case effect_of.RunBatch():
                    self._batch = effect.batch
                case effect_of.OpenKv():
                    self.engine.open(effect.session, effect.layers, effect.tokens, effect.begun)
                case effect_of.ExtendKv():
                    self.engine.extend(effect.session, effect.tokens)
                case effect_of.SealKv():
                    self.engine.seal(effect.session, effect.blocks)
                case effect_of.EvictKv():
                    self.engine.evict(effect.blocks)
                case effect_of.ReleaseKv():
                    self.engine.release(effect.session)


def measures() -> dict[str, float]:
    """All of them."""
    from helixnet.core.types import Span

    engine = an_engine()
    whole = Span(0, engine.manifest.layers)
    engine.load(Span(0, 1))  # what is imported for it is not the weights
    engine.drop(None)
    before = _resident()
    engine.load(whole)
    peak = (_peak() - before) / (engine.weight_factor * engine.manifest.span_bytes(whole.start, whole.stop))
    peer = OnePeer(engine)
    return {"load_peak": peak, **prefix(peer), **gaps(peer)}


def prefix(peer: OnePeer) -> dict[str, float]:
    """Work and time to the first token of a prompt that begins as one did before."""
    common = [2000 + (31 * n) % 40_000 for n in range(PREFIX)]
    runs: list[tuple[int, float]] = []
    for number in range(2):
        ran, began = peer.prompt_tokens, time.perf_counter()
        session = peer.ask([*common, *(100 + number + n for n in range(QUESTION))], 4)
        peer.run_until(lambda session=session: len(peer.tokens[session]) == 4)  # type: ignore[misc]
        runs.append((peer.prompt_tokens - ran, peer.tokens[session][0] - began))
    return {"prefix_work": runs[1][0] / runs[0][0], "prefix_ttft": runs[1][1] / runs[0][1]}


def gaps(peer: OnePeer) -> dict[str, float]:
    """The gaps between tokens while a long prompt runs, by those of an undisturbed answer (both 95th percentiles)."""
    answer = peer.ask([5] * ANSWERED, 3000)
    peer.run_until(lambda: len(peer.tokens[answer]) > QUIET_TOKENS)
    quiet = _gaps(peer.tokens[answer][10:])
    before = len(peer.tokens[answer])
    began = time.perf_counter()
    long = peer.ask([3000 + (17 * n) % 40_000 for n in range(LONG_PROMPT)], 1)
    peer.run_until(lambda: bool(peer.tokens[long]))
    beside = _gaps(peer.tokens[answer][before - 1 :])
    return {
        "gap_s": statistics.median(quiet),
        "gaps_p95": _p95(beside) / _p95(quiet),
        "gaps_median": statistics.median(beside) / statistics.median(quiet),
        "long_prompt_tokens_per_s": LONG_PROMPT / (time.perf_counter() - began),
    }


def _gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(measures()))

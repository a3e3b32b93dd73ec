"""Measures what a device does with real layers of the model, with the engine that is to serve; the result is cached."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from filelock import FileLock

from helixnet.core.errors import MemoryTooSmall
from helixnet.core.model import DTYPE_BYTES, Manifest
from helixnet.core.stage.work import Work
from helixnet.core.swarm.capability import ENGINE_CHARS_MAX, Capability, RatePoint
from helixnet.core.types import SessionId, Span
from helixnet.core.wire.activation import Activation
from helixnet.engine.base import Engine, Progress
from helixnet.engine.device import describe_device, driver_version, synchronize
from helixnet.engine.kinds import Kind, torch_kind
from helixnet.engine.weights.prepared import PreparedModel, cache_root

DECODE_BATCHES = (1, 4, 16, 64)
PREFILL_CHUNKS = (32, 128, 512)
LAYERS_MEASURED_MAX = 4
DECODE_CONTEXT_TOKENS = 128
"""Tokens in KV when decode is measured: about half of a usual answer's context."""
REPEATS = 5
POINT_BUDGET_S = 0.25
"""A point that takes longer than this is measured fewer times (at least once after a warm-up)."""
THREADS_BUDGET_S = 0.15
THREADS_GAIN_MIN = 1.1
"""More threads must be this much faster: on a shared machine a tie is lost by spinning."""
LOCK_TIMEOUT_S = 600.0
MATMUL_SIZE = 768
BANDWIDTH_BYTES = 256 * 1024 * 1024
COOLING_BYTES = 64 * 1024 * 1024
"""Read before each run on a CPU: a few layers alone would be read from its cache, where the others would not be."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured."""

    model: PreparedModel
    device: str
    memory_bytes: int
    kind: Kind
    threads: int | None = None
    """CPU threads, if the user said how many; else as many as are fastest."""


def measure(asked: Asked, *, force: bool = False, progress: Progress | None = None) -> Capability:
    """What the device does with a layer of the model; from the cache if it was measured before (unless `force`).

    Takes some 5 s on a CPU, twice that and the start of a process with vLLM. Leaves torch's thread count at what was
    found fastest. Raises MemoryTooSmall if not even one layer fits the memory.
    """
    path = _cache_file(asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Peers that start together on one machine would measure each other: one measures, the others read.
    with FileLock(path.parent / "measuring.lock", timeout=LOCK_TIMEOUT_S):
        found = None if force else cached_capability(asked)
        if found is None:
            found = _measure(asked, progress or (lambda _done, _total: None))
            _remember(path, found)
    if asked.device == "cpu":
        torch.set_num_threads(found.threads)
    return msgspec.structs.replace(found, memory_bytes=asked.memory_bytes)


def cached_capability(asked: Asked) -> Capability | None:
    """What was measured before of this device, driver, model (dtype included) and engine, if anything."""
    try:
        return msgspec.json.decode(_cache_file(asked).read_bytes(), type=Capability)
    except (OSError, msgspec.MsgspecError):
        return None


def _measure(asked: Asked, progress: Progress) -> Capability:
    manifest, device = asked.model.manifest, asked.device
    if asked.memory_bytes < manifest.layer_bytes:
        raise MemoryTooSmall(
            f"{asked.memory_bytes / 1e9:.2f} GB cannot hold one layer of {manifest.name} "
            f"({manifest.layer_bytes / 1e9:.2f} GB); give the peer more memory (--memory) or serve a smaller model"
        )
    chunks = [size for size in PREFILL_CHUNKS if size <= manifest.context_tokens] or [1]
    steps = 3 + 2 * len(DECODE_BATCHES) + len(chunks)
    ticks = iter(range(1, steps + 1))

    def tick() -> None:
        progress(next(ticks), steps)

    threads = asked.threads or (_fastest_threads(asked) if device == "cpu" else 1)
    tick()
    with _Bench(asked, threads) as bench:
        tick()
        decode, fixed = [], []
        for batch in DECODE_BATCHES:
            all_s = bench.decode(batch, bench.span)
            tick()
            layer_s, besides_s = bench.apart(all_s, bench.decode(batch, bench.first))
            tick()
            decode.append(RatePoint(batch, layer_s))
            fixed.append(besides_s)
        prefill = []
        batch_s = statistics.median(fixed)
        for chunk in chunks:
            prefill.append(RatePoint(chunk, bench.prefill(chunk, batch_s)))
            tick()
        paging, takes = bench.engine.paging, bench.engine.takes
    capability = Capability(
        device=describe_device(device, threads),
        matmul_flops=_matmul_flops(device, manifest.dtype),
        memory_bandwidth=_memory_bandwidth(device),
        decode=tuple(decode),
        prefill=tuple(prefill),
        memory_bytes=asked.memory_bytes,
        threads=threads,
        batch_s=batch_s,
        engine=asked.kind.version[:ENGINE_CHARS_MAX],
        paging=paging,
        takes=takes,
    )
    tick()
    return capability


class _Bench:
    """Times layers of an engine with made-up activations, of which only the size matters."""

    def __init__(self, asked: Asked, threads: int, layers_max: int = LAYERS_MEASURED_MAX) -> None:
        manifest = asked.model.manifest
        self._device, self._manifest = asked.device, manifest
        self.span = _measured_span(manifest, min(layers_max, asked.memory_bytes // manifest.layer_bytes))
        self.first = Span(self.span.start, self.span.start + 1)
        sessions = 2 * max(DECODE_BATCHES) * 2 * DECODE_CONTEXT_TOKENS + max(PREFILL_CHUNKS)
        weights = manifest.span_bytes(self.span.start, self.span.stop)
        budget = 2 * weights + len(self.span) * sessions * manifest.kv_bytes
        self.engine: Engine = asked.kind.make(asked.model, asked.device, budget, threads)
        self._cold = torch.ones(COOLING_BYTES // 4) if asked.device == "cpu" else None
        self._began = 0

    def __enter__(self) -> _Bench:
        try:
            self.engine.load(self.span)
        except BaseException:
            self.engine.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def decode(self, batch: int, layers: Span, budget_s: float = POINT_BUDGET_S) -> float:
        """Seconds of one decode step of `batch` sessions through `layers`, with `DECODE_CONTEXT_TOKENS` in KV each."""
        tokens = min(DECODE_CONTEXT_TOKENS, self._manifest.context_tokens - REPEATS - 3)
        sessions = [self._name() for _ in range(batch)]
        try:
            for session in sessions:
                self.engine.open(session, layers, tokens + REPEATS + 2)
                self.engine.fill(session, tokens)
            turns = iter(range(tokens, tokens + REPEATS + 1))
            return self._median(lambda: self._step(sessions, layers, next(turns)), budget_s)
        finally:
            for session in sessions:
                self.engine.release(session)

    def apart(self, all_s: float, first_s: float) -> tuple[float, float]:
        """Seconds of a layer, and of what takes as long however many there are, from those of all and of one."""
        if len(self.span) == 1:
            return all_s, 0.0
        layer_s = (all_s - first_s) / (len(self.span) - 1)
        # Noise must not make layers faster than all of them together took, nor the rest of it negative.
        layer_s = min(all_s / len(self.span), max(layer_s, all_s / len(self.span) / 2))
        return layer_s, all_s - len(self.span) * layer_s

    def prefill(self, chunk: int, batch_s: float) -> float:
        """Seconds of a layer for one prompt chunk of `chunk` tokens; a batch takes `batch_s` besides."""

        def once() -> None:
            session = self._name()
            self.engine.open(session, self.span, chunk)
            try:
                self._run([self._work(session, self.span, 0, chunk)])
            finally:
                self.engine.release(session)

        all_s = self._median(once, POINT_BUDGET_S)
        return max(all_s - batch_s, all_s / 2) / len(self.span)

    def _step(self, sessions: list[SessionId], layers: Span, position: int) -> None:
        self._run([self._work(session, layers, position, 1) for session in sessions])

    def _run(self, batch: list[Work]) -> None:
        for done in self.engine.run(batch):
            assert done.error is None, done.error

    def _work(self, session: SessionId, layers: Span, position: int, tokens: int) -> Work:
        manifest = self._manifest
        if layers.start == 0:
            return Work(session=session, layers=layers, position=position, token_ids=(0,) * tokens)
        data = memoryview(bytes(tokens * manifest.hidden_size * DTYPE_BYTES[manifest.dtype]))
        activation = Activation(dtype=manifest.dtype, tokens=tokens, hidden_size=manifest.hidden_size, data=data)
        return Work(session=session, layers=layers, position=position, activation=activation)

    def _median(self, once: Callable[[], None], budget_s: float) -> float:
        """Median seconds of up to `REPEATS` runs after a warm-up, fewer when the budget is spent."""
        once()
        synchronize(self._device)
        taken: list[float] = []
        while not taken or (len(taken) < REPEATS and sum(taken) < budget_s):
            if self._cold is not None:
                self._cold.sum()
            began = time.perf_counter()
            once()
            synchronize(self._device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def _name(self) -> SessionId:
        self._began += 1
        return SessionId(f"bench-{self._began}")


def _measured_span(manifest: Manifest, layers: int) -> Span:
    """Inner layers where there are any (no embedding, no head), as many as fit."""
    first = min(1, manifest.layers - 1)
    return Span(first, first + max(1, min(layers, manifest.layers - 1 - first)))


def _fastest_threads(asked: Asked) -> int:
    """The thread count with the fastest decode step of our own engine; fewer win ties, for others use this machine too.

    vLLM's process is started with so many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best, best_s = 1, float("inf")
    count = 1
    with _Bench(Asked(asked.model, asked.device, asked.memory_bytes, torch_kind()), 1) as bench:
        while count <= cores:
            torch.set_num_threads(count)
            seconds = statistics.median(bench.decode(1, bench.span, THREADS_BUDGET_S) for _ in range(3))
            if seconds * (THREADS_GAIN_MIN if count > 1 else 1.0) < best_s:
                best, best_s = count, seconds
            count *= 2
    torch.set_num_threads(best)
    return best


def _matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of a square matrix product in the served dtype."""
    left = torch.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=getattr(torch, dtype), device=device)
    seconds = _best(lambda: torch.mm(left, left), device)
    return 2 * MATMUL_SIZE**3 / seconds


def _memory_bandwidth(device: str) -> float:
    """Bytes/s when reading an array that fits no cache."""
    data = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    return BANDWIDTH_BYTES / _best(data.sum, device)


def _best(once: Callable[[], object], device: str) -> float:
    """The fastest of three runs after a warm-up: what the hardware can do, not what the neighbours leave."""
    once()
    synchronize(device)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        once()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _cache_file(asked: Asked) -> Path:
    device = asked.device
    parts = (device, describe_device(device, 1), driver_version(device), asked.model.manifest.hash, asked.kind.version)
    key = "\n".join((*parts, str(asked.threads or "")))
    return cache_root() / "capability" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _remember(path: Path, capability: Capability) -> None:
    part = path.with_suffix(f".{os.getpid()}.partial")
    part.write_bytes(msgspec.json.encode(capability))
    part.replace(path)

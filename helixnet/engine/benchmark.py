"""Measures what this machine can do, on real layers of the model; the result is cached."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from filelock import FileLock

from helixnet.core.errors import MemoryTooSmall
from helixnet.core.model import DTYPE_BYTES, Manifest
from helixnet.core.stage.work import Work
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import SessionId, Span
from helixnet.core.wire.activation import Activation
from helixnet.engine.base import Progress
from helixnet.engine.device import describe_device, synchronize
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.prepared import PreparedModel, cache_root

DECODE_BATCHES = (1, 4, 16, 64)
PREFILL_CHUNKS = (32, 128, 512)
LAYERS_MEASURED_MAX = 4
CACHE_BYTES = 48 * 1024 * 1024
"""Layers are measured in a row until they exceed this: one small layer alone would be read from the CPU's cache."""
DECODE_CONTEXT_TOKENS = 128
"""Tokens in KV when decode is measured: about half of a usual answer's context."""
REPEATS = 5
POINT_BUDGET_S = 0.25
"""A point that takes longer than this is measured fewer times (at least once after a warm-up)."""
THREADS_BUDGET_S = 0.15
THREADS_GAIN_MIN = 1.1
"""More threads must be this much faster: on a shared machine a tie is lost by spinning."""
LOCK_TIMEOUT_S = 60.0
MATMUL_SIZE = 768
BANDWIDTH_BYTES = 256 * 1024 * 1024


def measure(
    model: PreparedModel,
    device: str,
    memory_bytes: int,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Capability:
    """What `device` does with a layer of `model`; from the cache if it was measured before (unless `force`).

    Takes about 3 s on a CPU. Leaves torch's thread count at what was found fastest.
    Raises MemoryTooSmall if not even one layer fits `memory_bytes`.
    """
    path = _cache_file(model, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Peers that start together on one machine would measure each other: one measures, the others read.
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        found = None if force else cached_capability(model, device)
        if found is None:
            found = _measure(model, device, memory_bytes, progress)
            _remember(path, found)
    if device == "cpu":
        torch.set_num_threads(found.threads)
    return msgspec.structs.replace(found, memory_bytes=memory_bytes)


def cached_capability(model: PreparedModel, device: str) -> Capability | None:
    """What was measured before for this device, model and torch version, if anything."""
    try:
        return msgspec.json.decode(_cache_file(model, device).read_bytes(), type=Capability)
    except (OSError, msgspec.MsgspecError):
        return None


def _measure(model: PreparedModel, device: str, memory_bytes: int, progress: Progress | None) -> Capability:
    manifest = model.manifest
    if memory_bytes < manifest.layer_bytes:
        raise MemoryTooSmall(
            f"{memory_bytes / 1e9:.2f} GB cannot hold one layer of {manifest.name} "
            f"({manifest.layer_bytes / 1e9:.2f} GB); give the peer more memory (--memory) or serve a smaller model"
        )
    span = _measured_span(manifest, memory_bytes)
    room = 2 * max(DECODE_BATCHES) * DECODE_CONTEXT_TOKENS + max(PREFILL_CHUNKS)
    budget = manifest.span_bytes(span.start, span.stop) + len(span) * room * manifest.kv_bytes
    engine = TorchEngine(model, device=device, memory_bytes=budget)
    engine.load(span)
    bench = _Bench(engine, device, span)
    steps = len(DECODE_BATCHES) + len(PREFILL_CHUNKS) + 3
    report = progress or (lambda _done, _total: None)
    threads = _fastest_threads(bench) if device == "cpu" else 1
    report(1, steps)
    decode = []
    for batch in DECODE_BATCHES:
        decode.append(RatePoint(batch, bench.decode(batch)))
        report(1 + len(decode), steps)
    prefill = []
    for chunk in (size for size in PREFILL_CHUNKS if size <= manifest.context_tokens):
        prefill.append(RatePoint(chunk, bench.prefill(chunk)))
        report(1 + len(decode) + len(prefill), steps)
    capability = Capability(
        device=describe_device(device, threads),
        matmul_flops=_matmul_flops(device, manifest.dtype),
        memory_bandwidth=_memory_bandwidth(device),
        decode=tuple(decode),
        prefill=tuple(prefill) or (RatePoint(1, decode[0].seconds),),
        memory_bytes=memory_bytes,
        threads=threads,
    )
    report(steps, steps)
    return capability


def _measured_span(manifest: Manifest, memory_bytes: int) -> Span:
    """Inner layers where there are any (no embedding, no head), as many as tell the truth and fit."""
    wanted = min(LAYERS_MEASURED_MAX, -(-CACHE_BYTES // manifest.layer_bytes), memory_bytes // manifest.layer_bytes)
    first = min(1, manifest.layers - 1)
    return Span(first, first + max(1, min(wanted, manifest.layers - 1 - first)))


class _Bench:
    """Times layers of an engine with made-up activations, of which only the size matters; answers per layer."""

    def __init__(self, engine: TorchEngine, device: str, span: Span) -> None:
        self._engine, self._device, self._span = engine, device, span

    def decode(self, batch: int, budget_s: float = POINT_BUDGET_S) -> float:
        """Seconds for one decode step of `batch` sessions, each with `DECODE_CONTEXT_TOKENS` tokens in KV."""
        tokens = min(DECODE_CONTEXT_TOKENS, self._engine.manifest.context_tokens - REPEATS - 3)
        sessions = [SessionId(f"bench-{index}") for index in range(batch)]
        try:
            for session in sessions:
                self._engine.open(session, self._span, tokens + REPEATS + 2)
                self._engine.fill(session, tokens)
            turns = iter(range(tokens, tokens + REPEATS + 1))
            return self._median(lambda: self._steps(sessions, next(turns)), budget_s)
        finally:
            for session in sessions:
                self._engine.release(session)

    def prefill(self, chunk: int) -> float:
        """Seconds for one prompt chunk of `chunk` tokens."""

        def once() -> None:
            session = SessionId("bench-prefill")
            self._engine.open(session, self._span, chunk)
            try:
                self._run([self._work(session, 0, chunk)])
            finally:
                self._engine.release(session)

        return self._median(once, POINT_BUDGET_S)

    def _steps(self, sessions: list[SessionId], position: int) -> None:
        self._run([self._work(session, position, 1) for session in sessions])

    def _run(self, batch: list[Work]) -> None:
        for done in self._engine.run(batch):
            assert done.error is None, done.error

    def _work(self, session: SessionId, position: int, tokens: int) -> Work:
        manifest = self._engine.manifest
        if self._span.start == 0:
            return Work(session=session, layers=self._span, position=position, token_ids=(0,) * tokens)
        data = memoryview(bytes(tokens * manifest.hidden_size * DTYPE_BYTES[manifest.dtype]))
        activation = Activation(dtype=manifest.dtype, tokens=tokens, hidden_size=manifest.hidden_size, data=data)
        return Work(session=session, layers=self._span, position=position, activation=activation)

    def _median(self, once: Callable[[], None], budget_s: float) -> float:
        """Median seconds of up to `REPEATS` runs after a warm-up, fewer when the budget is spent."""
        once()
        synchronize(self._device)
        taken: list[float] = []
        while not taken or (len(taken) < REPEATS and sum(taken) < budget_s):
            began = time.perf_counter()
            once()
            synchronize(self._device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken) / len(self._span)


def _fastest_threads(bench: _Bench) -> int:
    """The thread count with the fastest decode step; fewer win ties, for others use this machine too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best, best_s = 1, float("inf")
    count = 1
    while count <= cores:
        torch.set_num_threads(count)
        seconds = statistics.median(bench.decode(1, THREADS_BUDGET_S) for _ in range(3))
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


def _cache_file(model: PreparedModel, device: str) -> Path:
    key = "\n".join((device, describe_device(device, 1), model.manifest.hash, torch.__version__))
    return cache_root() / "capability" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _remember(path: Path, capability: Capability) -> None:
    part = path.with_suffix(f".{os.getpid()}.partial")
    part.write_bytes(msgspec.json.encode(capability))
    part.replace(path)

"""What a peer was measured to do."""

from __future__ import annotations

import math

import msgspec

from helixnet.core.stage.pages import Paging
from helixnet.core.wire.activation import PACKINGS, RAW

BATCHES_MAX = 16
ENGINE_CHARS_MAX = 64


class RatePoint(msgspec.Struct, frozen=True, array_like=True):
    """One point of a rate curve: `tokens` tokens run through **one layer** together take `seconds`."""

    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        if self.tokens < 1 or not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"a rate point needs tokens >= 1 and seconds > 0, not {self.tokens}, {self.seconds}")


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """Measured on the real device with real layers of the model, by the engine that is to serve them; nothing here
    comes from a data sheet.

    `decode` gives the seconds one layer takes for a batch of that many decode steps (one token each), `prefill` for one
    prompt chunk of that many tokens. Both ascend in tokens. A batch takes `batch_s` more, however many layers it runs.
    """

    device: str
    """As a person would name it: `AMD EPYC, 1 thread`, `NVIDIA GeForce RTX 4090`."""
    matmul_flops: float
    """Dense matrix products in the served dtype, FLOP/s."""
    memory_bandwidth: float
    """Bytes/s read from the memory the weights live in."""
    decode: tuple[RatePoint, ...]
    prefill: tuple[RatePoint, ...]
    memory_bytes: int
    """Budget for weights and KV together."""
    threads: int = 1
    """CPU threads found to be fastest; 1 on a GPU."""
    batch_s: float = 0.0
    """Seconds of a batch besides its layers: bookkeeping, copies, calls between processes."""
    engine: str = ""
    """What was measured, and its version."""
    paging: Paging = Paging()
    """How the engine divides its KV memory."""
    takes: tuple[str, ...] = (RAW,)
    """Packings of activations that the engine reads and writes."""

    def __post_init__(self) -> None:
        for name, curve in (("decode", self.decode), ("prefill", self.prefill)):
            tokens = [point.tokens for point in curve]
            if not 1 <= len(tokens) <= BATCHES_MAX or tokens != sorted(set(tokens)):
                raise ValueError(f"the {name} curve needs 1 to {BATCHES_MAX} points with ascending tokens")
        if len(self.takes) > len(PACKINGS):
            raise ValueError("there are not so many packings of activations")
        if not (math.isfinite(self.batch_s) and self.batch_s >= 0) or len(self.engine) > ENGINE_CHARS_MAX:
            raise ValueError("a batch's own seconds must not be negative, and an engine has a short name")
        if self.memory_bytes < 0 or not self.matmul_flops > 0 or not self.memory_bandwidth > 0:
            raise ValueError("memory must not be negative; FLOP/s and memory bandwidth must be positive")

    def decode_tokens_per_s(self, batch: int) -> float:
        """Decode tokens/s through one layer at the measured batch nearest below `batch`."""
        point = max((p for p in self.decode if p.tokens <= batch), default=self.decode[0], key=lambda p: p.tokens)
        return point.tokens / point.seconds

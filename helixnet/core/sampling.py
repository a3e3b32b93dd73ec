"""How the next token is chosen: a pure function of (seed, position, logits) with these settings."""

from __future__ import annotations

import math

import msgspec

STOP_IDS_MAX = 64
SEED_MAX = 2**63 - 1


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one request. Temperature 0 is greedy: the first of the largest logits.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must not be negative and top_p must be in (0, 1], not {self.top_k}, {self.top_p}")
        if not 0 <= self.seed <= SEED_MAX:
            raise ValueError(f"seed must be between 0 and {SEED_MAX}, not {self.seed}")

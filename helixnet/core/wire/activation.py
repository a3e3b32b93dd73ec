"""Activations as bytes: what one stage hands the next, in the served dtype, raw and little-endian."""

from __future__ import annotations

import msgspec

from helixnet.core.model import DTYPE_BYTES


class Activation(msgspec.Struct, frozen=True, eq=False):
    """Hidden states of `tokens` tokens, row by row: shape [tokens, hidden_size].

    Raises:
        ValueError: `data` is not exactly tokens x hidden_size x bytes of dtype long.
    """

    dtype: str
    tokens: int
    hidden_size: int
    data: memoryview

    def __post_init__(self) -> None:
        tokens = self.tokens
        expected = tokens * self.hidden_size * DTYPE_BYTES.get(self.dtype, 0)
        if tokens < 1 or expected < 1:
            raise ValueError(f"not an activation: {self.dtype!r}, {tokens} x {self.hidden_size}")
        if self.data.nbytes != expected:
            raise ValueError(f"an activation of {expected} bytes was announced, {self.data.nbytes} came")

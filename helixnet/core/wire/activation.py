"""Activations as bytes: what one stage hands the next, little-endian, packed in one of three ways.

| packing | a row is |
|---|---|
| `RAW` | the hidden state in the served dtype |
| `PAIR` | hidden state and residual, whose sum that is: as vLLM's layers hand them on, so that nothing is rounded |
| `INT8` | the hidden state in 8 bits a number, then for each `GROUP` numbers a float16 by which they are scaled |
"""

from __future__ import annotations

import msgspec

from helixnet.core.model import DTYPE_BYTES

RAW, PAIR, INT8 = "", "pair", "int8"
PACKINGS = (RAW, PAIR, INT8)
GROUP = 64
"""Numbers of a row that share a scale. One scale for a whole row would drown most of it: a few numbers of a hidden
state are a thousand times larger than the others (docs/decisions/0022)."""


def groups_of(hidden_size: int) -> int:
    """How many scales a row has."""
    return -(-hidden_size // GROUP)


def row_bytes(packing: str, dtype: str, hidden_size: int) -> int:
    """What a token takes on the wire; 0 for an unknown packing or dtype."""
    whole = hidden_size * DTYPE_BYTES.get(dtype, 0)
    return {RAW: whole, PAIR: 2 * whole, INT8: hidden_size + 2 * groups_of(hidden_size) if whole else 0}.get(packing, 0)


class Activation(msgspec.Struct, frozen=True, eq=False):
    """Hidden states of `tokens` tokens, row by row: shape [tokens, hidden_size].

    Raises:
        ValueError: `data` is not exactly as long as so many rows of this packing.
    """

    dtype: str
    tokens: int
    hidden_size: int
    data: memoryview
    packing: str = RAW

    def __post_init__(self) -> None:
        tokens = self.tokens
        expected = tokens * row_bytes(self.packing, self.dtype, self.hidden_size)
        if tokens < 1 or expected < 1:
            raise ValueError(f"not an activation: {self.packing!r} {self.dtype!r}, {tokens} x {self.hidden_size}")
        if self.data.nbytes != expected:
            raise ValueError(f"an activation of {expected} bytes was announced, {self.data.nbytes} came")

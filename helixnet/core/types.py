"""The words every room shares: ids and half-open layer spans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NewType

import msgspec

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58. It is derived from the peer's public key, so it cannot be claimed by another."""

SessionId = NewType("SessionId", str)
"""The swarm's name for one request in flight; random, chosen by the client, at most 64 characters."""

BlockId = NewType("BlockId", bytes)
"""A stage's name for the KV of one block of tokens: it says which tokens came up to its end, and by which way."""

SESSION_ID_CHARS_MAX = 64
LAYERS_MAX = 1024


class Span(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A half-open range of decoder layers `[start, stop)`; never empty.

    Raises:
        ValueError: not `0 <= start < stop <= LAYERS_MAX`.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= LAYERS_MAX:
            raise ValueError(f"a span needs 0 <= start < stop <= {LAYERS_MAX}, not [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    def holds(self, other: Span) -> bool:
        """Whether every layer of `other` is in this span."""
        return self.start <= other.start and other.stop <= self.stop

    def overlaps(self, other: Span) -> bool:
        """Whether the two spans share a layer."""
        return self.start < other.stop and other.start < self.stop

    def layers(self) -> range:
        """The layer numbers, in order."""
        return range(self.start, self.stop)


def runs(layers: Iterable[int]) -> tuple[Span, ...]:
    """The fewest spans that hold exactly these layers, in order."""
    spans: list[Span] = []
    for layer in sorted(set(layers)):
        if spans and spans[-1].stop == layer:
            spans[-1] = Span(spans[-1].start, layer + 1)
        else:
            spans.append(Span(layer, layer + 1))
    return tuple(spans)

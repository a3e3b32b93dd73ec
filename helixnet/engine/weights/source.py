"""The seam between a checkpoint on disk (or behind HTTP) and the engine: names, shapes, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from helixnet.engine.quantized import Quantized

HEADER_BYTES_MAX = 100 * 1024 * 1024
"""No honest safetensors header is larger (the library's own limit)."""


class WeightSource(Protocol):
    """A checkpoint whose tensors can be read one by one, without reading the rest."""

    @property
    def native_names(self) -> bool:
        """Whether names are those of the transformers module (True) or of the checkpoint, still to be converted."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, as `read` would yield it."""
        ...

    def stored_bytes(self) -> Mapping[str, int]:
        """What every tensor takes where it is stored."""
        ...

    def kept(self, name: str) -> Quantized | None:
        """A tensor as it is stored, if that is a form that products can be made with; None if it is another."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, one in memory at a time, in the stored dtype (float32 for quantized ones).

        Raises CorruptCheckpoint for bytes that are missing or make no sense.
        """
        ...

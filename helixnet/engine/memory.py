"""Memory of the system: taken when it is touched, given back when weights were loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 256 << 10, 32 << 20
"""From where on glibc gives every piece of memory its own pages: while loading, and otherwise (as far as it goes by
itself, because pages of their own are slow to come by)."""


@contextmanager
def given_back() -> Iterator[None]:
    """What is freed within is not kept for later: a tensor of a few megabytes would leave a hole that nothing fits."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)


def zeros_when_touched(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """So many zeros, flat; on a CPU they take memory only where they are written to, or read."""
    if device.type != "cpu" or count == 0:
        return torch.zeros(count, dtype=dtype, device=device)
    # numpy asks the kernel for zero pages, which take memory when first written; torch would write them all now.
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None

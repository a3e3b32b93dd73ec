"""A weight matrix in the form that products with few rows are fastest in, on its device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from helixnet.engine.quantized import COMPUTED_IN, Quantized, product

PACKED_FOR_ROWS = 16
"""The batch oneDNN's layout is chosen for; measured good from 1 row to 64."""
HALF_MAX = 65504.0
"""Largest number that float16 has."""
PACKED_AT_ONCE = 1 << 22
"""Numbers of a matrix that are widened to be packed."""
HALVES = (torch.bfloat16, torch.float16)


class Product:
    """`rows @ weight.T + bias`. `dtype` is what it computes in; `is_copy` if `weight` itself is not needed for it.

    On CPUs there are three forms. Numbers that the CPU multiplies (float32, and bfloat16 where it has instructions for
    it) go into oneDNN's own layout: in float32 a layer's products take 1.0, 1.4, 1.9 and 2.5 ms for 1, 4, 8 and 16
    rows on a Zen 3 core, against 0.9, 2.1, 2.6 and 3.4 ms in the best ordinary layout; in bfloat16 on a Zen 4 core half
    as long for 1 to 8 rows, two thirds for 32, the same from 512. bfloat16 and float16, where the CPU cannot multiply
    them, go into FBGEMM's layout of float16, which is multiplied in float32: half the memory of float32 in half the
    time of it (from 1 to 8 rows; as long from 32), where the ordinary product takes three times as long and more. All
    else is kept as it is.
    """

    def __init__(self, weight: torch.Tensor | Quantized, bias: torch.Tensor | None) -> None:
        self.is_copy = True
        self._run: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(weight, Quantized):
            self.dtype, self._run = COMPUTED_IN, product(weight, bias)
            return
        self.dtype = weight.dtype
        if _packs(weight.device, weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
            self._run = lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        elif _halves(weight.device, weight.dtype) and float(weight.abs().max()) <= HALF_MAX:
            self.dtype = torch.float32
            self._run = _halved(weight, bias)
        else:
            self.is_copy = False
            self._run = lambda rows: F.linear(rows, weight, bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [tokens, inputs] to [tokens, outputs], in the dtype that they come in."""
        if rows.dtype == self.dtype:
            return self._run(rows)
        return self._run(rows.to(self.dtype)).to(rows.dtype)


def _halved(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product in FBGEMM's layout; of large matrices by parts, so that none is there in float32 as a whole."""
    size = max(1, PACKED_AT_ONCE // weight.shape[1])
    biases = bias.float().split(size) if bias is not None else [None] * -(-len(weight) // size)
    pack, multiply = torch.ops.quantized.linear_prepack_fp16, torch.ops.quantized.linear_dynamic_fp16
    parts = [pack(rows.float(), part) for rows, part in zip(weight.split(size), biases, strict=True)]
    if len(parts) == 1:
        return lambda rows: multiply(rows, parts[0])
    return lambda rows: torch.cat([multiply(rows, part) for part in parts], dim=1)


def has_own_form(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with such numbers there want the matrix in another layout than it is stored in."""
    return _packs(device, dtype) or _halves(device, dtype)


def kept_bytes(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> int:
    """What a matrix takes that products are made with; FBGEMM has blocks of 512 inputs and 16 outputs, padded."""
    stored = outputs * inputs * dtype.itemsize
    if not _halves(device, dtype):
        return stored
    return max(stored, 2 * -(-outputs // 16) * 16 * -(-inputs // 512) * 512)


def column_wise(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix [outputs, inputs], laid out the way ordinary products with it are fastest on its device.

    On a CPU in float32, one row times a matrix stored by input reads memory a quarter faster than by output
    (18.7 against 14.7 GB/s on a Zen 3 core); from 16 rows on it makes no difference.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    return weight.t().contiguous().t()


def widened(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32 where a CPU has no arithmetic for shorter numbers."""
    return torch.float32 if device.type == "cpu" and dtype in HALVES and not _multiplies(dtype) else dtype


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's own layout is to be had, and as fast as it can be."""
    fast = device.type == "cpu" and widened(device, dtype) == dtype
    return fast and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FBGEMM's float16 layout is to be had, and wanted."""
    return widened(device, dtype) != dtype and "fbgemm" in torch.backends.quantized.supported_engines


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has fast products of these numbers on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops: Any = torch.ops.mkldnn
    known = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(known())

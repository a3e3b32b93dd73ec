"""Matrices in 8 or 4 bits, and products with them by torch's own kernels. Activations stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from helixnet.engine.weights.keeping import GROUP, INT4, INT8

COMPUTED_IN = torch.bfloat16
LARGEST = 127
LEVELS = 15
MIDDLE = 8
"""What torch's kernel takes from a code of 4 bits before it scales it."""
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that are tried: cutting a few large numbers may be worth finer steps for all others."""
ROWS_DENSE = 24
"""From so many rows on, widening the numbers takes less time than torch's kernel for 8 bits, which is for few."""
WIDENED_AT_ONCE = 1 << 19
"""Numbers of a matrix that are widened before their product; more would not stay in the CPU's cache."""
SOUGHT_AT_ONCE = 1 << 16
"""Numbers of a matrix that codes are sought for together: temporaries so small come from memory that was used before,
larger ones each from the system (`memory.given_back`), which takes longer than the search."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix [outputs, inputs].

    INT8: `codes` [outputs, inputs] times `scales` [outputs]. INT4: `codes` [outputs, inputs / 2] have the even column
    in their low and the odd one in their high bits; the numbers are (code - 8) * scale + offset, by groups of `GROUP`
    columns, `scales` [inputs / GROUP, outputs, 2].
    """

    form: str
    codes: torch.Tensor
    scales: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The numbers that it stands for, rounded to `COMPUTED_IN`."""
        if self.form == INT8:
            return (self.codes.float() * self.scales.float()[:, None]).to(COMPUTED_IN)
        codes = unpacked(self.codes).float() - MIDDLE
        scale, offset = self.scales.float().transpose(0, 1)[..., None].unbind(2)
        return (codes.view(len(codes), -1, GROUP) * scale + offset).view(len(codes), -1).to(COMPUTED_IN)

    def to(self, device: torch.device) -> Quantized:
        """The same on a device."""
        return Quantized(self.form, self.codes.to(device), self.scales.to(device))


def joined(parts: Sequence[Quantized]) -> Quantized:
    """One matrix with the outputs of all, which are of one form and have the same inputs."""
    rows = 0 if parts[0].form == INT8 else 1
    codes = torch.cat([part.codes for part in parts])
    return Quantized(parts[0].form, codes, torch.cat([part.scales for part in parts], dim=rows))


def quantize(weight: torch.Tensor, form: str) -> Quantized:
    """The nearest that a dense matrix has in this form."""
    to = _to_int8 if form == INT8 else _to_int4
    return joined([to(rows) for rows in weight.split(max(1, SOUGHT_AT_ONCE // weight.shape[1]))])


def product(weight: Quantized, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`rows @ weight.T + bias` for rows in `COMPUTED_IN`; keeps what it needs of the matrix."""
    if weight.codes.device.type != "cpu":
        return lambda rows: F.linear(rows, weight.dense(), bias)
    if weight.form == INT8:
        return lambda rows: _plus(_by_int8(rows, weight), bias)
    packed = torch._convert_weight_to_int4pack_for_cpu(unpacked(weight.codes).int(), 1)
    multiply, scales = torch.ops.aten._weight_int4pack_mm_for_cpu, weight.scales
    return lambda rows: _plus(multiply(rows, packed, GROUP, scales), bias)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs / 2] of codes below 16 [outputs, inputs]."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] of what `packed` made."""
    return torch.stack([codes & 15, codes >> 4], dim=2).view(len(codes), -1)


def _by_int8(rows: torch.Tensor, weight: Quantized) -> torch.Tensor:
    if len(rows) < ROWS_DENSE:
        return torch._weight_int8pack_mm(rows, weight.codes, weight.scales)
    parts = weight.codes.split(max(1, WIDENED_AT_ONCE // rows.shape[1]))
    return torch.cat([F.linear(rows, codes.to(COMPUTED_IN)) for codes in parts], dim=1) * weight.scales


def _plus(made: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return made if bias is None else made + bias


def _to_int8(weight: torch.Tensor) -> Quantized:
    weight = weight.float()
    scales = (weight.abs().amax(dim=1) / LARGEST).clamp_min(1e-12).to(COMPUTED_IN)
    codes = torch.round(weight / scales.float()[:, None]).clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Quantized(INT8, codes, scales)


def _to_int4(weight: torch.Tensor) -> Quantized:
    """Of the ranges tried for each group, the one with the smallest squared error."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    best_error = torch.full_like(low, torch.inf)
    best_codes = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
    best = torch.zeros(*low.shape, 2, dtype=COMPUTED_IN, device=weight.device)
    for share in SHRINK:
        middle, reach = (low + high) / 2, (high - low) / 2 * share
        scale = (2 * reach / LEVELS).clamp_min(1e-12).to(COMPUTED_IN)
        offset = (middle - reach + MIDDLE * scale.float()).to(COMPUTED_IN)
        by, beyond = scale.float()[..., None], offset.float()[..., None]
        codes = (torch.round((groups - beyond) / by) + MIDDLE).clamp_(0, LEVELS)
        error = (((codes - MIDDLE) * by + beyond - groups) ** 2).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better[..., None], codes.to(torch.uint8), best_codes)
        best = torch.where(better[..., None], torch.stack([scale, offset], dim=2), best)
    return Quantized(INT4, packed(best_codes.view(len(weight), -1)), best.transpose(0, 1).contiguous())

"""Hidden states to bytes and back, as `helixnet.core.wire.activation` describes them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from helixnet.core.errors import UsageError
from helixnet.core.model import Manifest
from helixnet.core.wire.activation import GROUP, INT8, PAIR, Activation, groups_of

LARGEST = 127.0
SCALE_MAX = 65504.0
"""Of float16; a number 127 times as large is not in a model that works."""


def pack(hidden: torch.Tensor, residual: torch.Tensor | None, manifest: Manifest, packing: str) -> Activation:
    """`hidden` [tokens, hidden_size] as bytes, without copying them if they are on a CPU and go as they are.

    With a residual, what the layers put out is their sum. Raises UsageError if a pair is wanted and there is none.
    """
    tokens = hidden.shape[0]
    if packing == PAIR:
        if residual is None:
            raise UsageError("this engine's layers put out one tensor, not hidden state and residual")
        raw = torch.stack([hidden, residual], dim=1)
    else:
        hidden = hidden if residual is None else hidden + residual
        raw = _to_int8(hidden) if packing == INT8 else hidden
    data = raw.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data
    return Activation(manifest.dtype, tokens, manifest.hidden_size, data, packing)


def unpack(
    activation: Activation, manifest: Manifest, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden state [tokens, hidden_size] in the served dtype, and the residual if it came apart from it.

    Raises UsageError for another model's, or for numbers that are infinite or undefined.
    """
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    if (activation.dtype, activation.hidden_size) != (manifest.dtype, manifest.hidden_size):
        raise UsageError(
            f"an activation of {manifest.hidden_size} x {manifest.dtype} is needed, "
            f"not {activation.hidden_size} x {activation.dtype}"
        )
    # np.array: the frame it came in may be read-only and is not ours to keep.
    raw = torch.from_numpy(np.array(np.frombuffer(activation.data, dtype=np.uint8))).view(activation.tokens, -1)
    residual = None
    if activation.packing == INT8:
        hidden = _from_int8(raw.to(device), manifest.hidden_size, dtype)
    else:
        hidden = raw.view(dtype).to(device)
    if activation.packing == PAIR:
        hidden, residual = (half.contiguous() for half in hidden.chunk(2, dim=1))
    if not torch.isfinite(hidden).all() or (residual is not None and not torch.isfinite(residual).all()):
        raise UsageError("the activation holds infinite or undefined numbers")
    return hidden, residual


def _to_int8(hidden: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden_size] numbers as [tokens, bytes of a row]: 8 bits each, then a scale for each group."""
    groups = _grouped(hidden.float())
    scales = (groups.abs().amax(dim=2, keepdim=True) / LARGEST).clamp(max=SCALE_MAX).half()
    by = scales.float()
    numbers = torch.where(by > 0, groups / by, 0).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    flat = numbers.reshape(len(hidden), -1)[:, : hidden.shape[1]].contiguous()
    return torch.cat([flat.view(torch.uint8), scales[:, :, 0].contiguous().view(torch.uint8)], dim=1)


def _from_int8(raw: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = _grouped(raw[:, :hidden_size].contiguous().view(torch.int8).float())
    scales = raw[:, hidden_size:].contiguous().view(torch.float16).float()
    return (numbers * scales[:, :, None]).reshape(len(raw), -1)[:, :hidden_size].to(dtype)


def _grouped(rows: torch.Tensor) -> torch.Tensor:
    """[tokens, groups, GROUP], the last group padded with zeros."""
    width = rows.shape[1]
    count = groups_of(width)
    return F.pad(rows, (0, count * GROUP - width)).view(len(rows), count, GROUP)

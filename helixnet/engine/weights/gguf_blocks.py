"""Blocks of a GGUF file with 4 bits a number, in the layout that torch multiplies with: nothing is rounded but scales.

The layouts are those of GGML (`ggml-common.h`): numbers of a row in blocks, each with scales in float16, two numbers in
a byte, the first half of 32 in the low bits and the second in the high ones.
"""

from __future__ import annotations

import torch

from helixnet.engine.quantized import COMPUTED_IN, MIDDLE, Quantized, packed
from helixnet.engine.weights.keeping import GGUF_INT4, GROUP, INT4

HALF = GROUP // 2
SUPER = 256
"""Numbers in a block of a K type: eight groups."""


def as_int4(raw: torch.Tensor, kind: int, inputs: int, rows: torch.Tensor) -> Quantized:
    """A matrix [outputs, inputs] from its bytes [outputs, bytes of a row]; row i of it is the stored row `rows[i]`."""
    name = GGUF_INT4[kind]
    raw = raw[rows]
    if name == "Q4_K":
        codes, scale, least = _k_blocks(raw, inputs)
    else:
        codes, scale, least = _blocks(raw, inputs, has_least=name == "Q4_1")
    offset = least + MIDDLE * scale
    scales = torch.stack([scale, offset], dim=2).to(COMPUTED_IN).transpose(0, 1).contiguous()
    return Quantized(INT4, packed(codes.view(len(raw), inputs)), scales)


def _blocks(raw: torch.Tensor, inputs: int, has_least: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q4_0 and Q4_1: 32 numbers `code * scale + least`; Q4_0 has no `least`: there it is -8 times the scale."""
    blocks = raw.view(len(raw), inputs // GROUP, -1)
    head = blocks[..., : 4 if has_least else 2].contiguous().view(torch.float16).float()
    scale = head[..., 0]
    least = head[..., 1] if has_least else -MIDDLE * scale
    return _split(blocks[..., -HALF:]), scale, least


def _k_blocks(raw: torch.Tensor, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q4_K: eight groups `code * d * scale - dmin * least`, 6 bits for each scale and least, packed in 12 bytes."""
    blocks = raw.view(len(raw), inputs // SUPER, -1)
    d, dmin = blocks[..., :4].contiguous().view(torch.float16).float().unbind(-1)
    six = blocks[..., 4:16].int()
    first, second, third = six[..., :4], six[..., 4:8], six[..., 8:]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=-1).float()
    least = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=-1).float()
    codes = _split(blocks[..., 16:].reshape(*blocks.shape[:2], 4, GROUP), pairs=True)
    groups = (len(raw), inputs // GROUP)
    return codes, (d[..., None] * scale).view(groups), (-dmin[..., None] * least).view(groups)


def _split(bytes_of: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    """Low bits, then high bits, of each group of bytes: a group of numbers, or two groups of them."""
    return (
        torch.cat([bytes_of & 15, bytes_of >> 4], dim=-1)
        if not pairs
        else torch.stack([bytes_of & 15, bytes_of >> 4], -2)
    )

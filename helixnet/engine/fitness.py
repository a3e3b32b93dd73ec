"""Whether a family's layers can be run by us at all: not assumed from names, but tried, and compared with its own code.

transformers has more than a hundred decoder families. A layer fits if all it remembers of earlier tokens are keys and
values that it hands to the attention interface. Others keep a state of their own, or attend in a way of their own: they
would not fail, they would answer wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from helixnet.core.errors import ModelError
from helixnet.core.types import SessionId, Span
from helixnet.engine.attention import Row, Step
from helixnet.engine.fused import TOLERANCE, distance
from helixnet.engine.kv import KvPool

TOKENS, FIRST = 6, 3
"""Of the probe, and how many of them are run before the others."""

Run = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""The layer's own code on hidden states [1, tokens, size] of positions [1, tokens], with an attention mask or none."""


def refuse_unfit(architecture: str, config: Any, layer: int, run: Run, pool: KvPool, size: int) -> None:
    """Try a loaded layer: in two goes with our attention it must compute what it does in one with transformers' own.

    `pool` is a small one of the model's KV shape. Raises ModelError, which names the family.
    """
    try:
        expected = _as_written(config, run, pool, size)
        got = _in_two_goes(layer, run, pool, size)
        fits = all(_is_close(got[0, part], expected[0, part]) for part in (slice(FIRST), slice(FIRST, TOKENS)))
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"layers of {architecture} cannot be run by our engine ({_first_line(error)})") from error
    if not fits:
        raise ModelError(
            f"layers of {architecture} remember more than keys and values, or attend in a way of their own; our engine "
            "would compute something else"
        )


def _is_close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether most of these tokens are the same: a rounding may send one of them to another expert."""
    apart = sorted(distance(a, b) for a, b in zip(got, expected, strict=True))
    return apart[len(apart) // 2] <= TOLERANCE[got.dtype]


def _as_written(config: Any, run: Run, pool: KvPool, size: int) -> torch.Tensor:
    """All tokens at once, with the attention that is written in the model's own file."""
    hidden, positions = _probe(pool, size)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=hidden.device).tril()
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=hidden.dtype, device=hidden.device)
    mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)
    ours = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            return run(hidden, positions, mask)
    finally:
        config._attn_implementation = ours


def _in_two_goes(layer: int, run: Run, pool: KvPool, size: int) -> torch.Tensor:
    """Through our attention, the second time with the KV of the first."""
    hidden, positions = _probe(pool, size)
    session, span = SessionId("probe"), Span(layer, layer + 1)
    pool.reserve(session, span, TOKENS)
    made = []
    try:
        for start, stop in ((0, FIRST), (FIRST, TOKENS)):
            rows = [Row(pool.sessions[session], start, stop - start)]
            with torch.inference_mode(), Step(pool, span, rows, gather_pages=0) as step:
                made.append(run(hidden[:, start:stop], positions[:, start:stop], None))
            if layer not in step.rules:
                raise ValueError("they do not use transformers' attention interface")
    finally:
        pool.release(session)
    return torch.cat(made, dim=1)


def _probe(pool: KvPool, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = pool.k.device
    hidden = torch.sin(torch.arange(TOKENS * size, device=device)).view(1, TOKENS, size).to(pool.k.dtype)
    return hidden, torch.arange(TOKENS, device=device)[None]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

"""The usual decoder layer (Llama, Mistral, Qwen) in a third of the operations, used only where it proves equal.

At one token a step, a third of the time goes into the bookkeeping of some sixty small operations per layer.
A layer that has the usual parts gets its q, k and v projections joined into one matrix (and gate and up
likewise; nothing is stored twice) and is run in twenty.
Whether that computes the same is not assumed from names: both are run on a probe and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from helixnet.core.types import SessionId, Span
from helixnet.engine.attention import Row, Rule, Step, attend_rows, running_step
from helixnet.engine.kv import KvPool
from helixnet.engine.linears import Joined, Kept
from helixnet.engine.products import widened

PROBE_TOKENS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far a result may be from the module's, as `distance` measures it: a few roundings (0.6 to 1.2 % in bfloat16)."""


Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of positions."""


class FusedLayer:
    """Runs one decoder layer; `rotation` is what `rotation_of` makes of the layer's cosines and sines."""

    def __init__(self, layer: Any, number: int, kept: Kept) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._number = number
        self._dim: int = attention.head_dim
        stored = attention.q_proj.weight
        self.dtype = widened(stored.device, stored.dtype)
        """In which it computes, and `rotation` comes."""
        self._qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj], kept)
        self._norm_in = _norm(layer.input_layernorm, self.dtype)
        self._norm_mlp = _norm(layer.post_attention_layernorm, self.dtype)
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        self._norm_q = _norm(attention.q_norm, self.dtype) if hasattr(attention, "q_norm") else None
        self._norm_k = _norm(attention.k_norm, self.dtype) if hasattr(attention, "k_norm") else None
        self._out, self._down = Joined([attention.o_proj], kept), Joined([mlp.down_proj], kept)
        self._gate_up = Joined([mlp.gate_proj, mlp.up_proj], kept)
        self._activate: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self.rule = Rule(self._dim**-0.5, None, None, None)

    def run(self, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """`hidden` [1, tokens, hidden_size] through the layer, inside a running `Step`."""
        rows = hidden[0] if hidden.dtype == self.dtype else hidden[0].to(self.dtype)
        tokens = rows.shape[0]
        mixed = self._qkv(self._norm_in(rows)).view(tokens, -1, self._dim)
        turning, value = mixed[:, : -self._kv_heads], mixed[:, -self._kv_heads :]
        if self._norm_q is not None and self._norm_k is not None:
            turning = torch.cat([self._norm_q(turning[:, : self._heads]), self._norm_k(turning[:, self._heads :])], 1)
        cosines, sines = rotation
        turning = torch.addcmul(turning * cosines, turning.roll(self._dim // 2, 2), sines)
        query = turning[:, : self._heads].transpose(0, 1)[None]
        seen = attend_rows(running_step(), self._number, query, turning[:, self._heads :], value, self.rule)
        seen = seen[0].transpose(0, 1).reshape(tokens, -1)
        rows = rows + self._out(seen)
        gate, up = self._gate_up(self._norm_mlp(rows)).chunk(2, dim=1)
        # Between layers numbers are as short as on the wire: where a pipeline is cut changes nothing.
        rows = rows + self._down(self._activate(gate) * up)
        return rows[None] if rows.dtype == hidden.dtype else rows[None].to(hidden.dtype)

    def settle(self) -> None:
        """It has proved equal: the module's own matrices may go where a faster form stands in for them."""
        for joined in (self._qkv, self._out, self._down, self._gate_up):
            joined.settle()


def rotation_of(rotation: Rotation, dtype: torch.dtype) -> Rotation:
    """Cosines and sines [1, tokens, head_dim] as `[tokens, 1, head_dim]`, the sines signed for swapped halves.

    Rotating takes (x1, x2) to (-x2, x1); with the sign in the sines, swapping the halves is enough.
    """
    cosines, sines = rotation
    first, second = sines[0].chunk(2, dim=1)
    return cosines[0][:, None].to(dtype), torch.cat([-first, second], dim=1)[:, None].to(dtype)


def fuse(
    layer: Any,
    number: int,
    run_plainly: Callable[[torch.Tensor], torch.Tensor],
    rotation: Any,
    pool: KvPool,
    kept: Kept,
) -> FusedLayer | None:
    """The layer fused, or None if it is built otherwise or does not compute the same.

    `run_plainly` runs the module itself on the probe; `rotation` holds the probe's cosines and sines
    (`PROBE_TOKENS` positions from 0); `pool` is a small one of the layer's KV shape; `kept` are its quantized matrices,
    of which the module has the dense ones until this is settled.
    """
    if not _is_usual(layer) or rotation[0].shape[-1] != layer.self_attn.head_dim:
        return None
    size = layer.self_attn.q_proj.in_features
    weight = layer.self_attn.q_proj.weight
    probe = torch.sin(torch.arange(PROBE_TOKENS * size, device=weight.device)).view(1, PROBE_TOKENS, size)
    probe = probe.to(weight.dtype)
    session, span = SessionId("probe"), Span(number, number + 1)
    pool.reserve(session, span, PROBE_TOKENS)
    rows = [Row(pool.sessions[session], 0, PROBE_TOKENS)]
    try:
        with torch.inference_mode(), Step(pool, span, rows, gather_pages=0) as step:
            expected = run_plainly(probe)
            fused = FusedLayer(layer, number, kept)
            fused.rule = step.rules[number]
            got = fused.run(probe, rotation_of(rotation, fused.dtype))
    finally:
        pool.release(session)
    if distance(got, expected) > TOLERANCE[weight.dtype]:
        return None
    fused.settle()
    return fused


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two results are from one another, by the size of what was expected; all of their numbers count."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def _is_usual(layer: Any) -> bool:
    """Whether the layer has exactly the parts that `FusedLayer` runs."""
    children = {name for name, _ in layer.named_children()}
    if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    inside = {name for name, _ in attention.named_children()} - {"q_norm", "k_norm"}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    gates = {"gate_proj", "up_proj", "down_proj"}
    if inside != projections or {name for name, _ in mlp.named_children()} - {"act_fn"} != gates:
        return False
    linears = [getattr(attention, name) for name in projections] + [getattr(mlp, name) for name in gates]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return all(type(linear) is nn.Linear for linear in linears) and all(hasattr(norm, "weight") for norm in norms)


def _norm(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's RMS norm as one operation (the probe tells if it is something else)."""
    epsilon: float = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
    weight: torch.Tensor = module.weight.to(dtype)
    shape = tuple(weight.shape)
    return lambda rows: F.rms_norm(rows, shape, weight, epsilon)

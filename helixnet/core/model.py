"""What identifies a model, and the numbers the planner and the router need about it."""

from __future__ import annotations

import hashlib
from functools import cached_property

import msgspec

from helixnet.core.types import LAYERS_MAX

QUANTIZATION_CHARS_MAX = 32
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The identity of a model: two peers share a pipeline only if their manifests hash alike.

    Sizes are of the weights as served (in `dtype`), not as stored. `weights_sha256` covers every weight
    file or tensor; how it is built depends on the source and is part of `source_format`.

    Raises:
        ValueError: a size is not positive or the dtype is unknown.
    """

    name: str
    architecture: str
    """The transformers class, e.g. `LlamaForCausalLM`."""
    layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    """Of weights, activations and KV as served: float32, bfloat16 or float16."""
    layer_bytes: int
    """One decoder layer (the largest, if they differ)."""
    embedding_bytes: int
    """What the first stage holds besides its layers."""
    head_bytes: int
    """What the last stage holds besides its layers: final norm and output projection."""
    source_format: str
    """gguf or safetensors."""
    config_sha256: str
    tokenizer_sha256: str
    weights_sha256: str
    quantization: str = ""
    """In which fewer bits matrices of layers are kept: int8, int4, stored (as a GGUF file has them), or what the
    checkpoint itself says; empty if they are of `dtype`. Sizes are those of the kept form."""
    adapter_sha256: str = ""
    """Of an adapter that is merged into the weights: its file and the scale of each change."""

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= LAYERS_MAX:
            raise ValueError(f"a model needs 1 to {LAYERS_MAX} layers, not {self.layers}")
        if len(self.quantization) > QUANTIZATION_CHARS_MAX:
            raise ValueError("a quantization has a short name")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")
        for field in ("hidden_size", "vocab_size", "context_tokens", "kv_heads", "head_dim", "layer_bytes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be positive, not {getattr(self, field)}")

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical encoding of every field but `name`."""
        fields = msgspec.to_builtins(self)
        del fields["name"]
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()

    @property
    def activation_bytes(self) -> int:
        """What one token costs on a link between two stages."""
        return self.hidden_size * DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes(self) -> int:
        """What one token costs in KV memory, in each layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def span_bytes(self, start: int, stop: int) -> int:
        """Weights of the layers `[start, stop)`, with embedding and head where the span touches an end."""
        ends = (self.embedding_bytes if start == 0 else 0) + (self.head_bytes if stop == self.layers else 0)
        return (stop - start) * self.layer_bytes + ends


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a conversation becomes a prompt, and what ends an answer."""

    template: str | None
    """Jinja chat template, or None for a base model."""
    add_bos: bool
    """Whether a bare prompt (no template) starts with the beginning-of-sequence token."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    """Every id that ends generation: the eos ids and end-of-turn markers the checkpoint declares."""
    special_tokens: dict[str, str]
    """`bos_token`, `eos_token`, ... as the template refers to them."""

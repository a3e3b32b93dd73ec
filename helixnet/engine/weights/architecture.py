"""What a config says about a model: its transformers class, its skeleton without weights, its sizes.

Imports torch and transformers; only preparing a model and the engine need it.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from helixnet.core.errors import ModelError
from helixnet.core.model import DTYPE_BYTES
from helixnet.engine.weights.keeping import DENSE, form_bytes

MODELING_PREFIX = "transformers.models."
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def causal_class(config: Mapping[str, Any]) -> tuple[type, Any]:
    """The transformers class for text generation and its config object, from a checkpoint's config.json.

    Of a multimodal checkpoint only the text decoder is taken. Code shipped with a checkpoint is never run.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    plain = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        whole = AutoConfig.for_model(plain.pop("model_type"), **plain)
        text = whole if type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING else whole.get_text_config(decoder=True)
        if not getattr(text, "architectures", None):
            text.architectures = None
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        kind = config.get("model_type", "without a model_type")
        raise ModelError(f"this version of transformers has no text decoder for model type {kind!r}") from error


def load_class(modeling_module: str, architecture: str) -> Any:
    """The class by module and name, importing nothing but that module (importing the Auto classes costs a second)."""
    if not modeling_module.startswith(MODELING_PREFIX):
        raise ModelError(f"{modeling_module} is not one of transformers' own models; code of others is never run")
    return getattr(importlib.import_module(modeling_module), architecture)


def build_skeleton(model_class: Any, config: Any, dtype: str, attention: str) -> Any:
    """The whole model on the meta device: every parameter has its shape and none takes memory."""
    config = copy.deepcopy(config)
    config.use_cache = True
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return model.eval()


def layer_of(name: str) -> int | None:
    """The decoder layer a parameter belongs to, or None for the embedding, the final norm and the head."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def is_tied(model: Any) -> bool:
    """Whether the output projection is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def kv_shape(config: Any, name: str) -> tuple[int, int]:
    """Key-value heads and numbers of a head, of every layer. Raises ModelError if layers differ in that."""
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return int(kv_heads), int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    except (AttributeError, TypeError, ValueError) as error:  # also transformers' own for what is not the same in all
        raise ModelError(
            f"layers of {name} have keys and values of different shapes; this version cannot serve it"
        ) from error


def layer_linears(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the matrices in decoder layers that are multiplied as they are."""
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and layer_of(f"{name}.weight") is not None
    }


def sizes(model: Any, dtype: str, forms: Mapping[str, str]) -> tuple[int, int, int]:
    """Bytes as served of (the largest layer, what the first stage adds, what the last stage adds).

    `forms` says which matrices are kept in fewer bits. Raises ModelError if it has no list of layers.
    """
    width = DTYPE_BYTES[dtype]
    layers: dict[int, int] = {}
    embedding = model.get_input_embeddings().weight.numel() * width
    head = model.get_output_embeddings().weight.numel() * width
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = layer_of(name)
        if layer is not None:
            size = form_bytes(forms.get(name, DENSE), tuple(tensor.shape), width)
            layers[layer] = layers.get(layer, 0) + size
        elif id(tensor) not in ends:
            head += tensor.numel() * width
    if not layers:
        raise ModelError(f"{type(model).__name__} is not built of decoder layers that this version can split")
    return max(layers.values()), embedding, head


def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers no checkpoint holds (rotary frequencies, embedding scales), as transformers itself does."""
    saved = set(model.state_dict())
    for prefix, module in model.named_modules():
        computed = [name for name in module._buffers if f"{prefix}.{name}".lstrip(".") not in saved]
        if not computed:
            continue
        for name in computed:
            module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device=device)
        with torch.no_grad():
            model._init_weights(module)
        for name in computed:
            if torch.isnan(module._buffers[name]).any():
                raise ModelError(f"transformers does not say how to fill {prefix}.{name}; this model cannot be split")

"""Tiny random checkpoints for tests: real architectures, made in milliseconds, in the hub's file layout."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = 4
VOCAB = 128
HIDDEN = 64
CONTEXT = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    # Sliding and full layers alternate, each with its own rotary base; embeddings are scaled, logits capped.
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": None,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 20.0,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    # Norms after attention and feed-forward instead of before, and over all heads together.
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 12, "num_experts_per_tok": 2},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    },
}

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    shard_bytes: int | None = None,
    dtype: str = "float32",
    **settings: Any,
) -> Path:
    """Write a random `family` checkpoint into `folder` (created): config, tokenizer, safetensors; returns `folder`.

    `shard_bytes` splits the weights into several files with an index; further settings are those of the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {**_COMMON, **FAMILIES[family], **settings}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
            elif name.endswith(("sinks", "bias")):
                value.normal_()
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_bytes or "1GB")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer with words `w3` ... and three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def reference(folder: Path, dtype: str = "float32") -> Any:
    """Transformers' own whole model of a checkpoint folder.

    With its plainest attention: the others leave out what their kernels have no word for, such as Gemma 2's soft caps.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


ADAPTED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def write_adapter(folder: Path, checkpoint: Path, modules: Sequence[str] = ADAPTED, **settings: Any) -> Path:
    """Write a random LoRA adapter for layers 1 and 3 of a checkpoint, laid out as PEFT does; returns `folder`."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(modules), "bias": "none", **settings}
    parameters = dict(reference(checkpoint).named_parameters())
    tensors = {}
    for name in (f"model.layers.{layer}.{module}" for layer in (1, 3) for module in modules):
        outputs, inputs = parameters[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(config["r"], inputs) * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, config["r"]) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def beside_adapter(model: Any, folder: Path, scale: float) -> Any:
    """Transformers' model, each adapted layer of which adds scale * B (A x) to what it puts out: nothing is merged."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")

    def add(name: str, a: Any, b: Any) -> None:
        model.get_submodule(name).register_forward_hook(lambda _, given, out: out + scale * (given[0] @ a.T) @ b.T)

    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            add(name, a, tensors[key.replace("lora_A", "lora_B")])
    return model


def reference_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens transformers' own greedy `generate` puts after `prompt` (stop ids do not stop it)."""
    import torch

    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in output[0, len(prompt) :]]


def write_gguf(path: Path, *, seed: int = 0, layers_in: str | None = None) -> Path:
    """Write a tiny random Llama as a GGUF file, as llama.cpp's converter would.

    Float32, with Q8_0 for the feed-forward; or all matrices of layers in the GGML type `layers_in`.
    """
    import gguf
    import numpy as np

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads, dim, inner = 4, 2, 16, 96
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<unk>", "<s>", "</s>", *"t23", "t2", "t3", *(f"x{index}" for index in range(8, VOCAB))])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["t 2", "t 3"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int, quantized: bool = False) -> None:
        values: Any = (random.standard_normal(shape) * 0.3).astype(np.float32)
        if name.endswith("norm.weight"):
            values = 1 + values / 3
        in_layer = layers_in is not None and len(shape) == 2 and name.startswith("blk")
        if quantized or in_layer:
            kind = gguf.GGMLQuantizationType[layers_in if in_layer and layers_in else "Q8_0"]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        add(prefix + "attn_norm.weight", HIDDEN)
        add(prefix + "ffn_norm.weight", HIDDEN)
        add(prefix + "attn_q.weight", heads * dim, HIDDEN)
        add(prefix + "attn_k.weight", kv_heads * dim, HIDDEN)
        add(prefix + "attn_v.weight", kv_heads * dim, HIDDEN)
        add(prefix + "attn_output.weight", HIDDEN, heads * dim)
        add(prefix + "ffn_gate.weight", inner, HIDDEN, quantized=True)
        add(prefix + "ffn_up.weight", inner, HIDDEN, quantized=True)
        add(prefix + "ffn_down.weight", HIDDEN, inner, quantized=True)
    add("output_norm.weight", HIDDEN)
    add("output.weight", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@functools.lru_cache(maxsize=1)
def whole_from_gguf(path: str) -> Any:
    """The whole model as transformers itself reads a Llama-like GGUF file, in float32.

    That takes half a minute for the default model, so the last one is kept.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    whole = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    whole.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=whole)["tensors"], strict=False)
    whole.tie_weights()
    return whole

"""Tiny checkpoints that vLLM's kernels for CPUs can compute: their heads have 32 numbers at least."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny_models import FAMILIES, write_checkpoint

WHOLE_ONLY = {"olmo2"}
"""vLLM 0.32 serves these through transformers' code, which it cannot enter in the middle."""
EXPERTS = ["gpt_oss", "mixtral", "qwen3_moe"]
SPLIT = [*EXPERTS, *sorted(FAMILIES.keys() - WHOLE_ONLY - set(EXPERTS))]
"""Those with experts first: a process's first model decides whether vLLM makes a group of processes for experts."""


def write(folder: Path, family: str, dtype: str = "float32") -> Path:
    """Write a random checkpoint of the family into `folder`."""
    return write_checkpoint(folder, family, dtype=dtype, head_dim=32, hidden_size=128, intermediate_size=192)


def write_int8(folder: Path) -> Path:
    """Write a random Llama whose matrices came in 8 bits, and activations are to be rounded so (compressed-tensors)."""
    from safetensors.torch import load_file, save_file
    from torch import int8

    write(folder, "llama", "bfloat16")
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            scale = value.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (value.float() / scale).round().to(int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    of_linears = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": of_linears},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder

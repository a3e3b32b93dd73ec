"""Tiny checkpoints that vLLM's kernels for CPUs can compute: their heads have 32 numbers at least."""

from __future__ import annotations

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

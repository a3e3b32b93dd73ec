"""Engines that are compared, seen from the script that compares them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engine_workers


class Remote:
    """An engine in a process of its own."""

    def __init__(self, name: str, checkpoint: Path, python: str = sys.executable, threads: int = 1) -> None:
        self.name = name
        command = [python, engine_workers.__file__, name, str(checkpoint), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load_s = self._answer()

    def do(self, method: str, *arguments: int) -> float:
        """Seconds that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} engine ended: exit code {self._process.wait(timeout=10)}")
        return float(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def checkpoint_folder() -> Path:
    """The default model as other engines read it: bf16 safetensors, made once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from helixnet.engine.weights.catalog import prepare
    from helixnet.engine.weights.prepared import cache_root

    folder = cache_root() / "bench" / "smollm2-bf16"
    if not (folder / "config.json").exists():
        path = prepare(None).record.files[0].path
        whole = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"]))
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=whole)["tensors"]
        whole.load_state_dict(tensors, strict=False)
        whole.tie_weights()
        whole.to(torch.bfloat16).save_pretrained(folder)
    return folder

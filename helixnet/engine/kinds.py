"""Which engines there are on this machine, and how one is made."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from helixnet.core.errors import UsageError
from helixnet.engine.base import Engine
from helixnet.engine.weights import keeping
from helixnet.engine.weights.prepared import PreparedModel

WISHES = ("auto", "torch", "vllm")
ASK_S = 30.0
_ASK_VERSION = """
import importlib.metadata, importlib.util
if importlib.util.find_spec("vllm"):
    names = importlib.metadata.packages_distributions()["vllm"]
    print(names[0], importlib.metadata.version(names[0]))
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """One engine that may be made here."""

    name: str
    """torch or vllm."""
    version: str
    """Of all that decides how fast it is; measured again when this changes."""
    python: str = ""
    """Who runs it, if not this process."""

    def make(self, model: PreparedModel, device: str, memory_bytes: int, threads: int | None) -> Engine:
        """A new engine with nothing loaded. `threads` is for CPUs.

        Raises HelixError for whatever keeps it from being made.
        """
        if self.name == "vllm":
            from helixnet.engine.remote import RemoteEngine

            return RemoteEngine(
                model,
                engine="vllm",
                device=device,
                memory_bytes=memory_bytes,
                threads=threads or 1,
                python=self.python,
            )
        from helixnet.engine.torch_engine import TorchEngine

        return TorchEngine(model, device=device, memory_bytes=memory_bytes, threads=threads)


def torch_kind() -> Kind:
    """Our own engine; it is always here."""
    import torch
    import transformers

    return Kind("torch", f"torch {torch.__version__}, transformers {transformers.__version__}")


def vllm_kind(python: str | None) -> Kind | None:
    """vLLM, where `python` (or this one) has it; None if it has not.

    Raises UsageError if there is no such interpreter.
    """
    program = python or sys.executable
    try:
        said = subprocess.run([program, "-c", _ASK_VERSION], capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{program} cannot be run ({error}); check --vllm-python") from error
    version = said.stdout.strip()
    return Kind("vllm", version, program) if said.returncode == 0 and version else None


def kinds_for(wish: str, device: str, vllm_python: str | None = None, quantization: str = "") -> tuple[Kind, ...]:
    """The engines that come into question for `auto`, `torch` or `vllm`, ours first.

    Each knows its own ways to keep weights in fewer bits; `quantization` is the model's. Raises UsageError if what was
    asked for is not there, or does not know this one.
    """
    if quantization:
        wish = _knowing(quantization, wish)
    found = vllm_kind(vllm_python) if wish != "torch" and device != "mps" and sys.platform == "linux" else None
    if wish == "vllm" and found is None:
        raise UsageError(
            f"vLLM is not installed for {vllm_python or sys.executable}: `pip install 'helixnet-swarm[vllm]'`, or say "
            "with --vllm-python which Python has it; or use --engine torch"
        )
    if wish == "vllm" and found is not None:
        return (found,)
    return (torch_kind(), found) if found is not None else (torch_kind(),)


def _knowing(quantization: str, wish: str) -> str:
    """Which one has to be asked for, since only it knows these weights."""
    only = "torch" if keeping.is_ours(quantization) else "vllm"
    if wish not in (only, "auto"):
        raise UsageError(f"weights in {quantization} can only be served with --engine {only}, not with {wish}")
    return only

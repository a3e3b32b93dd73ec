"""A LoRA adapter merged as weights are read: answers of the unmerged model, an identity of its own, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helixnet.core.errors import CorruptCheckpoint, HelixError, ModelError, UnknownModel, UnsafeCheckpoint, UsageError
from helixnet.core.types import Span
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import Pipeline
from tests.tiny_models import (
    LAYERS,
    beside_adapter,
    reference,
    reference_tokens,
    write_adapter,
    write_checkpoint,
    write_gguf,
)

PROMPT = [5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23]
NEW = 12
MODULES = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.k_proj", "mlp.gate_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),  # fused in the checkpoint
    "qwen3_moe": ("self_attn.v_proj",),
}


def tokens_of(model: PreparedModel, *cuts: int) -> list[int]:
    spans = [Span(a, b) for a, b in zip((0, *cuts), (*cuts, LAYERS), strict=True)]
    stages = []
    for span in spans:
        engine = TorchEngine(model, device="cpu", memory_bytes=8_000_000)
        engine.load(span)
        stages.append((engine, span))
    return Pipeline(stages, "s", len(PROMPT) + NEW).generate(PROMPT, NEW)


@pytest.mark.parametrize("family", sorted(MODULES))
def test_merged_or_beside_its_layers_it_answers_the_same(family: str, tmp_path: Path, cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", family)
    adapter = write_adapter(tmp_path / "accent", checkpoint, MODULES[family])
    right = reference_tokens(beside_adapter(reference(checkpoint), adapter, scale=6 / 4), PROMPT, NEW)
    assert right != reference_tokens(reference(checkpoint), PROMPT, NEW)
    model = prepare(str(checkpoint), adapter=str(adapter))
    assert tokens_of(model) == tokens_of(model, 2) == right


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 9, "use_rslora": True}, 6 / 3),
        ({"alpha_pattern": {"q_proj": 8, r"layers\.\d+\.self_attn\.o_proj": 8, "down_proj": 8}}, 8 / 4),
        ({"lora_alpha": 2}, 2 / 4),
    ],
)
def test_the_scale_is_what_the_adapter_says(
    settings: dict[str, Any], scale: float, tmp_path: Path, cache: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    adapter = write_adapter(tmp_path / "accent", checkpoint, **settings)
    right = reference_tokens(beside_adapter(reference(checkpoint), adapter, scale), PROMPT, NEW)
    assert tokens_of(prepare(str(checkpoint), adapter=str(adapter))) == right


def test_single_experts_are_merged_before_they_are_put_together(tmp_path: Path, cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", "qwen3_moe")
    stored = load_file(checkpoint / "model.safetensors")
    module = "model.layers.1.mlp.experts.2.down_proj"
    outputs, inputs = stored[f"{module}.weight"].shape
    a, b = torch.randn(3, inputs), torch.randn(outputs, 3)
    adapter = adapter_of(tmp_path / "accent", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, r=3)
    merged = write_checkpoint(tmp_path / "merged", "qwen3_moe")
    stored[f"{module}.weight"] += 2.0 * b @ a
    save_file(stored, merged / "model.safetensors", metadata={"format": "pt"})
    assert tokens_of(prepare(str(checkpoint), adapter=str(adapter))) == tokens_of(prepare(str(merged)))
    assert tokens_of(prepare(str(checkpoint))) != tokens_of(prepare(str(merged)))


def adapter_of(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("quantize", [None, "int4", "stored"])
def test_a_gguf_file_takes_one_too(quantize: str | None, tmp_path: Path, cache: Path) -> None:
    """Also a matrix that would otherwise be kept as the file has it."""
    gguf = write_gguf(tmp_path / "tiny.gguf", layers_in="Q4_0")
    module, how = "model.layers.2.self_attn.q_proj", {"dtype": None if quantize else "float32", "quantize": quantize}
    tensors = {
        f"{module}.lora_A.default.weight": torch.zeros(4, 64),
        f"{module}.lora_B.default.weight": torch.ones(64, 4),
    }
    nothing = prepare(str(gguf), adapter=str(adapter_of(tmp_path / "nothing", tensors)), **how)  # type: ignore[arg-type]
    assert tokens_of(nothing) == tokens_of(prepare(str(gguf), **how))  # type: ignore[arg-type]
    tensors[f"{module}.lora_A.default.weight"] = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    much = prepare(str(gguf), adapter=str(adapter_of(tmp_path / "much", tensors)), **how)  # type: ignore[arg-type]
    assert tokens_of(much) != tokens_of(nothing)


def test_the_merged_model_is_another_model(tmp_path: Path, cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    adapter = write_adapter(tmp_path / "accent", checkpoint)
    plain, merged = prepare(str(checkpoint)), prepare(str(checkpoint), adapter=str(adapter))
    assert merged.manifest.name == "tiny+accent"
    assert merged.manifest.hash != plain.manifest.hash
    assert prepare(str(checkpoint), adapter=str(adapter)).manifest == merged.manifest
    elsewhere = write_adapter(tmp_path / "elsewhere" / "accent", checkpoint)
    assert prepare(str(checkpoint), adapter=str(elsewhere)).manifest.hash == merged.manifest.hash
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 60}))
    louder = prepare(str(checkpoint), adapter=str(adapter))
    assert louder.manifest.hash != merged.manifest.hash
    with pytest.raises(CorruptCheckpoint, match="adapter_config"):
        merged.source()


def test_what_is_no_lora_adapter_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    other = write_checkpoint(tmp_path / "other", hidden_size=32)
    some = load_file(write_adapter(tmp_path / "some", checkpoint) / "adapter_model.safetensors")
    half = {key: value for key, value in some.items() if "lora_A" in key}
    pickled = write_adapter(tmp_path / "pickled", checkpoint)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    damaged = write_adapter(tmp_path / "damaged", checkpoint)
    (damaged / "adapter_model.safetensors").write_bytes(b"not this")
    unreadable = write_adapter(tmp_path / "unreadable", checkpoint)
    (unreadable / "adapter_config.json").write_text("[")
    cases: list[tuple[Path, type[HelixError], str]] = [
        (tmp_path / "nowhere", UnknownModel, "no folder"),
        (checkpoint, UnknownModel, "no adapter_config.json"),
        (pickled, UnsafeCheckpoint, "pickle"),
        (damaged, CorruptCheckpoint, "damaged"),
        (unreadable, CorruptCheckpoint, "damaged"),
        (write_adapter(tmp_path / "ia3", checkpoint, peft_type="IA3"), ModelError, "IA3"),
        (write_adapter(tmp_path / "dora", checkpoint, use_dora=True), ModelError, "use_dora"),
        (write_adapter(tmp_path / "biased", checkpoint, bias="all"), ModelError, "bias"),
        (write_adapter(tmp_path / "nan", checkpoint, lora_alpha="much"), CorruptCheckpoint, "lora_alpha"),
        (write_adapter(tmp_path / "small", other), ModelError, "another model"),
        (adapter_of(tmp_path / "half", half), CorruptCheckpoint, "half"),
        (adapter_of(tmp_path / "empty", {}), CorruptCheckpoint, "any matrix"),
        (adapter_of(tmp_path / "more", {**some, "lm_head.weight": torch.ones(1)}), ModelError, "lm_head"),
        (
            adapter_of(tmp_path / "far", {key.replace("layers.1", "layers.9"): some[key] for key in some}),
            ModelError,
            "stores no matrix",
        ),
    ]
    for folder, kind, words in cases:
        with pytest.raises(kind, match=words):
            prepare(str(checkpoint), adapter=str(folder))


def test_what_has_one_already_or_came_quantized_takes_none(tmp_path: Path, cache: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    adapter = str(write_adapter(tmp_path / "accent", checkpoint))
    merged = prepare(str(checkpoint), adapter=adapter)
    with pytest.raises(UsageError, match="adapter already"):
        prepare(str(merged.folder), adapter=adapter)
    came_so = write_checkpoint(tmp_path / "quantized")
    config = json.loads((came_so / "config.json").read_text())
    (came_so / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "theirs"}}))
    with pytest.raises(UsageError, match="theirs"):
        prepare(str(came_so), adapter=adapter)

"""A family that our engine cannot run is refused by its name, and never answers wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helixnet.core.errors import ModelError
from helixnet.core.types import Span
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from tests import tiny_models
from tests.tiny_models import LAYERS, write_checkpoint

UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "attends in a way of its own": ({"model_type": "diffllama"}, "DiffLlamaForCausalLM.*something else"),
    "has a convolution": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
        "Lfm2ForCausalLM",
    ),
    "compresses its KV": (
        {
            "model_type": "deepseek_v2",
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": LAYERS,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        "DeepseekV2ForCausalLM",
    ),
    "has no rotary positions": ({"model_type": "opt", "word_embed_proj_dim": 64, "ffn_dim": 96}, "OPTForCausalLM"),
    "has layers of other names": ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2}, "MptForCausalLM"),
}


def serve(folder: Path) -> None:
    TorchEngine(prepare(str(folder)), device="cpu", memory_bytes=20_000_000).load(Span(0, 2))


@pytest.mark.parametrize(("settings", "says"), UNFIT.values(), ids=UNFIT.keys())
def test_a_family_is_refused_by_name_that(
    settings: dict[str, Any], says: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.FAMILIES, "unfit", settings)
    folder = write_checkpoint(tmp_path / "tiny", "unfit")
    with pytest.raises(ModelError, match=says):
        serve(folder)


def test_what_was_held_before_is_still_held_then(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model_type": "lfm2", "layer_types": ["full_attention", "full_attention", "conv", "full_attention"]}
    monkeypatch.setitem(tiny_models.FAMILIES, "half", settings)
    folder = write_checkpoint(tmp_path / "tiny", "half")
    engine = TorchEngine(prepare(str(folder)), device="cpu", memory_bytes=20_000_000)
    engine.load(Span(0, 2))
    free = engine.kv_tokens_free
    with pytest.raises(ModelError, match="Lfm2ForCausalLM"):
        engine.load(Span(0, LAYERS))
    assert engine.held() == (Span(0, 2),) and engine.kv_tokens_free == free

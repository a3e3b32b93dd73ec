"""Stages on vLLM's layers put out the very logits of vLLM's own `LLM` when they run what it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helixnet.engine.weights.catalog import prepare
from tests.tiny_models import LAYERS
from tests.vllm import families

ROOT = Path(__file__).parents[2]
SPLITS = [[0, LAYERS], [0, 2, LAYERS], [*range(LAYERS + 1)]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each family, in bfloat16: what `LLM` said, and how far from it the stages were."""
    root = tmp_path_factory.mktemp("bitwise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(root / "cache"))
        folders = [families.write(root / family, family, "bfloat16") for family in families.SPLIT]
        asked = [[str(folder), str(prepare(str(folder)).folder), SPLITS] for folder in folders]
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("side.py"))],
        input=json.dumps(asked) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    return dict(zip(families.SPLIT, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("family", families.SPLIT)
def test_stages_that_hand_on_both_of_vllms_tensors_equal_its_whole_model_bit_for_bit(
    family: str, said: dict[str, Any]
) -> None:
    assert said[family]["steps"] > 5 and all(len(tokens) > 1 for tokens in said[family]["tokens"])
    assert said[family]["exact"] == [0.0] * len(SPLITS)


@pytest.mark.parametrize("family", families.SPLIT)
def test_one_stage_equals_it_anyway(family: str, said: dict[str, Any]) -> None:
    assert said[family]["summed"] == 0.0

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
INT8 = "llama in int8"
EVERY = [*families.SPLIT, INT8]
SPLITS = [[0, LAYERS], [0, 2, LAYERS], [*range(LAYERS + 1)]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each family, in bfloat16: what `LLM` said, and how far from it the stages were."""
    root = tmp_path_factory.mktemp("bitwise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(root / "cache"))
        folders = [families.write(root / family, family, "bfloat16") for family in families.SPLIT]
        folders.append(families.write_int8(root / INT8))
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
    return dict(zip(EVERY, map(json.loads, ran.stdout.splitlines()), strict=True))


def of(family: str, said: dict[str, Any]) -> dict[str, Any]:
    """What was found of a family. Products in 8 bits need a processor that has them."""
    if family == INT8 and "refused" in said[family]:
        pytest.skip(f"vLLM itself does not serve it here: {said[family]['refused']}")
    found: dict[str, Any] = said[family]
    return found


@pytest.mark.parametrize("family", EVERY)
def test_stages_that_hand_on_both_of_vllms_tensors_equal_its_whole_model_bit_for_bit(
    family: str, said: dict[str, Any]
) -> None:
    found = of(family, said)
    assert found["steps"] > 5 and all(len(tokens) > 1 for tokens in found["tokens"])
    assert found["exact"] == [0.0] * len(SPLITS)


@pytest.mark.parametrize("family", EVERY)
def test_one_stage_equals_it_anyway(family: str, said: dict[str, Any]) -> None:
    assert of(family, said)["summed"] == 0.0

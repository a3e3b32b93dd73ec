"""The embedded default model, real weights: the tokens of transformers' own `generate`, in uneven stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from helixnet.core.types import Span
from helixnet.engine.kinds import vllm_kind
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import Pipeline
from tests.tiny_models import reference_tokens, whole_from_gguf

pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
)
NEW = 16
VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"


@pytest.fixture(scope="module")
def model() -> PreparedModel:
    return prepare(None)


@pytest.fixture(scope="module")
def whole(model: PreparedModel) -> Any:
    return whole_from_gguf(model.record.files[0].path)


def prompt_of(model: PreparedModel, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return list(Tokenizer.from_file(str(model.tokenizer_path)).encode(text).ids)


@pytest.mark.timeout(300)
def test_three_stages_say_what_the_whole_model_says(model: PreparedModel, whole: Any) -> None:
    stages = []
    for held, runs in ((Span(0, 13), Span(0, 9)), (Span(5, 22), Span(9, 20)), (Span(20, 30), Span(20, 30))):
        engine = TorchEngine(model, device="cpu", memory_bytes=600_000_000)
        engine.load(held)
        stages.append((engine, runs))
    for number, question in enumerate(QUESTIONS):
        prompt = prompt_of(model, question)
        tokens = Pipeline(stages, f"s{number}", 80).generate(prompt, NEW, chunk=9)
        assert tokens == reference_tokens(whole, prompt, NEW), question


@pytest.mark.timeout(300)
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="scripts/setup --vllm was not run")
def test_vllm_says_it_too(model: PreparedModel, whole: Any) -> None:
    kind = vllm_kind(str(VLLM_PYTHON))
    assert kind is not None, "the environment of scripts/setup --vllm has it"
    engine = kind.make(model, "cpu", 900_000_000, 1)
    try:
        layers = Span(0, model.manifest.layers)
        engine.load(layers)
        for number, question in enumerate(QUESTIONS):
            prompt = prompt_of(model, question)
            tokens = Pipeline([(engine, layers)], f"s{number}", 80).generate(prompt, NEW, chunk=9)
            assert tokens == reference_tokens(whole, prompt, NEW), question
    finally:
        engine.close()


def test_it_knows_the_capital_of_france(model: PreparedModel) -> None:
    engine = TorchEngine(model, device="cpu", memory_bytes=900_000_000)
    engine.load(Span(0, model.manifest.layers))
    tokens = Pipeline([(engine, Span(0, 30))], "s", 80).generate(prompt_of(model, QUESTIONS[0]), 8)
    assert "Paris" in Tokenizer.from_file(str(model.tokenizer_path)).decode(tokens)

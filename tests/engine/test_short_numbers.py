"""bfloat16 and float16 on a CPU: as right as transformers' own arithmetic with them, and in no more memory."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helixnet.core.stage.work import Work
from helixnet.core.types import SessionId, Span
from helixnet.engine import products
from helixnet.engine.products import HALF_MAX, Product, has_own_form
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import Pipeline, logits_after
from tests.tiny_models import LAYERS, reference, write_checkpoint

MEMORY = 8_000_000
ALL = Span(0, LAYERS)
PROMPT = [5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23, 56, 31]
CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["this CPU", "a CPU without short arithmetic"], autouse=True)
def without_short_arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(products, "_multiplies", lambda _: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_product_is_that_of_its_numbers(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = (0.05 * torch.randn(48, 32)).to(dtype), torch.randn(48).to(dtype)
    product = Product(weight, bias)
    given = torch.randn(rows, 32).to(product.dtype)
    expected = F.linear(given.double(), weight.double(), bias.double())
    exact = product.dtype == torch.float32
    torch.testing.assert_close(product(given).double(), expected, rtol=0, atol=1e-5 if exact else 2e-2)


def test_numbers_that_float16_has_not_are_multiplied_as_they_are() -> None:
    weight = torch.eye(4, dtype=torch.bfloat16) * 2 * HALF_MAX
    product = Product(weight, None)
    assert product.dtype == torch.bfloat16
    assert float(product(torch.ones(1, 4, dtype=torch.bfloat16)).max()) == pytest.approx(2 * HALF_MAX, rel=0.01)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"], ids=["untied", "tied", "capped"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param) / "tiny", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder.parent / "cache"))
        return prepare(str(folder), dtype="bfloat16")


def an_engine(model: PreparedModel, *spans: Span) -> TorchEngine:
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    for span in spans:
        engine.load(span)
    return engine


def rms(numbers: torch.Tensor) -> float:
    return float(numbers.pow(2).mean().sqrt())


def test_what_is_computed_is_no_farther_from_the_truth_than_transformers(model: PreparedModel) -> None:
    folder = Path(model.record.files[0].path).parent
    theirs, truth = reference(folder, "bfloat16"), reference(folder)
    truth.load_state_dict({name: value.float() for name, value in theirs.state_dict().items()})
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        right = truth(ids).logits[0, -1]
        their_error = rms(theirs(ids).logits[0, -1].float() - right)
    assert rms(logits_after(an_engine(model, ALL), ALL, PROMPT) - right) <= 1.5 * their_error


def test_every_split_gives_the_same_tokens(model: PreparedModel) -> None:
    whole = Pipeline([(an_engine(model, ALL), ALL)], "s", 40).generate(PROMPT, 12)
    for cut in range(1, LAYERS):
        front, back = Span(0, cut), Span(cut, LAYERS)
        stages = [(an_engine(model, front), front), (an_engine(model, back), back)]
        assert Pipeline(stages, "s", 40).generate(PROMPT, 12) == whole


def test_ends_may_come_and_go_in_any_order_and_memory_is_counted(model: PreparedModel) -> None:
    expected = Pipeline([(an_engine(model, ALL), ALL)], "s", 40).generate(PROMPT, 6)
    free = an_engine(model, ALL).kv_tokens_free
    for order in permutations((Span(0, 1), Span(1, 3), Span(3, LAYERS))):
        engine = an_engine(model, *order)
        assert Pipeline([(engine, ALL)], "s", 40).generate(PROMPT, 6) == expected
        engine.release(SessionId("s"))
        assert engine.kv_tokens_free == free
        for kept in (order[0], order[2]):
            engine.drop(kept)
            assert engine.kv_tokens_free == an_engine(model, kept).kv_tokens_free
            engine.load(ALL)
            assert Pipeline([(engine, ALL)], "s", 40).generate(PROMPT, 6) == expected
            engine.release(SessionId("s"))


def test_a_head_that_is_stored_twice_is_stored_twice_only_where_both_forms_are_used(model: PreparedModel) -> None:
    engine = an_engine(model, Span(3, LAYERS))
    stored = engine._model._ends.output.weight
    assert stored.is_meta == has_own_form(CPU, torch.bfloat16)
    engine.load(ALL)
    ids = torch.tensor([1, 2])
    assert torch.isfinite(engine._model.embed(ids)).all()
    work = Work(session=SessionId("x"), layers=ALL, position=0, token_ids=(1,))
    engine.open(work.session, ALL, 4)
    assert engine.run([work])[0].error is None

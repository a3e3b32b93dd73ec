"""Matrices in 8 and 4 bits: right products, the family's own answers for those numbers, memory counted, GGUF's own."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helixnet.core.errors import ModelError, UsageError
from helixnet.core.types import SessionId, Span
from helixnet.engine import products, quantized
from helixnet.engine.kinds import kinds_for
from helixnet.engine.linears import Joined
from helixnet.engine.products import Product
from helixnet.engine.quantized import COMPUTED_IN, Quantized, joined, packed, quantize, unpacked
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights import architecture, keeping
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.gguf_blocks import as_int4
from helixnet.engine.weights.keeping import GGUF_INT4, GROUP, INT4, INT8, form_bytes, form_of
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import Pipeline, logits_after
from tests.tiny_models import FAMILIES, LAYERS, reference, write_checkpoint, write_gguf

ALL = Span(0, LAYERS)
FORMS = (INT8, INT4)
MEMORY = 8_000_000
PROMPT = [5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23, 56, 31]
FAST = ("gemma3", "qwen3")
"""Layers that are fused and such as are not."""
STEPS = {INT8: 2 * 127, INT4: 15}


def a_matrix(outputs: int = 48, inputs: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(COMPUTED_IN)


# --- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 23, 24, 70])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_a_product_is_that_of_the_numbers_that_are_kept(form: str, rows: int, has_bias: bool) -> None:
    weight, given = quantize(a_matrix(), form), a_matrix(rows, 96, seed=1)
    bias = a_matrix(1, 48, seed=2)[0] if has_bias else None
    expected = F.linear(given.double(), weight.dense().double(), None if bias is None else bias.double())
    got = Product(weight, bias)(given).double()
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_near_what_there_was(form: str) -> None:
    weight = a_matrix().float()
    ranges = weight if form == INT8 else weight.view(len(weight), -1, GROUP)
    reach = 2 * ranges.abs().amax(-1) if form == INT8 else ranges.amax(-1) - ranges.amin(-1)
    error = (quantize(weight, form).dense().float() - weight).view(ranges.shape).pow(2).mean(-1).sqrt()
    step = reach / STEPS[form]
    assert (error <= 0.4 * step + 2e-3 * weight.abs().max()).all()  # evenly spread it would be 0.29 of a step


def test_a_group_of_equal_numbers_and_one_of_zeros_are_kept_as_they_are() -> None:
    weight = torch.zeros(16, 2 * GROUP)
    weight[:, :GROUP] = 0.5
    for form in FORMS:
        assert torch.equal(quantize(weight, form).dense().float(), weight)


def test_codes_are_packed_two_in_a_byte() -> None:
    codes = torch.randint(16, (5, 64), dtype=torch.uint8)
    assert packed(codes).shape == (5, 32)
    assert torch.equal(unpacked(packed(codes)), codes)


@pytest.mark.parametrize("form", FORMS)
def test_joined_matrices_have_the_outputs_of_all(form: str) -> None:
    parts = [quantize(a_matrix(16 * n, seed=n), form) for n in (1, 2, 3)]
    assert torch.equal(joined(parts).dense(), torch.cat([part.dense() for part in parts]))


def test_some_of_the_matrices_that_are_joined_may_be_dense() -> None:
    linears = [nn.Linear(96, outputs, bias=bias, dtype=COMPUTED_IN) for outputs, bias in ((32, True), (48, False))]
    kept = {linears[1]: quantize(linears[1].weight.detach(), INT4)}
    both, rows = Joined(linears, kept), a_matrix(3)
    with torch.inference_mode():
        expected = torch.cat([linears[0](rows), F.linear(rows, kept[linears[1]].dense())], dim=1)
        torch.testing.assert_close(both(rows), expected, rtol=0, atol=2e-2)
        both.settle()
        torch.testing.assert_close(both(rows), expected, rtol=0, atol=2e-2)
    assert linears[1].weight.is_meta


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_what_is_counted(form: str) -> None:
    weight = quantize(a_matrix(), form)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in (weight.codes, weight.scales))
    assert taken == form_bytes(form, (48, 96), 2) < 48 * 96 * 2


# --- models ----------------------------------------------------------------------------------------


def prepared(folder: Path, **how: Any) -> PreparedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder.parent / "cache"))
        return prepare(str(folder), **how)


def an_engine(model: PreparedModel, *spans: Span) -> TorchEngine:
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    for span in spans:
        engine.load(span)
    return engine


def as_kept(model: Any, form: str) -> Any:
    """A model of transformers with the numbers that its layers' matrices have when they are kept in fewer bits."""
    for name, shape in architecture.layer_linears(model).items():
        if form_of(form, shape) == form:
            weight = model.get_parameter(name)
            weight.data.copy_(quantize(weight.data, form).dense())
    return model


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same matrices, multiplied in float32: small errors do not send a token to another expert there."""
    monkeypatch.setattr(keeping, "QUANTIZED_DTYPE", "float32")
    monkeypatch.setattr(quantized, "COMPUTED_IN", torch.float32)
    monkeypatch.setattr(products, "COMPUTED_IN", torch.float32)
    monkeypatch.setattr(products, "product", lambda weight, bias: lambda rows: F.linear(rows, weight.dense(), bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_every_family_computes_as_transformers_does_with_the_same_numbers(
    family: str, form: str, tmp_path: Path, in_float32: None
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", family)
    with torch.inference_mode():
        right = as_kept(reference(folder), form)(torch.tensor([PROMPT])).logits[0, -1]
    model = prepared(folder, quantize=form)
    ours = logits_after(an_engine(model, ALL), ALL, PROMPT)
    torch.testing.assert_close(ours, right, rtol=0, atol=2e-5 * float(right.abs().max()))
    dense = prepared(folder).manifest
    assert model.manifest.layer_bytes < dense.layer_bytes
    assert model.manifest.hash != dense.hash


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma3"], ids=["fused", "by its own code"])
def test_in_short_numbers_it_is_no_farther_from_the_truth_than_transformers(
    family: str, form: str, tmp_path: Path
) -> None:
    ids = torch.tensor([PROMPT])
    ours, theirs = [], []
    for seed in range(4):
        folder = write_checkpoint(tmp_path / str(seed) / "tiny", family, seed=seed)
        plain, truth = as_kept(reference(folder, "bfloat16"), form), reference(folder)
        truth.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
        with torch.inference_mode():
            right = truth(ids).logits[0, -1]
            theirs.append(plain(ids).logits[0, -1].float() - right)
        ours.append(logits_after(an_engine(prepared(folder, quantize=form), ALL), ALL, PROMPT) - right)
    assert rms(ours) <= 1.5 * rms(theirs)


def rms(errors: list[torch.Tensor]) -> float:
    return float(torch.stack(errors).pow(2).mean().sqrt())


@pytest.fixture(scope="module", params=["llama", "gemma3"], ids=["fused", "by its own code"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    return prepared(write_checkpoint(tmp_path_factory.mktemp(request.param) / "tiny", request.param), quantize=INT4)


def test_every_split_gives_the_same_tokens(kept: PreparedModel) -> None:
    whole = Pipeline([(an_engine(kept, ALL), ALL)], "s", 40).generate(PROMPT, 12)
    for cut in range(1, LAYERS):
        front, back = Span(0, cut), Span(cut, LAYERS)
        stages = [(an_engine(kept, front), front), (an_engine(kept, back), back)]
        assert Pipeline(stages, "s", 40).generate(PROMPT, 12) == whole


def test_layers_may_come_and_go_in_any_order_and_memory_is_counted(kept: PreparedModel) -> None:
    expected = Pipeline([(an_engine(kept, ALL), ALL)], "s", 40).generate(PROMPT, 6)
    free = an_engine(kept, ALL).kv_tokens_free
    for order in permutations((Span(0, 1), Span(1, 3), Span(3, LAYERS))):
        engine = an_engine(kept, *order)
        assert Pipeline([(engine, ALL)], "s", 40).generate(PROMPT, 6) == expected
        engine.release(SessionId("s"))
        assert engine.kv_tokens_free == free
        engine.drop(order[0])
        assert engine.kv_tokens_free == an_engine(kept, order[0]).kv_tokens_free
        engine.load(ALL)
        assert Pipeline([(engine, ALL)], "s", 40).generate(PROMPT, 6) == expected


def test_no_dense_matrix_stays(kept: PreparedModel) -> None:
    engine = an_engine(kept, ALL)
    linears = [module for module in engine._model._layers.modules() if type(module) is nn.Linear]
    assert all(linear.weight.is_meta for linear in linears)


# --- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), sorted(GGUF_INT4.items()))
def test_blocks_of_a_gguf_file_are_the_numbers_that_its_own_library_reads(kind: int, name: str) -> None:
    import gguf

    random = np.random.default_rng(kind)
    outputs, inputs = 32, 512
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    blocks = random.integers(0, 256, (outputs * inputs // numbers, size), dtype=np.uint8)
    heads = 1 if name == "Q4_0" else 2
    scales = random.uniform(0.001, 0.1, (len(blocks), heads)).astype(np.float16)
    blocks[:, : 2 * heads] = scales.view(np.uint8)
    raw = blocks.reshape(outputs, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind)))
    order = torch.from_numpy(random.permutation(outputs))
    got = as_int4(torch.from_numpy(raw), kind, inputs, order)
    assert (got.form, got.codes.shape) == (INT4, (outputs, inputs // 2))
    # Only scale and offset are rounded, to 8 bits: what is off is a part of their sizes.
    torch.testing.assert_close(got.dense().float(), expected[order], rtol=0, atol=float(expected.abs().max()) * 2**-7)
    assert torch.equal(got.codes[order.argsort()], as_int4(torch.from_numpy(raw), kind, inputs, torch.arange(32)).codes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_gguf_file_may_be_served_as_it_is_stored(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", layers_in=kind)
    stored, dense = prepared(path, quantize="stored"), prepared(path)
    assert stored.manifest.layer_bytes < 0.5 * dense.manifest.layer_bytes
    engine = an_engine(stored, ALL)
    source = stored.source()
    assert all(isinstance(source.kept(name), Quantized) for name in engine._model._linears)
    ours, theirs = logits_after(engine, ALL, PROMPT), logits_after(an_engine(dense, ALL), ALL, PROMPT)
    assert float((ours - theirs).pow(2).mean().sqrt()) <= 0.03 * float(theirs.pow(2).mean().sqrt())


def test_what_a_gguf_file_has_in_other_types_is_dense(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    stored, dense = prepared(path, quantize="stored"), prepared(path)
    assert stored.manifest.layer_bytes == dense.manifest.layer_bytes
    assert torch.equal(
        logits_after(an_engine(stored, ALL), ALL, PROMPT), logits_after(an_engine(dense, ALL), ALL, PROMPT)
    )


# --- what people say -------------------------------------------------------------------------------


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(UsageError, match="int8, int4, stored"):
        prepared(folder, quantize="int3")
    with pytest.raises(UsageError, match="served in bfloat16"):
        prepared(folder, quantize="int4", dtype="float32")
    with pytest.raises(UsageError, match="only GGUF"):
        prepared(folder, quantize="stored")
    with pytest.raises(UsageError, match="only be served with --engine torch"):
        kinds_for("vllm", "cpu", quantization=INT8)
    assert [kind.name for kind in kinds_for("auto", "cpu", quantization=INT8)] == ["torch"]


def test_a_checkpoint_that_came_quantized_is_vllms(tmp_path: Path) -> None:
    import json

    folder = write_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    model = prepared(folder)
    assert model.manifest.quantization == "awq"
    with pytest.raises(ModelError, match="came quantized by awq"):
        TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    with pytest.raises(UsageError, match="only be served with --engine vllm"):
        kinds_for("torch", "cpu", quantization="awq")
    with pytest.raises(UsageError, match="quantized by awq already"):
        prepared(folder, quantize="int4")


def test_models_command_quantizes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    environment = {"HELIXNET_CACHE": str(tmp_path / "cache"), "PATH": ""}
    command = [sys.executable, "-m", "helixnet", "models", "info", str(folder), "--quantize", "int4"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "int4, computed in bfloat16" in said.stdout

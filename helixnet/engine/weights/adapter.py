"""A LoRA adapter, merged into a model's matrices as they are read: W + scale * B @ A.

After Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Folders are as the PEFT
library writes them. The merged model is one of its own, with its own manifest, and any engine can serve it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from helixnet.core.errors import CorruptCheckpoint, ModelError, UnknownModel, UnsafeCheckpoint, UsageError
from helixnet.engine.weights import architecture, convert, keeping
from helixnet.engine.weights.prepared import (
    AdapterRecord,
    Change,
    PreparedModel,
    read_prepared,
    stamp_file,
    write_prepared,
)
from helixnet.engine.weights.source import WeightSource

if TYPE_CHECKING:
    from helixnet.engine.base import Progress
    from helixnet.engine.quantized import Quantized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight")


class AdaptedSource:
    """A checkpoint whose matrices are merged with an adapter's as they are read."""

    def __init__(self, source: WeightSource, record: AdapterRecord) -> None:
        self._source, self._path = source, Path(record.file.path)
        self._changes = {change.tensor: change for change in record.changes}

    @property
    def native_names(self) -> bool:
        return self._source.native_names

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._source.shapes()

    def stored_bytes(self) -> Mapping[str, int]:
        return self._source.stored_bytes()

    def kept(self, name: str) -> Quantized | None:
        return None if name in self._changes else self._source.kept(name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        with _opened(self._path) as file:
            for name, tensor in self._source.read(names):
                change = self._changes.get(name)
                yield name, tensor if change is None else _merged(tensor, file, change)


def adapted(folder: Path, base: PreparedModel, adapter: Path, progress: Progress | None) -> PreparedModel:
    """Prepare the model `base` with the adapter in the folder `adapter`.

    Raises UnknownModel, UnsafeCheckpoint or CorruptCheckpoint for what is no adapter, ModelError for one that does
    more than LoRA or does not fit the model, UsageError for a model that cannot be merged with any.
    """
    manifest = base.manifest
    if manifest.quantization and not keeping.is_ours(manifest.quantization):
        raise UsageError(
            f"{manifest.name} came quantized by {manifest.quantization}: an adapter is merged into the original only"
        )
    config = _config(adapter)
    stamp = stamp_file(adapter / WEIGHTS, progress)
    changes = tuple(_changes(base, adapter / WEIGHTS, config))
    record = AdapterRecord(file=stamp, config=stamp_file(adapter / CONFIG), changes=changes)
    scales = json.dumps([[change.tensor, change.scale] for change in changes])
    model = replace(
        base,
        folder=folder,
        manifest=msgspec.structs.replace(
            manifest,
            name=f"{manifest.name}+{adapter.name}",
            adapter_sha256=hashlib.sha256(f"{stamp.sha256}\n{scales}".encode()).hexdigest(),
        ),
        record=msgspec.structs.replace(base.record, adapter=record),
    )
    write_prepared(model, base.tokenizer_path.read_text(encoding="utf-8"))
    return read_prepared(folder)


def _config(adapter: Path) -> dict[str, Any]:
    """What the folder says of itself; refuses by name what is more than LoRA."""
    if not (adapter / CONFIG).is_file():
        raise UnknownModel(f"{adapter} is no adapter: it has no {CONFIG}")
    if not (adapter / WEIGHTS).is_file():
        if (adapter / "adapter_model.bin").is_file():
            raise UnsafeCheckpoint(f"{adapter} has only pickle weights, which can run code; save it as safetensors")
        raise UnknownModel(f"{adapter} has no {WEIGHTS}")
    try:
        config = json.loads((adapter / CONFIG).read_text("utf-8"))
        kind, more = config["peft_type"], _more_than_lora(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{adapter / CONFIG} is damaged ({error})") from error
    if kind != "LORA":
        raise ModelError(f"{adapter.name} is an adapter of type {kind}; only LORA can be merged")
    if more:
        raise ModelError(f"{adapter.name} does more than LoRA ({', '.join(more)}), which this version cannot merge")
    return dict(config)


def _more_than_lora(config: Mapping[str, Any]) -> list[str]:
    found = [name for name in ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias") if config.get(name)]
    return [*found, *(["bias"] if config.get("bias", "none") != "none" else [])]


def _changes(base: PreparedModel, path: Path, config: Mapping[str, Any]) -> Iterator[Change]:
    """What the adapter does to which tensor of the checkpoint."""
    model_class = architecture.load_class(base.record.modeling_module, base.manifest.architecture)
    model_config = model_class.config_class.from_dict(dict(base.config))
    skeleton = architecture.build_skeleton(model_class, model_config, base.manifest.dtype, "eager")
    source = base.source()
    stored = {called: name for name, called in convert.decoder_names(source, skeleton)}
    for module, keys in _pairs(path).items():
        tensor = stored.get(f"{module}.weight")
        if tensor is None:
            raise ModelError(f"{path.parent.name} changes {module}, of which {base.manifest.name} stores no matrix")
        with _opened(path) as file:
            rank, wanted = file.get_slice(keys["A"]).get_shape()[0], source.shapes()[tensor]
            shapes = tuple(file.get_slice(keys["A"]).get_shape()), tuple(file.get_slice(keys["B"]).get_shape())
        if len(wanted) != 2 or shapes != ((rank, wanted[1]), (wanted[0], rank)):
            raise ModelError(f"{path.parent.name} was made for another model: its {module} has shapes {shapes}")
        yield Change(tensor=tensor, a=keys["A"], b=keys["B"], scale=_scale(module, rank, config))


def _pairs(path: Path) -> dict[str, dict[str, str]]:
    """By module, the names of its A and its B."""
    found: dict[str, dict[str, str]] = {}
    with _opened(path) as file:
        for key in sorted(file.keys()):
            match = _KEY.fullmatch(key)
            if match is None:
                raise ModelError(f"{path.parent.name} holds {key}, which this version cannot merge")
            found.setdefault(match["module"], {})[match["which"]] = key
    half = sorted(module for module, keys in found.items() if len(keys) != 2)
    if half or not found:
        raise CorruptCheckpoint(f"{path} lacks {'one half of ' + half[0] if half else 'any matrix'}")
    return found


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CorruptCheckpoint(f"the adapter's lora_alpha is {alpha!r}, no number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value whose pattern the module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return otherwise


def _merged(tensor: torch.Tensor, file: Any, change: Change) -> torch.Tensor:
    a, b = file.get_tensor(change.a).float(), file.get_tensor(change.b).float()
    return (tensor.float() + change.scale * (b @ a)).to(tensor.dtype)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path} is damaged or cut short ({error})") from error

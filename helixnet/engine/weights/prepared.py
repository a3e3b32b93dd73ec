"""A prepared model: a folder from which any peer or client starts without converting anything again.

```
manifest.json    helixnet.core.model.Manifest
config.json      the transformers config of the text decoder
tokenizer.json   loadable by tokenizers.Tokenizer.from_file
chat.json        ChatFormat
source.json      SourceRecord: where the weights are and what they hashed to
```
Nothing here imports torch or transformers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from helixnet.core.errors import CorruptCheckpoint, UnknownModel
from helixnet.core.model import ChatFormat, Manifest
from helixnet.engine.base import Progress
from helixnet.engine.weights.source import WeightSource

HASH_CHUNK_BYTES = 8 * 1024 * 1024
LOCK_TIMEOUT_S = 1800.0
"""How long a second process waits while the first downloads and converts the same model."""

T = TypeVar("T")


class FileStamp(msgspec.Struct, frozen=True, kw_only=True):
    """A weight file as it was when hashed; equal size and mtime mean it is not read again to hash it."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


class GgufTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where one GGUF tensor lies and what it becomes in the transformers module."""

    name: str
    offset: int
    bytes: int
    type: int
    """GGMLQuantizationType."""
    stored_shape: tuple[int, ...]
    """Of the raw data (bytes for quantized types), in numpy order."""
    shape: tuple[int, ...]
    """Of the numbers."""
    target: str
    """Parameter of the transformers module it is, or is a part of."""


class GgufIndex(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer needs of a GGUF header, so that it never parses 50 000 vocabulary strings again (3 s)."""

    architecture: str
    """As GGUF calls it: selects transformers' tensor processor."""
    tensors: tuple[GgufTensor, ...]
    shapes: dict[str, tuple[int, ...]]
    """Parameter name in the transformers module -> its shape."""
    config: dict[str, Any]
    """The numbers transformers' tensor processors look at (head counts)."""


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """A safetensors file on a hub, of which only byte ranges are fetched."""

    url: str
    size: int
    sha256: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter does to one matrix [outputs, inputs]."""

    tensor: str
    """As the checkpoint calls it."""
    a: str
    """Matrix of the adapter's file [rank, inputs]."""
    b: str
    """Matrix of the adapter's file [outputs, rank]."""
    scale: float


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that is merged as weights are read."""

    file: FileStamp
    config: FileStamp
    changes: tuple[Change, ...]


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights are: a GGUF file, local safetensors files, or files on a hub."""

    format: str
    """gguf, safetensors or hub."""
    modeling_module: str
    """The transformers module that defines the architecture's class."""
    files: tuple[FileStamp, ...] = ()
    gguf: GgufIndex | None = None
    hub: tuple[HubFile, ...] = ()
    adapter: AdapterRecord | None = None

    @property
    def stamps(self) -> tuple[FileStamp, ...]:
        """Of all files on this machine."""
        return self.files if self.adapter is None else (*self.files, self.adapter.file, self.adapter.config)


def gguf_types(record: SourceRecord) -> dict[str, int]:
    """The GGML type of each parameter that is one tensor of a GGUF file; empty for other formats."""
    types: dict[str, int] = {}
    twice: set[str] = set()
    for tensor in record.gguf.tensors if record.gguf is not None else ():
        if tensor.target in types:
            twice.add(tensor.target)
        types[tensor.target] = tensor.type
    return {name: kind for name, kind in types.items() if name not in twice}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a checkpoint is to be served."""

    dtype: str | None = None
    """None for the checkpoint's own."""
    quantization: str = ""
    """int8, int4 or stored; empty if matrices are to be of `dtype`."""

    @property
    def slug(self) -> str:
        """The end of a folder's name."""
        return "-".join(part for part in (self.dtype or "stored", self.quantization) if part)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model ready to serve: what the swarm must agree on (manifest) and where this machine finds it."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    chat: ChatFormat
    record: SourceRecord

    @property
    def tokenizer_path(self) -> Path:
        """For `tokenizers.Tokenizer.from_file`."""
        return self.folder / "tokenizer.json"

    def source(self) -> WeightSource:
        """Open the weights. Raises CorruptCheckpoint if a file changed since it was hashed."""
        verify_stamps(self)
        source = self._checkpoint()
        if self.record.adapter is None:
            return source
        from helixnet.engine.weights.adapter import AdaptedSource

        return AdaptedSource(source, self.record.adapter)

    def _checkpoint(self) -> WeightSource:
        if self.record.format == "gguf":
            from helixnet.engine.weights.gguf_source import GgufSource

            assert self.record.gguf is not None, "a gguf record carries its index"
            return GgufSource(Path(self.record.files[0].path), self.record.gguf)
        if self.record.format == "hub":
            from helixnet.engine.weights.hub import HubSource

            return HubSource(self.record.hub)
        from helixnet.engine.weights.safetensors_source import SafetensorsSource

        return SafetensorsSource([Path(stamp.path) for stamp in self.record.files])


def cache_root() -> Path:
    """`HELIXNET_CACHE`, or `~/.cache/helixnet`."""
    return Path(os.environ.get("HELIXNET_CACHE") or Path.home() / ".cache" / "helixnet").expanduser()


def models_root() -> Path:
    """The folder that holds the prepared model folders."""
    return cache_root() / "models"


def read_prepared(folder: Path) -> PreparedModel:
    """The prepared model in `folder`. Raises UnknownModel if there is none, CorruptCheckpoint if it is damaged."""
    if not (folder / "manifest.json").is_file():
        raise UnknownModel(f"{folder} is not a prepared model; `helixnet models list` shows what is there")
    return PreparedModel(
        folder=folder,
        manifest=_read_json(folder / "manifest.json", Manifest),
        config=_read_json(folder / "config.json", dict[str, Any]),
        chat=_read_json(folder / "chat.json", ChatFormat),
        record=_read_json(folder / "source.json", SourceRecord),
    )


def write_prepared(model: PreparedModel, tokenizer_json: str) -> None:
    """Write all five files beside `model.folder`, then move them in place at once."""
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{model.folder.name}-", suffix=".partial", dir=model.folder.parent))
    try:
        (part / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, value in (
            ("config.json", model.config),
            ("chat.json", model.chat),
            ("source.json", model.record),
            ("manifest.json", model.manifest),
        ):
            (part / name).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
        if model.folder.exists():
            shutil.rmtree(model.folder)
        part.rename(model.folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def stamp_file(path: Path, progress: Progress | None = None) -> FileStamp:
    """Hash `path` and remember its size and mtime."""
    stat = path.stat()
    return FileStamp(
        path=str(path.resolve()), size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256_file(path, progress)
    )


def verify_stamps(model: PreparedModel) -> None:
    """Check that the weight files are those that were hashed; rehash only those whose size or mtime differ."""
    for stamp in model.record.stamps:
        path = Path(stamp.path)
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is gone; prepare {model.manifest.name} again with `helixnet models pull`")
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
            continue
        if stat.st_size != stamp.size or sha256_file(path) != stamp.sha256:
            raise CorruptCheckpoint(
                f"{path} is not the file that was prepared (its SHA-256 differs); restore it, or run "
                f"`helixnet models pull {path.name}` to prepare what is there now"
            )


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 (hex) of a file, read in chunks."""
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`: several peers of one machine start at once and must not download twice."""
    from filelock import FileLock

    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock", timeout=LOCK_TIMEOUT_S):
        yield


def _read_json(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptCheckpoint(
            f"{path} is damaged ({error}); delete {path.parent} and pull the model again"
        ) from error

"""Checkpoints on a Hugging Face hub: JSON files whole, weights by byte ranges of just the tensors a span needs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helixnet.core.errors import CorruptCheckpoint, HelixError, NetworkError, UnknownModel, UnsafeCheckpoint
from helixnet.engine.base import Progress
from helixnet.engine.weights.prepared import HubFile, PreparedModel, SourceRecord, Wanted, cache_root
from helixnet.engine.weights.safetensors_source import DTYPES, prepare_texts, shard_names
from helixnet.engine.weights.source import HEADER_BYTES_MAX

JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
JSON_BYTES_MAX = 64 * 1024 * 1024
REQUEST_TIMEOUT_S = 60.0
REQUEST_ATTEMPTS_MAX = 3
REVISION = "main"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def prepare_hub(folder: Path, name: str, wanted: Wanted, progress: Progress | None) -> PreparedModel:
    """Prepare the hub's model `owner/name`; fetches its JSON files and safetensors headers, no weights.

    The hub states each weight file's SHA-256; those make the manifest. What is read later by ranges cannot be
    checked against a whole-file hash: it rests on the hub's TLS and on the file's pinned revision.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=endpoint()).model_info(name, revision=REVISION, files_metadata=False)
    except Exception as error:
        raise _hub_error(name, error) from error
    files = sorted(sibling.rfilename for sibling in info.siblings or ())
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if not weights:
        if any(file.endswith((".bin", ".pt", ".pth", ".ckpt")) for file in files):
            raise UnsafeCheckpoint(f"{name} has only pickle weights, which can run code; pick a safetensors version")
        raise UnknownModel(f"{name} holds no safetensors; pick another version of it, or download its GGUF file")
    revision = info.sha or REVISION
    texts = {file: _fetch_text(_url(name, revision, file)) for file in JSON_FILES if file in files}
    hub_files = tuple(_describe(_url(name, revision, file)) for file in shard_names(texts, weights))
    source = HubSource(hub_files, progress)
    hashes = {file.url.rpartition("/")[2]: file.sha256 for file in hub_files}
    return prepare_texts(
        folder,
        name,
        texts,
        wanted,
        source,
        hashes,
        lambda module: SourceRecord(format="hub", modeling_module=module, hub=hub_files),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    file: HubFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class HubSource:
    """Reads tensors by HTTP ranges; headers and tensors once fetched are kept in the cache."""

    native_names = False

    def __init__(self, files: Sequence[HubFile], progress: Progress | None = None) -> None:
        self._folder = cache_root() / "ranges"
        self._entries: dict[str, _Entry] = {}
        for done, file in enumerate(files):
            self._entries.update(self._read_header(file))
            if progress is not None:
                progress(done + 1, len(files))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def stored_bytes(self) -> Mapping[str, int]:
        return {name: entry.stop - entry.start for name, entry in self._entries.items()}

    def kept(self, name: str) -> None:
        return None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            entry = self._entries[name]
            data = bytearray(self._fetch(entry.file, entry.start, entry.stop))
            yield name, torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def _read_header(self, file: HubFile) -> dict[str, _Entry]:
        """The tensors of a file. Everything a header says is checked before it is used."""
        size = int.from_bytes(self._fetch(file, 0, 8), "little")
        if not 2 <= size <= min(HEADER_BYTES_MAX, file.size - 8):
            raise CorruptCheckpoint(f"{file.url} has no safetensors header; the file is damaged")
        base = 8 + size
        try:
            header = json.loads(self._fetch(file, 8, base))
            return {name: _entry(file, base, fields) for name, fields in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{file.url} has a safetensors header that makes no sense ({error})") from error

    def _fetch(self, file: HubFile, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` of a file, from the cache if they were fetched before."""
        kept = self._folder / file.sha256[:32] / f"{start}-{stop}"
        if kept.is_file() and kept.stat().st_size == stop - start:
            return kept.read_bytes()
        data = _request(file.url, {"Range": f"bytes={start}-{stop - 1}"}, stop - start)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.partial")
        part.write_bytes(data)
        part.replace(kept)
        return data


def endpoint() -> str:
    """`HF_ENDPOINT`, or the public hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _entry(file: HubFile, base: int, fields: Mapping[str, Any]) -> _Entry:
    dtype, shape = DTYPES[fields["dtype"]], tuple(int(side) for side in fields["shape"])
    start, stop = (base + int(offset) for offset in fields["data_offsets"])
    count = 1
    for side in shape:
        count *= side
    if not base <= start <= stop <= file.size or stop - start != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} at bytes {start} to {stop} of {file.size}")
    return _Entry(file, dtype, shape, start, stop)


def _describe(url: str) -> HubFile:
    """Size and SHA-256 of a weight file, as the hub states them."""
    from huggingface_hub import get_hf_file_metadata

    try:
        found = get_hf_file_metadata(url, timeout=REQUEST_TIMEOUT_S)
    except Exception as error:
        raise _hub_error(url, error) from error
    if not found.size:
        raise CorruptCheckpoint(f"the hub does not say how large {url} is; try again later")
    etag = found.etag or ""
    # Large files have their SHA-256 as etag; for a small one outside LFS the commit and path identify it as well.
    sha256 = etag if _SHA256.fullmatch(etag) else hashlib.sha256(f"{etag} {url}".encode()).hexdigest()
    return HubFile(url=url, size=found.size, sha256=sha256)


def _fetch_text(url: str) -> str:
    try:
        return _request(url, {}, None).decode()
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{url} is not text") from error


def _request(url: str, headers: Mapping[str, str], expected: int | None) -> bytes:
    """Body of a GET, tried a few times; `expected` is its exact length. Raises NetworkError, CorruptCheckpoint."""
    from huggingface_hub import get_session
    from huggingface_hub.utils._headers import build_hf_headers

    limit = expected if expected is not None else JSON_BYTES_MAX
    problem = ""
    for _ in range(REQUEST_ATTEMPTS_MAX):
        try:
            every = {**build_hf_headers(), **headers}
            with get_session().stream(
                "GET", url, headers=every, timeout=REQUEST_TIMEOUT_S, follow_redirects=True
            ) as reply:
                reply.raise_for_status()
                if expected is not None and reply.status_code != 206:
                    raise CorruptCheckpoint(f"{url} cannot be read in parts; the server ignores ranges")
                body = bytearray()
                for chunk in reply.iter_bytes():
                    body += chunk
                    if len(body) > limit:
                        raise CorruptCheckpoint(f"{url} sends more than the {limit} bytes that were expected")
            if expected is None or len(body) == expected:
                return bytes(body)
            problem = f"only {len(body)} of {expected} bytes came"
        except HelixError:
            raise
        except Exception as error:
            problem = str(error) or type(error).__name__
    raise NetworkError(f"{url} could not be read ({problem}); check the network and try again")


def _url(name: str, revision: str, file: str) -> str:
    return f"{endpoint()}/{name}/resolve/{revision}/{file}"


def _hub_error(name: str, error: Exception) -> HelixError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return UnknownModel(f"{name} is gated: accept its terms on {endpoint()}, then log in with `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return UnknownModel(f"{endpoint()} has no model {name!r}; `helixnet models list` shows what is here")
    return NetworkError(f"{endpoint()} could not be asked for {name} ({error}); check the network or HF_ENDPOINT")

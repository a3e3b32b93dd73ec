"""The hub's URL layout on 127.0.0.1: ranges of the needed tensors, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from helixnet.core.errors import CorruptCheckpoint, NetworkError, UnknownModel, UnsafeCheckpoint
from helixnet.core.types import Span
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from tests.engine.engine_driver import Pipeline
from tests.tiny_models import LAYERS, reference, reference_tokens, write_checkpoint

NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPT = [5, 17, 99, 3, 42]
POLL_S = 0.01
"""How soon the server sees that it shall end."""


class Hub(ThreadingHTTPServer):
    """Serves one folder as `someone/tiny`; counts the bytes of weights it sends."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.weight_bytes = 0
        self.cut_short = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{NAME}"):
            files = [{"rfilename": path.name} for path in self.server.folder.iterdir()]
            self._answer(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode(), {})
        else:
            self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = self.server.folder / self.path.rpartition("/")[2]
        if not self.path.startswith(f"/{NAME}/resolve/{COMMIT}/") or not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if not body:
            self._answer(200, data, headers, send=False)
            return
        code = 200
        if wanted := self.headers.get("Range"):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            code, data = 206, data[first : last + 1]
            self.server.weight_bytes += len(data)
            data = data[:-1] if self.server.cut_short else data
        self._answer(code, data, headers)

    def _answer(self, code: int, data: bytes, headers: dict[str, str], send: bool = True) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(write_checkpoint(tmp_path / "tiny", shard_bytes=200_000))
    thread = Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_span_fetches_only_its_tensors_and_the_pipeline_is_right(hub: Hub) -> None:
    model = prepare(NAME)
    prepared = hub.weight_bytes
    assert prepared < 20_000, "preparing reads headers, no weights"
    manifest = model.manifest
    spans = (Span(0, 1), Span(1, 3), Span(3, LAYERS))
    engines = []
    for span in spans:
        before = hub.weight_bytes
        engines.append(TorchEngine(model, device="cpu", memory_bytes=8_000_000))
        engines[-1].load(span)
        assert hub.weight_bytes - before == manifest.span_bytes(span.start, span.stop)
    before = hub.weight_bytes
    TorchEngine(model, device="cpu", memory_bytes=8_000_000).load(Span(0, 2))
    assert hub.weight_bytes == before, "what was fetched once is kept"
    tokens = Pipeline(list(zip(engines, spans, strict=True)), "s", 30).generate(PROMPT, 8)
    assert tokens == reference_tokens(reference(hub.folder), PROMPT, 8)


def test_a_local_copy_has_the_same_identity(hub: Hub) -> None:
    assert prepare(NAME).manifest.hash == prepare(str(hub.folder)).manifest.hash


def test_a_transfer_cut_short_is_refused(hub: Hub) -> None:
    model = prepare(NAME)
    hub.cut_short = True
    with pytest.raises(NetworkError, match="came"):
        TorchEngine(model, device="cpu", memory_bytes=8_000_000).load(Span(0, 1))


def test_a_garbled_header_is_refused(hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(CorruptCheckpoint, match="header"):
        prepare(NAME)


def test_a_model_with_only_pickles_is_refused(hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(UnsafeCheckpoint, match="pickle"):
        prepare(NAME)


def test_an_unknown_model_is_named(hub: Hub) -> None:
    with pytest.raises(UnknownModel, match="no-one/nothing"):
        prepare("no-one/nothing")


def test_a_hub_that_cannot_be_reached_is_a_network_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:9"):
        prepare(NAME)

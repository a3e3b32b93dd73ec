"""An engine in a process of its own, as vLLM needs one: it sets threads and globals for all of its process.

That process may have another Python, in whose environment vLLM is installed with all that it pins.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

import helixnet
from helixnet.core import errors
from helixnet.core.errors import EngineGone, HelixError, UsageError
from helixnet.core.model import Manifest
from helixnet.core.stage.pages import Paging
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.engine import calls
from helixnet.engine.base import Progress
from helixnet.engine.calls import Answer, Call, Channel
from helixnet.engine.weights.prepared import PreparedModel, cache_root

START_S = 300.0
"""Importing vLLM from a cold disk takes minutes."""
CALL_S = 120.0
"""No batch takes longer: a session is given up when nothing was heard of its pipeline for so long."""
LOAD_S = 600.0
"""A load says something more often than this."""
END_S = 5.0
LOGS_MAX = 20
"""Of processes that did not end well; older ones go."""

_Kind = TypeVar("_Kind")


class RemoteEngine:
    """Implements `helixnet.engine.base.Engine`. Every method raises EngineGone once the process has ended or hangs.

    Args:
        model: what to serve.
        engine: `vllm` or `torch`.
        device: `cpu` or `cuda:N`; the process sees only that one.
        memory_bytes: budget for weights and KV together.
        threads: CPU threads of the process.
        python: the interpreter to run it, if not this one.
    """

    def __init__(
        self,
        model: PreparedModel,
        *,
        engine: str,
        device: str,
        memory_bytes: int,
        threads: int,
        python: str | None = None,
    ) -> None:
        self._manifest = model.manifest
        self._held: tuple[Span, ...] = ()
        setup = calls.Setup(
            engine=engine,
            model=str(model.folder),
            device=device if device == "cpu" else "cuda:0",
            memory_bytes=memory_bytes,
            version=helixnet.__version__,
        )
        ends = [socket.socketpair() for _ in range(2)]
        theirs = [one for _, one in ends]
        self._log = _log_file()
        self._process = _start(python or sys.executable, setup, theirs, _variables(device, threads), self._log)
        self._work, self._loads = (Channel(ours) for ours, _ in ends)
        self._working, self._loading = threading.Lock(), threading.Lock()
        try:
            ready = _checked(self._said(self._work, START_S), calls.Ready)
        except BaseException:
            self.close()
            raise
        self.paging: Paging = ready.paging
        self.takes = ready.takes
        self.weight_factor = ready.weight_factor
        self.name = ready.name

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def held(self) -> tuple[Span, ...]:
        return self._held

    def load(self, span: Span, progress: Progress | None = None) -> None:
        with self._loading:
            self._send(self._loads, calls.Load(span))
            while True:
                said = self._said(self._loads, LOAD_S)
                if not isinstance(said, calls.Progress):
                    self._held = _checked(said, calls.Held).held
                    return
                if progress is not None:
                    progress(said.done, said.total)

    def drop(self, keep: Span | None) -> None:
        self._held = self._call(calls.Drop(keep), calls.Held).held

    def open(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId] = ()) -> None:
        self._call(calls.Open(session, layers, tokens, tuple(begun)), calls.Ok)

    def extend(self, session: SessionId, tokens: int) -> None:
        self._call(calls.Extend(session, tokens), calls.Ok)

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        self._call(calls.Seal(session, tuple(blocks)), calls.Ok)

    def evict(self, blocks: Sequence[BlockId]) -> None:
        self._call(calls.Evict(tuple(blocks)), calls.Ok)

    def fill(self, session: SessionId, tokens: int) -> None:
        self._call(calls.Fill(session, tokens), calls.Ok)

    def run(self, batch: Sequence[Work]) -> list[Done]:
        return list(self._call(calls.Run(tuple(batch)), calls.Ran).results)

    def release(self, session: SessionId) -> None:
        self._call(calls.Release(session), calls.Ok)

    def close(self) -> None:
        """End the process."""
        self._work.close()
        self._loads.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        if self._process.returncode == 0:
            self._log.unlink(missing_ok=True)

    def _call(self, call: Call, kind: type[_Kind]) -> _Kind:
        with self._working:
            self._send(self._work, call)
            return _checked(self._said(self._work, CALL_S), kind)

    def _send(self, channel: Channel, call: Call) -> None:
        try:
            channel.send(call)
        except OSError as error:
            raise self._gone(str(error)) from error

    def _said(self, channel: Channel, timeout_s: float) -> Answer:
        """The next answer, if it is none of failure."""
        try:
            answer = channel.answer(timeout_s)
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise self._gone(str(error)) from error
        if isinstance(answer, calls.Failed):
            raise getattr(errors, answer.error, HelixError)(answer.message)
        return answer

    def _gone(self, why: str) -> EngineGone:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.2)
            return EngineGone(f"the engine's process ended with exit code {code}; what it said is in {self._log}")
        return EngineGone(f"the engine's process does not answer ({why}); what it said is in {self._log}")


def _checked(answer: Answer, kind: type[_Kind]) -> _Kind:
    assert isinstance(answer, kind), f"{type(answer).__name__} is no answer to this"
    return answer


def _start(
    python: str, setup: calls.Setup, ends: Sequence[socket.socket], variables: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    numbers = [end.fileno() for end in ends]
    command = [python, "-m", "helixnet.engine.child", *map(str, numbers), msgspec.json.encode(setup).decode()]
    try:
        with log.open("wb") as file:
            return subprocess.Popen(
                command,
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,  # Ctrl-C is for the peer, which drains first
            )
    except OSError as error:
        raise UsageError(f"{python} cannot be run ({error.strerror}); check --vllm-python") from error
    finally:
        for end in ends:
            end.close()


def _log_file() -> Path:
    """Where the process may say what it likes: libraries talk much, and the terminal is the peer's."""
    folder = cache_root() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("engine-*.log"), key=lambda one: one.stat().st_mtime)[:-LOGS_MAX]:
        old.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="engine-", suffix=".log", dir=folder)
    os.close(handle)
    return Path(name)


def _variables(device: str, threads: int) -> dict[str, str]:
    """What the process finds in its environment besides ours."""
    kind, _, number = device.partition(":")
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning take the cores of those who work
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if kind == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = number or "0"
    checkout = Path(helixnet.__file__).parents[1]
    if checkout.name != "site-packages":  # run from a checkout: the other Python finds it there, too
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    return variables

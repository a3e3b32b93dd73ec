"""An engine in a process of its own does what one in this process does, and says so when it is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixnet.core.errors import Busy, EngineGone, MemoryTooSmall, UsageError
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.sampling import History, Sampling
from helixnet.core.stage.work import Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.engine import remote
from helixnet.engine.base import Engine
from helixnet.engine.kinds import kinds_for, vllm_kind
from helixnet.engine.remote import RemoteEngine
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel, cache_root
from tests.engine.engine_driver import Pipeline
from tests.tiny_models import LAYERS, write_checkpoint

pytestmark = pytest.mark.slow

MEMORY = 8_000_000
ALL = Span(0, LAYERS)
PROMPT = [5, 17, 99, 3, 42]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedModel]:
    folder = write_checkpoint(tmp_path_factory.mktemp("remote") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder.parent / "cache"))
        yield prepare(str(folder))


def start(model: PreparedModel, engine: str = "torch", memory: int = MEMORY, python: str | None = None) -> RemoteEngine:
    return RemoteEngine(model, engine=engine, device="cpu", memory_bytes=memory, threads=1, python=python)


@pytest.fixture(scope="module")
def engine(model: PreparedModel) -> Iterator[RemoteEngine]:
    engine = start(model)
    engine.load(ALL)
    yield engine
    engine.close()


def logs() -> list[Path]:
    return list((cache_root() / "logs").glob("*"))


def test_it_says_what_an_engine_in_this_process_says(engine: RemoteEngine, model: PreparedModel) -> None:
    here = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    here.load(ALL)
    said = []
    for one in (engine, here):
        stages: list[tuple[Engine, Span]] = [(one, Span(0, 2)), (one, Span(2, LAYERS))]
        both = [Pipeline(stages[:1], "a", 40), Pipeline(stages[1:], "b", 40)]
        (first,) = one.run([both[0].first_work(PROMPT, sample=True)])
        assert first.activation is not None
        work = Work(
            session=both[1].session,
            layers=Span(2, LAYERS),
            position=0,
            activation=first.activation,
            sample=Sampling(temperature=1.0, repetition_penalty=1.2, logprobs=2, seed=7),
            history=History(tuple(PROMPT), [8], (2,)),
        )
        said.append(one.run([work])[0])
        for pipeline in both:
            pipeline.close()
    assert said[0].token_id == said[1].token_id and said[0].logprobs == said[1].logprobs
    assert (engine.paging, engine.takes, engine.held()) == (here.paging, here.takes, here.held())


def test_blocks_are_sealed_begun_with_and_evicted_there(engine: RemoteEngine) -> None:
    long = [(7 * n) % 100 + 3 for n in range(BLOCK_TOKENS)]
    first = Pipeline([(engine, ALL)], "first", BLOCK_TOKENS + 8)
    expected = first.generate([*long, *PROMPT], 3)
    engine.seal(first.session, [(0, BlockId(b"one"))])
    first.close()
    second = Pipeline([(engine, ALL)], "second", BLOCK_TOKENS + 4, [BlockId(b"one")])
    engine.extend(second.session, BLOCK_TOKENS + 8)
    assert second.generate(PROMPT, 3) == expected
    second.close()
    engine.evict([BlockId(b"one")])
    with pytest.raises(UsageError, match="not here"):
        engine.open(SessionId("third"), ALL, BLOCK_TOKENS + 4, [BlockId(b"one")])


def test_errors_come_back_as_what_they_are(engine: RemoteEngine) -> None:
    engine.open(SessionId("twice"), ALL, 5)
    with pytest.raises(Busy, match="already open"):
        engine.open(SessionId("twice"), ALL, 5)
    engine.release(SessionId("twice"))
    with pytest.raises(UsageError, match="reaches past"):
        engine.load(Span(0, LAYERS + 1))
    (done,) = engine.run([Work(session=SessionId("unknown"), layers=ALL, position=0, token_ids=(1,))])
    assert done.error is not None and "not open" in done.error


def test_layers_come_and_go_with_progress(model: PreparedModel) -> None:
    engine = start(model, memory=model.manifest.span_bytes(0, 3))
    seen: list[tuple[int, int]] = []
    engine.load(Span(0, 2), lambda done, total: seen.append((done, total)))
    assert engine.held() == (Span(0, 2),)
    assert seen and seen[-1] == (model.manifest.span_bytes(0, 2),) * 2
    with pytest.raises(MemoryTooSmall, match="--memory"):
        engine.load(ALL)
    engine.drop(Span(1, 2))
    assert engine.held() == (Span(1, 2),)
    engine.close()
    engine.close()


def test_whoever_ends_it_leaves_nothing_behind(model: PreparedModel) -> None:
    before = logs()
    engine = start(model)
    assert len(logs()) == len(before) + 1
    engine.close()
    assert engine._process.returncode == 0 and logs() == before


def test_a_process_that_died_is_told_of_by_every_call(model: PreparedModel) -> None:
    engine = start(model)
    os.kill(engine._process.pid, signal.SIGKILL)
    for call in (lambda: engine.run([]), lambda: engine.release(SessionId("a")), lambda: engine.load(ALL)):
        with pytest.raises(EngineGone, match=r"exit code -9.*engine-.*\.log"):
            call()
    engine.close()


def test_a_process_that_hangs_is_given_up(model: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(model)
    os.kill(engine._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(remote, "CALL_S", 0.1)
    monkeypatch.setattr(remote, "END_S", 0.1)
    with pytest.raises(EngineGone, match="does not answer"):
        engine.run([])
    engine.close()
    assert engine._process.returncode == -signal.SIGKILL


def test_what_keeps_it_from_starting_is_said(model: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--vllm-python"):
        start(model, python="/no/such/python")
    with pytest.raises(UsageError, match="--vllm-python"):
        vllm_kind("/no/such/python")
    with pytest.raises(UsageError, match="vLLM is not installed"):
        start(model, engine="vllm")
    with pytest.raises(UsageError, match="vLLM is not installed"):
        kinds_for("vllm", "cpu", None)
    assert [kind.name for kind in kinds_for("auto", "cpu", None)] == ["torch"]
    monkeypatch.setattr("helixnet.__version__", "0.0.1")
    with pytest.raises(UsageError, match=r"0\.0\.1"):
        start(model)

"""What the engine refuses, what it isolates, and what it gives back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helixnet.core.errors import Busy, MemoryTooSmall, UsageError
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.work import Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.core.wire.activation import Activation
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import GREEDY, Pipeline
from tests.tiny_models import CONTEXT, HIDDEN, LAYERS, VOCAB, write_checkpoint

MEMORY = 8_000_000
ALL = Span(0, LAYERS)
BACK = Span(2, LAYERS)
A, B, C = SessionId("a"), SessionId("b"), SessionId("c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    folder = write_checkpoint(tmp_path_factory.mktemp("refuse") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder.parent / "cache"))
        return prepare(str(folder))


@pytest.fixture
def engine(model: PreparedModel) -> TorchEngine:
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    engine.load(ALL)
    return engine


def prompt(session: SessionId, *tokens: int, position: int = 0, layers: Span = ALL) -> Work:
    return Work(session=session, layers=layers, position=position, token_ids=tokens or (3, 4, 5), sample=GREEDY)


def activation(value: float = 0.0, hidden: int = HIDDEN, dtype: str = "float32") -> Activation:
    width = {"float32": np.float32, "float16": np.float16}[dtype]
    data = memoryview(np.full(hidden, value, dtype=width).tobytes())
    return Activation(dtype=dtype, tokens=1, hidden_size=hidden, data=data)


def inner(session: SessionId, data: Activation, layers: Span = BACK) -> Work:
    return Work(session=session, layers=layers, position=0, activation=data, sample=GREEDY)


def test_a_session_that_does_not_fit_is_refused_and_fits_after_a_release(engine: TorchEngine) -> None:
    free = engine.kv_tokens_free
    fitting = free // (CONTEXT * LAYERS)
    for number in range(fitting):
        engine.open(SessionId(f"s{number}"), ALL, CONTEXT)
    with pytest.raises(Busy, match="no KV room"):
        engine.open(A, ALL, CONTEXT)
    engine.release(SessionId("s0"))
    engine.open(A, ALL, CONTEXT)


def test_release_frees_everything_and_forgives_unknown_sessions(engine: TorchEngine) -> None:
    free = engine.kv_tokens_free
    engine.open(A, ALL, 100)
    engine.run([prompt(A)])
    assert engine.kv_tokens_free < free
    engine.release(A)
    engine.release(A)
    engine.release(B)
    assert engine.kv_tokens_free == free


def test_weights_and_kv_together_stay_within_the_budget(model: PreparedModel) -> None:
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    engine.load(Span(0, 2))
    part = engine.kv_tokens_free
    engine.load(ALL)
    assert engine.kv_tokens_free < part
    engine.drop(Span(0, 2))
    assert engine.kv_tokens_free == part


def test_a_span_too_large_for_the_budget_is_refused_and_nothing_changes(model: PreparedModel) -> None:
    engine = TorchEngine(model, device="cpu", memory_bytes=model.manifest.span_bytes(1, 3))
    engine.load(Span(1, 2))
    with pytest.raises(MemoryTooSmall, match="--memory"):
        engine.load(Span(1, LAYERS))
    assert engine.held() == (Span(1, 2),)


def test_a_span_is_refused_while_sessions_hold_the_memory_it_needs(model: PreparedModel) -> None:
    engine = TorchEngine(model, device="cpu", memory_bytes=model.manifest.span_bytes(1, 3))
    engine.load(Span(1, 2))
    engine.open(A, Span(1, 2), CONTEXT)
    with pytest.raises(MemoryTooSmall, match="KV in use"):
        engine.load(Span(1, 3))
    engine.release(A)
    engine.load(Span(1, 3))


def test_a_span_past_the_last_layer_is_refused(engine: TorchEngine) -> None:
    with pytest.raises(UsageError, match="reaches past"):
        engine.load(Span(0, LAYERS + 1))


@pytest.mark.parametrize(
    ("session", "layers", "tokens"),
    [(A, ALL, 0), (A, ALL, CONTEXT + 1), (SessionId(""), ALL, 5), (SessionId("x" * 65), ALL, 5)],
    ids=["no tokens", "more than the context", "no id", "a long id"],
)
def test_opening_is_refused_for(engine: TorchEngine, session: SessionId, layers: Span, tokens: int) -> None:
    with pytest.raises(UsageError):
        engine.open(session, layers, tokens)


def test_growing_beyond_the_memory_is_refused_and_changes_nothing(model: PreparedModel) -> None:
    kv_bytes = 16 * model.manifest.kv_bytes * LAYERS
    engine = TorchEngine(model, device="cpu", memory_bytes=model.manifest.span_bytes(0, LAYERS) + 3 * kv_bytes)
    engine.load(ALL)
    room = engine.kv_tokens_free // LAYERS
    engine.open(A, ALL, room - 16)
    engine.open(B, ALL, 16)
    with pytest.raises(Busy, match="more KV pages"):
        engine.extend(B, 17)
    assert engine.kv_tokens_free == 0
    engine.release(A)
    engine.extend(B, 17)
    with pytest.raises(UsageError, match="not open"):
        engine.extend(A, 17)


def test_only_whole_blocks_are_shared_and_only_by_who_knows_them(engine: TorchEngine) -> None:
    free, name = engine.kv_tokens_free, BlockId(b"block")
    engine.open(A, ALL, 2 * BLOCK_TOKENS)
    engine.run([prompt(A, *[3] * (BLOCK_TOKENS - 1))])
    with pytest.raises(UsageError, match="0 whole blocks"):
        engine.seal(A, [(0, name)])
    engine.run([prompt(A, 3, position=BLOCK_TOKENS - 1)])
    with pytest.raises(UsageError, match="1 whole block"):
        engine.seal(A, [(1, name)])
    with pytest.raises(UsageError, match="not here"):
        engine.open(B, ALL, 2 * BLOCK_TOKENS, [name])
    engine.seal(A, [(0, name)])
    with pytest.raises(UsageError, match="not here"):
        engine.open(B, BACK, 2 * BLOCK_TOKENS, [name])
    engine.release(A)
    assert engine.kv_tokens_free == free - BLOCK_TOKENS * LAYERS
    engine.open(B, ALL, 2 * BLOCK_TOKENS, [name])
    assert engine.kv_tokens_free == free - 2 * BLOCK_TOKENS * LAYERS
    engine.release(B)
    engine.evict([name])
    assert engine.kv_tokens_free == free
    with pytest.raises(UsageError, match="whole blocks"):
        engine.seal(C, [(0, name)])


def test_opening_layers_that_are_not_held_is_refused(model: PreparedModel) -> None:
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    engine.load(Span(0, 2))
    with pytest.raises(UsageError, match="does not hold"):
        engine.open(A, ALL, 10)


def test_opening_a_session_twice_is_refused(engine: TorchEngine) -> None:
    engine.open(A, ALL, 10)
    with pytest.raises(Busy, match="already open"):
        engine.open(A, ALL, 10)


BAD = {
    "an unknown session": (prompt(C), "not open"),
    "a position ahead of the KV": (prompt(B, position=1), "out of step"),
    "more tokens than were opened": (prompt(B, *range(3, 30)), "would get more"),
    "layers outside the session's": (prompt(B, layers=Span(0, 3)), "opened for"),
    "a token that does not exist": (prompt(B, VOCAB), "token ids"),
    "a negative token": (prompt(B, -1), "token ids"),
    "an activation for layer 0": (inner(B, activation(), Span(0, 2)), "needs token ids"),
    "an activation of another width": (inner(B, activation(hidden=32)), "is needed"),
    "an activation of another dtype": (inner(B, activation(dtype="float16")), "is needed"),
    "an activation that is not a number": (inner(B, activation(float("nan"))), "undefined numbers"),
}


@pytest.mark.parametrize(("bad", "says"), BAD.values(), ids=BAD.keys())
def test_bad_work_gets_an_error_and_the_others_their_tokens(engine: TorchEngine, bad: Work, says: str) -> None:
    # B's layers suit the bad item, so that it fails for its own reason only.
    span = Span(0, 2) if bad.layers == Span(0, 3) else bad.layers
    engine.open(B, span, 20)
    engine.open(A, ALL, 20)
    alone = engine.run([prompt(A)])[0].token_id
    engine.release(A)
    engine.open(A, ALL, 20)
    first, second = engine.run([bad, prompt(A)])
    assert first.error is not None and says in first.error
    assert first.token_id is None and first.activation is None
    assert second.error is None and second.token_id == alone


def test_the_same_session_twice_in_a_batch_is_refused_once(engine: TorchEngine) -> None:
    engine.open(A, ALL, 20)
    first, second = engine.run([prompt(A), prompt(A)])
    assert first.error is None and second.error is not None


def test_a_position_is_not_run_twice(engine: TorchEngine) -> None:
    engine.open(A, ALL, 20)
    assert engine.run([prompt(A)])[0].error is None
    error = engine.run([prompt(A)])[0].error
    assert error is not None and "out of step" in error


def test_an_item_that_breaks_the_computation_takes_no_other_with_it(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.open(A, ALL, 20)
    engine.open(B, ALL, 20)
    expected = engine.run([prompt(A)])[0].token_id
    engine.release(A)
    engine.open(A, ALL, 20)
    whole = engine._model.run_layers

    def breaks(layers: range, hidden: object, positions: object) -> object:
        if hidden.shape[1] != 3:  # type: ignore[attr-defined]
            raise RuntimeError("out of memory")
        return whole(layers, hidden, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._model, "run_layers", breaks)
    good, bad = engine.run([prompt(A), prompt(B, 3, 4, 5, 6)])
    assert good.token_id == expected and good.error is None
    assert bad.error is not None and "out of memory" in bad.error


def test_nothing_of_a_released_session_reaches_the_next(engine: TorchEngine) -> None:
    """Overflown numbers left in a page must not spread to its next owner."""
    clean = Pipeline([(engine, ALL)], "clean", 30)
    expected = clean.generate([9, 8, 7], 5)
    clean.close()
    engine.open(A, ALL, 30)
    engine._pool.k.fill_(float("nan"))
    engine._pool.sessions[A].filled = dict.fromkeys(range(LAYERS), 30)
    engine.release(A)
    assert Pipeline([(engine, ALL)], "next", 30).generate([9, 8, 7], 5) == expected


def test_progress_ends_at_the_bytes_that_were_loaded(model: PreparedModel) -> None:
    seen: list[tuple[int, int]] = []
    engine = TorchEngine(model, device="cpu", memory_bytes=MEMORY)
    engine.load(Span(0, 2), lambda done, total: seen.append((done, total)))
    manifest = model.manifest
    assert seen[-1] == (manifest.span_bytes(0, 2),) * 2
    engine.load(Span(0, 3), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.layer_bytes,) * 2


def test_an_empty_batch_gives_nothing(engine: TorchEngine) -> None:
    assert engine.run([]) == []


def test_dropping_everything_frees_the_memory(engine: TorchEngine, tmp_path: Path) -> None:
    engine.drop(None)
    assert engine.held() == () and engine.kv_tokens_free == 0

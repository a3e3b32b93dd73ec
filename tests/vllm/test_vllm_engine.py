"""VllmEngine says what transformers' whole model says, whatever is held, shared, grown, loaded or dropped meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest

from helixnet.core.errors import Busy, MemoryTooSmall, ModelError, UsageError
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.work import Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.core.wire.activation import INT8, PAIR, RAW
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.vllm_engine import VllmEngine
from helixnet.engine.vllm_layers import PAGE_TOKENS
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import GREEDY, SETTINGS, Pipeline, chosen, next_work, together, with_drafts
from tests.tiny_models import LAYERS, beside_adapter, reference, reference_tokens, write_adapter
from tests.vllm import families

MEMORY = 32_000_000
ALL = Span(0, LAYERS)
PROMPT = [5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23, 56, 31]
NEW = 10


class Tiny:
    """A prepared model, and what transformers' own whole model says after a prompt."""

    def __init__(self, model: PreparedModel, whole: Any) -> None:
        self.model = model
        self._whole = whole

    def tokens(self, prompt: list[int], count: int = NEW) -> list[int]:
        """Its first greedy tokens."""
        return reference_tokens(self._whole, prompt, count)


def a_tiny(family: str, folder: Any) -> Tiny:
    checkpoint = families.write(folder / "tiny", family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder / "cache"))
        return Tiny(prepare(str(checkpoint)), reference(checkpoint))


@pytest.fixture(scope="module", params=families.SPLIT)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return a_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Sliding and full windows, query and key norms, a tied head."""
    return a_tiny("gemma3", tmp_path_factory.mktemp("gemma3"))


def engine_with(model: PreparedModel, *spans: Span, memory: int = MEMORY, **options: int) -> VllmEngine:
    engine = VllmEngine(model, device="cpu", memory_bytes=memory, **options)
    for span in spans:
        engine.load(span)
    return engine


@pytest.fixture(scope="module")
def _experts_first(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first model of a process decides whether vLLM makes a group of processes for experts."""
    engine_with(a_tiny("qwen3_moe", tmp_path_factory.mktemp("first")).model, Span(0, 1))


@pytest.fixture(scope="module")
def engine(tiny: Tiny, _experts_first: None) -> VllmEngine:
    return engine_with(tiny.model, ALL)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: VllmEngine) -> Iterator[None]:
    """Every test gives back all it took of the engine that they share."""
    free = engine.kv_tokens_free
    yield
    for session in list(engine._pool.sessions):
        engine.release(session)
    engine.evict(list(engine._pool.blocks))
    assert engine.kv_tokens_free == free


def test_every_family_gives_its_tokens_in_stages(every: Tiny) -> None:
    whole = engine_with(every.model, ALL)
    cuts = [(Span(0, 1), Span(1, 3), Span(3, LAYERS)), (ALL,)]
    for number, spans in enumerate(cuts):
        stages = [(whole if span == ALL else engine_with(every.model, span), span) for span in spans]
        assert Pipeline(stages, f"s{number}", 64).generate(PROMPT, NEW, chunk=5) == every.tokens(PROMPT), spans


def test_an_adapter_is_merged_as_layers_are_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXNET_CACHE", str(tmp_path / "cache"))
    checkpoint = families.write(tmp_path / "tiny", "llama")
    adapter = write_adapter(tmp_path / "accent", checkpoint)
    right = reference_tokens(beside_adapter(reference(checkpoint), adapter, scale=6 / 4), PROMPT, NEW)
    assert right != reference_tokens(reference(checkpoint), PROMPT, NEW)
    model = prepare(str(checkpoint), adapter=str(adapter))
    stages = [(engine_with(model, span), span) for span in (Span(0, 2), Span(2, LAYERS))]
    assert Pipeline(stages, "s", 64).generate(PROMPT, NEW) == right


def test_a_family_that_cannot_be_split_says_so_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXNET_CACHE", str(tmp_path / "cache"))
    model = prepare(str(families.write(tmp_path / "tiny", "olmo2")))
    with pytest.raises(ModelError, match=r"Olmo2ForCausalLM.*--engine torch"):
        engine_with(model, Span(0, 2))


def test_every_split_of_the_layers_gives_the_whole_models_tokens(tiny: Tiny, engine: VllmEngine) -> None:
    """Parts of one engine's span, one after the other: sessions enter it in the middle and leave it early."""
    for count in (1, 2, 3):
        for cuts in combinations(range(1, LAYERS), count):
            spans = [Span(a, b) for a, b in pairwise((0, *cuts, LAYERS))]
            sessions = [SessionId(f"{cuts}-{span}") for span in spans]
            for session, span in zip(sessions, spans, strict=True):
                engine.open(session, span, 64)
            assert through(engine, sessions, spans) == tiny.tokens(PROMPT), cuts
            for session in sessions:
                engine.release(session)


def through(engine: VllmEngine, sessions: list[SessionId], spans: list[Span]) -> list[int]:
    tokens, made, position = PROMPT, list[int](), 0
    while len(made) < NEW:
        done = None
        for session, span in zip(sessions, spans, strict=True):
            if done is None:
                work = Work(session=session, layers=span, position=position, token_ids=tuple(tokens))
            else:
                assert done.activation is not None, done.error
                work = next_work(session, span, position, done.activation)
            (done,) = engine.run([work])
        assert done is not None and done.token_id is not None
        position += len(tokens)
        tokens = [done.token_id]
        made += tokens
    return made


def test_sessions_of_one_batch_do_not_touch_each_other(tiny: Tiny, engine: VllmEngine) -> None:
    """Three decode together, one of them only part of the layers, while a fourth comes late."""
    prompts = {f"s{n}": PROMPT[n : n + 3 + 4 * n] for n in range(3)} | {"late": PROMPT[::-1]}
    tokens = together(engine, ALL, prompts, NEW)
    assert tokens == {name: tiny.tokens(prompt) for name, prompt in prompts.items()}


def test_batches_larger_than_vllm_takes_are_run_in_parts(tiny: Tiny) -> None:
    small = engine_with(tiny.model, ALL, batch_tokens=8)
    assert Pipeline([(small, ALL)], "s", 40).generate(PROMPT, NEW) == tiny.tokens(PROMPT)


def test_blocks_of_another_session_are_begun_with_also_after_more_was_loaded(tiny: Tiny) -> None:
    front, back = engine_with(tiny.model, Span(0, 2)), engine_with(tiny.model, Span(2, LAYERS))
    stages = [(front, Span(0, 2)), (back, Span(2, LAYERS))]
    long = [(7 * n) % 100 + 3 for n in range(2 * BLOCK_TOKENS)]
    names = [BlockId(b"0"), BlockId(b"1")]
    first = Pipeline(stages, "first", len(long) + NEW)
    assert first.generate([*long, *PROMPT[:1]], 2) == tiny.tokens([*long, *PROMPT[:1]], 2)
    for engine, _ in stages:
        engine.seal(first.session, list(enumerate(names)))
    first.close()
    front.load(Span(2, 3))
    for count, prompt in ((2, PROMPT), (1, PROMPT[3:])):
        whole = long[: count * BLOCK_TOKENS] + prompt
        pipelines = [Pipeline(stages, f"{name}{count}", len(whole) + NEW, names[:count]) for name in "ab"]
        for pipeline in pipelines:
            assert pipeline.generate(prompt, NEW, chunk=5) == tiny.tokens(whole)
        for pipeline in pipelines:
            pipeline.close()
    for engine, _ in stages:
        engine.evict(names)
        assert engine._pool.pages_reserved == 0


def test_sessions_go_on_while_layers_are_loaded_and_dropped_beside_them(tiny: Tiny) -> None:
    """From [0, 2) and [2, 4) to a span that overlaps both; then the first of them keeps a part of what it had."""
    front, back = engine_with(tiny.model, Span(0, 2)), engine_with(tiny.model, Span(2, LAYERS))
    pipeline = Pipeline([(front, Span(0, 2)), (back, Span(2, LAYERS))], "s", 64)
    expected = tiny.tokens(PROMPT)
    made = pipeline.generate(PROMPT, 3)
    front.load(ALL)
    back.load(Span(1, 2))
    assert front.held() == (ALL,) and back.held() == (Span(1, LAYERS),)
    while len(made) < NEW:
        token = pipeline.feed(made[-1:])
        assert token is not None
        made.append(token)
    assert made == expected
    pipeline.close()
    back.drop(Span(2, 3))
    assert back.held() == (Span(2, 3),)
    front.drop(Span(0, 2))
    last = engine_with(tiny.model, Span(3, LAYERS))
    stages = [(front, Span(0, 2)), (back, Span(2, 3)), (last, Span(3, LAYERS))]
    assert Pipeline(stages, "again", 64).generate(PROMPT, NEW) == expected
    front.drop(None)
    assert front.held() == ()
    front.load(ALL)
    assert Pipeline([(front, ALL)], "anew", 64).generate(PROMPT, NEW) == expected


def test_a_session_may_cross_layers_that_were_loaded_one_after_the_other(tiny: Tiny) -> None:
    engine = engine_with(tiny.model, Span(0, 2), Span(3, LAYERS), Span(2, 3))
    assert engine.held() == (ALL,)
    assert Pipeline([(engine, ALL)], "s", 64).generate(PROMPT, NEW) == tiny.tokens(PROMPT)


def test_room_that_grows_gives_the_same_tokens(tiny: Tiny, engine: VllmEngine) -> None:
    prompt = [(7 * n) % 100 + 3 for n in range(PAGE_TOKENS - 3)]
    pipeline = Pipeline([(engine, ALL)], "grown", len(prompt))
    made = [pipeline.feed(prompt)]
    while len(made) < NEW:
        engine.extend(SessionId("grown"), pipeline.position + 1)
        assert made[-1] is not None
        made.append(pipeline.feed([made[-1]]))
    assert made == tiny.tokens(prompt)


@pytest.mark.parametrize("packing", [RAW, PAIR, INT8])
def test_what_is_handed_on_is_packed_as_was_asked(tiny: Tiny, engine: VllmEngine, packing: str) -> None:
    a, b = SessionId("a"), SessionId("b")
    engine.open(a, Span(0, 2), 40)
    engine.open(b, Span(2, LAYERS), 40)
    work = Work(session=a, layers=Span(0, 2), position=0, token_ids=tuple(PROMPT), packing=packing)
    (done,) = engine.run([work])
    assert done.activation is not None and done.activation.packing == packing
    (answer,) = engine.run([next_work(b, Span(2, LAYERS), 0, done.activation)])
    assert answer.token_id == tiny.tokens(PROMPT, 1)[0]


def test_what_it_hands_on_is_what_our_own_engine_takes(tiny: Tiny, engine: VllmEngine) -> None:
    """Peers with either engine serve one model together."""
    ours = TorchEngine(tiny.model, device="cpu", memory_bytes=MEMORY)
    ours.load(ALL)
    for first, second in ((engine, ours), (ours, engine)):
        stages = [(first, Span(0, 2)), (second, Span(2, LAYERS))]
        pipeline = Pipeline(stages, "mixed", 64)
        assert pipeline.generate(PROMPT, NEW) == tiny.tokens(PROMPT)
        pipeline.close()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_tokens_are_chosen_as_our_own_engine_chooses_them(tiny: Tiny, engine: VllmEngine, order: int) -> None:
    """Whatever the order of requests in a batch, and whoever else is in it."""
    ours = TorchEngine(tiny.model, device="cpu", memory_bytes=MEMORY)
    ours.load(ALL)
    prompts = {name: PROMPT[number:] for number, name in enumerate(SETTINGS)}
    assert chosen(engine, ALL, prompts, NEW, order) == chosen(ours, ALL, prompts, NEW, 0)


def test_drafts_are_kept_as_far_as_they_are_what_would_have_been_chosen(tiny: Tiny, engine: VllmEngine) -> None:
    """Also where a batch is run in parts."""
    prompts = {name: PROMPT[number:] for number, name in enumerate(SETTINGS)}
    alone = chosen(engine, ALL, prompts, NEW, 0)
    assert with_drafts([(engine, ALL)], prompts, alone) == alone
    stages = [(engine_with(tiny.model, span, batch_tokens=8), span) for span in (Span(0, 1), Span(1, LAYERS))]
    assert with_drafts(stages, prompts, alone) == alone


def test_bad_work_gets_an_error_and_the_others_their_tokens(tiny: Tiny, engine: VllmEngine) -> None:
    good = Pipeline([(engine, ALL)], "good", 20)
    engine.open(SessionId("bad"), ALL, 20)
    bad = Work(session=SessionId("bad"), layers=ALL, position=5, token_ids=(1, 2), sample=GREEDY)
    unknown = Work(session=SessionId("unknown"), layers=ALL, position=0, token_ids=(1,), sample=GREEDY)
    first, second, third = engine.run([bad, good.first_work(PROMPT, sample=True), unknown])
    assert first.error is not None and "out of step" in first.error
    assert third.error is not None and "not open" in third.error
    assert second.token_id == tiny.tokens(PROMPT, 1)[0]


def test_memory_is_counted_and_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    manifest = tiny.model.manifest
    page = PAGE_TOKENS * manifest.kv_bytes
    engine = engine_with(tiny.model, Span(1, 2), memory=manifest.span_bytes(1, 3) + 2 * 4 * page)
    engine.open(SessionId("a"), Span(1, 2), 200)
    engine.load(Span(1, 3))
    assert engine.kv_tokens_free == (4 - 4) * PAGE_TOKENS, "what the new layer leaves is taken by the session"
    with pytest.raises(Busy, match="no KV room"):
        engine.open(SessionId("b"), Span(1, 2), 1)
    with pytest.raises(MemoryTooSmall, match="--memory"):
        engine.load(ALL)
    with pytest.raises(UsageError, match="does not hold"):
        engine.open(SessionId("c"), ALL, 1)
    engine.release(SessionId("a"))
    assert engine.kv_tokens_free == 4 * PAGE_TOKENS


def test_nothing_of_a_released_session_reaches_the_next(tiny: Tiny, engine: VllmEngine) -> None:
    """Overflown numbers left in a page must not spread to its next owner."""
    engine.open(SessionId("a"), ALL, 30)
    for stage in engine._pool.stages:
        stage.fill(engine._pool.sessions[SessionId("a")].pages, float("nan"))  # type: ignore[arg-type]
    engine._pool.sessions[SessionId("a")].filled = dict.fromkeys(range(LAYERS), 30)
    engine.release(SessionId("a"))
    assert Pipeline([(engine, ALL)], "next", 30).generate(PROMPT, NEW) == tiny.tokens(PROMPT)

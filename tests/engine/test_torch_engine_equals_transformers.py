"""Greedy tokens of any split of the layers are those of transformers' own `generate` on the whole model."""

from __future__ import annotations

import os
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.work import Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.engine.torch_engine import TorchEngine
from helixnet.engine.weights.catalog import prepare
from helixnet.engine.weights.prepared import PreparedModel
from tests.engine.engine_driver import GREEDY, SETTINGS, Pipeline, chosen, next_work, together, watched, with_drafts
from tests.tiny_models import FAMILIES, LAYERS, reference, reference_tokens, write_checkpoint

MEMORY = 8_000_000
DEVICE = os.environ.get("HELIXNET_TEST_DEVICE", "cpu")
"""What is compared with transformers, which computes on the CPU; see docs/gpu.md."""
PROMPT = [5, 17, 99, 3, 42, 64, 7, 7, 120, 11, 23, 56, 31]
NEW = 12
CLOSE = 2e-5
"""Of the largest logit: float32 sums in another order."""


class Tiny:
    """A prepared model, and what transformers' own whole model says after a prompt (asked once for each)."""

    def __init__(self, model: PreparedModel, whole: Any) -> None:
        self.model = model
        self._whole = whole
        self._said: dict[tuple[int, ...], list[int]] = {}
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def tokens(self, prompt: list[int]) -> list[int]:
        """The first `NEW` greedy tokens."""
        key = tuple(prompt)
        if key not in self._said:
            self._said[key] = reference_tokens(self._whole, prompt, NEW)
        return self._said[key]

    def logits(self, prompt: list[int] = PROMPT) -> torch.Tensor:
        """[NEW, vocab]: what it says after a prompt, and after each of its own tokens but the last."""
        key = tuple(prompt)
        if key not in self._logits:
            ids = torch.tensor([[*prompt, *self.tokens(prompt)[:-1]]])
            with torch.inference_mode():
                self._logits[key] = self._whole(ids).logits[0, len(prompt) - 1 :]
        return self._logits[key]


def engine_with(model: PreparedModel, *spans: Span) -> TorchEngine:
    engine = TorchEngine(model, device=DEVICE, memory_bytes=MEMORY)
    for span in spans:
        engine.load(span)
    return engine


ALWAYS = ("gemma3", "qwen3")
"""Between them: fused layers and not, q/k norms, sliding windows, both rotary kinds, scaled ends. The rest is slow; an
untied head is also in what the hub and the catalog serve."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in sorted(FAMILIES)],
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param) / "tiny", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIXNET_CACHE", str(folder.parent / "cache"))
        return Tiny(prepare(str(folder)), reference(folder))


def splits() -> list[tuple[Span, ...]]:
    """Every way to cut the layers into one, two or three stages."""
    found = []
    for count in (0, 1, 2):
        for cuts in combinations(range(1, LAYERS), count):
            edges = (0, *cuts, LAYERS)
            found.append(tuple(Span(a, b) for a, b in pairwise(edges)))
    return found


def test_every_split_of_the_layers_gives_the_whole_models_logits_and_tokens(tiny: Tiny) -> None:
    engines = {span: engine_with(tiny.model, span) for spans in splits() for span in spans}
    largest = float(tiny.logits().abs().max())
    for number, spans in enumerate(splits()):
        pipeline = Pipeline([(engines[span], span) for span in spans], f"s{number}", 64)
        with watched(engines[spans[-1]]) as seen:
            assert pipeline.generate(PROMPT, NEW) == tiny.tokens(PROMPT), spans
        torch.testing.assert_close(torch.cat(seen), tiny.logits(), rtol=0, atol=CLOSE * largest)


def test_stages_may_run_parts_of_overlapping_spans(tiny: Tiny) -> None:
    model = tiny.model
    first, second = engine_with(model, Span(0, 3)), engine_with(model, Span(1, LAYERS))
    for cut in (1, 2, 3):
        pipeline = Pipeline([(first, Span(0, cut)), (second, Span(cut, LAYERS))], f"s{cut}", 64)
        assert pipeline.generate(PROMPT, NEW) == tiny.tokens(PROMPT)


def test_a_prompt_in_chunks_gives_the_same_tokens(tiny: Tiny) -> None:
    model = tiny.model
    engine = engine_with(model, Span(0, LAYERS))
    for chunk in (1, 4, 5):
        pipeline = Pipeline([(engine, Span(0, LAYERS))], f"chunk-{chunk}", 64)
        assert pipeline.generate(PROMPT, NEW, chunk) == tiny.tokens(PROMPT)


LONG_PROMPT = [(37 * n * n + 11 * n) % 120 + 3 for n in range(240)]
"""More tokens than attend at once, and enough before some of them to be attended to by themselves."""


@pytest.mark.parametrize("chunk", [1000, 150, 30])
def test_a_long_prompt_gives_the_whole_models_logits_and_tokens(tiny: Tiny, chunk: int) -> None:
    engine = engine_with(tiny.model, Span(0, LAYERS))
    with watched(engine) as seen:
        pipeline = Pipeline([(engine, Span(0, LAYERS))], "s", 256)
        assert pipeline.generate(LONG_PROMPT, NEW, chunk) == tiny.tokens(LONG_PROMPT)
    expected = tiny.logits(LONG_PROMPT)
    torch.testing.assert_close(torch.cat(seen), expected, rtol=0, atol=CLOSE * float(expected.abs().max()))


@pytest.mark.parametrize("gather", [False, True], ids=["row by row", "gathered"])
def test_sessions_of_one_batch_do_not_touch_each_other(
    tiny: Tiny, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sessions of different lengths decode together while a fourth is prefilled in between."""
    model = tiny.model
    gather_decode_rows(monkeypatch, 1 << 30 if gather else 0)
    engine = engine_with(model, Span(0, LAYERS))
    prompts = {f"s{n}": PROMPT[n : n + 3 + 4 * n] for n in range(3)} | {"late": PROMPT[::-1]}
    tokens = together(engine, Span(0, LAYERS), prompts, NEW)
    assert tokens == {name: tiny.tokens(prompt) for name, prompt in prompts.items()}


def test_tokens_are_chosen_the_same_whatever_the_order_of_a_batch(tiny: Tiny) -> None:
    engine = engine_with(tiny.model, Span(0, LAYERS))
    prompts = {name: PROMPT[number:] for number, name in enumerate(SETTINGS)}
    alone = chosen(engine, Span(0, LAYERS), prompts, NEW, 0)
    assert len({tuple(tokens) for tokens in alone.values()}) > 2
    for order in (1, 2, 3):
        assert chosen(engine, Span(0, LAYERS), prompts, NEW, order) == alone


def test_drafts_are_kept_as_far_as_they_are_what_would_have_been_chosen(tiny: Tiny) -> None:
    """By one stage and by two: what wrong ones left behind is in nobody's way."""
    prompts = {name: PROMPT[number:] for number, name in enumerate(SETTINGS)}
    engine = engine_with(tiny.model, Span(0, LAYERS))
    alone = chosen(engine, Span(0, LAYERS), prompts, NEW, 0)
    assert with_drafts([(engine, Span(0, LAYERS))], prompts, alone) == alone
    stages = [(engine_with(tiny.model, span), span) for span in (Span(0, 1), Span(1, LAYERS))]
    assert with_drafts(stages, prompts, alone) == alone


def test_items_of_a_batch_may_run_different_layers(tiny: Tiny) -> None:
    model = tiny.model
    engine = engine_with(model, Span(0, LAYERS))
    everything = Pipeline([(engine, Span(0, LAYERS))], "all", 40)
    front = Pipeline([(engine, Span(0, 2))], "front", 40)
    back = SessionId("back")
    engine.open(back, Span(2, LAYERS), 40)
    tokens = {"all": PROMPT, "front": PROMPT}
    out: list[int] = []
    answers: list[int] = []
    for _ in range(NEW):
        one, two = engine.run([front.first_work(tokens["front"], True), everything.first_work(tokens["all"], True)])
        assert one.activation is not None and two.token_id is not None
        (three,) = engine.run([next_work(back, Span(2, LAYERS), front.position, one.activation)])
        assert three.token_id is not None
        front.position += len(tokens["front"])
        everything.position += len(tokens["all"])
        out.append(two.token_id)
        answers.append(three.token_id)
        tokens = {"all": [two.token_id], "front": [three.token_id]}
    assert out == answers == tiny.tokens(PROMPT)


def test_scattered_pages_give_the_same_tokens(tiny: Tiny) -> None:
    """Sessions come and go until no run of pages is free; the next one gets what is left here and there."""
    model = tiny.model
    page = 16 * model.manifest.kv_bytes
    engine = TorchEngine(model, device=DEVICE, memory_bytes=MEMORY)
    engine.load(Span(0, LAYERS))
    weights = MEMORY - engine.kv_tokens_free // 16 * page
    small = TorchEngine(model, device=DEVICE, memory_bytes=weights + 12 * LAYERS * page)
    small.load(Span(0, LAYERS))
    for n in range(small.kv_tokens_free // 16 // LAYERS):
        small.open(SessionId(f"n{n}"), Span(0, LAYERS), 16)
    for n in range(0, 12, 2):
        small.release(SessionId(f"n{n}"))
    pipeline = Pipeline([(small, Span(0, LAYERS))], "scattered", 40)
    assert pipeline.generate(PROMPT, NEW) == tiny.tokens(PROMPT)


def test_room_that_grows_page_by_page_gives_the_same_tokens(tiny: Tiny) -> None:
    """Between two others that grow, too, so that its pages do not follow one another."""
    engine = engine_with(tiny.model, Span(0, LAYERS))
    pipeline = Pipeline([(engine, Span(0, LAYERS))], "grown", len(PROMPT))
    for name in ("before", "after"):
        engine.open(SessionId(name), Span(0, LAYERS), 16)
    made = [pipeline.feed(PROMPT)]
    while len(made) < NEW:
        for name in ("before", "grown", "after"):
            engine.extend(SessionId(name), pipeline.position + 1)
        assert made[-1] is not None
        made.append(pipeline.feed([made[-1]]))
    assert made == tiny.tokens(PROMPT)
    for name in ("before", "grown", "after"):
        engine.release(SessionId(name))
    assert engine.kv_tokens_free == engine_with(tiny.model, Span(0, LAYERS)).kv_tokens_free


def test_prompts_that_begin_with_blocks_of_another_give_the_same_tokens(tiny: Tiny) -> None:
    """Two of them at once, of two stages, after the one whose blocks they are has gone and the pool has moved."""
    front, back = engine_with(tiny.model, Span(0, 2)), engine_with(tiny.model, Span(2, LAYERS))
    stages = [(front, Span(0, 2)), (back, Span(2, LAYERS))]
    free = front.kv_tokens_free, back.kv_tokens_free
    long = [(7 * n) % 100 + 3 for n in range(2 * BLOCK_TOKENS)]
    names = [BlockId(b"0"), BlockId(b"1")]
    first = Pipeline(stages, "first", len(long) + NEW)
    assert first.generate(long + PROMPT[:1], 2) == tiny.tokens(long + PROMPT[:1])[:2]
    for engine, _ in stages:
        engine.seal(first.session, list(enumerate(names)))
    first.close()
    other = Pipeline(stages, "other", 40)
    front.load(Span(2, 3))
    for count, prompt in ((2, PROMPT), (1, PROMPT[3:])):
        whole = long[: count * BLOCK_TOKENS] + prompt
        pipelines = [Pipeline(stages, f"{name}{count}", len(whole) + NEW, names[:count]) for name in "ab"]
        for pipeline in pipelines:
            assert pipeline.generate(prompt, NEW, chunk=5) == tiny.tokens(whole)
        for pipeline in pipelines:
            pipeline.close()
    assert other.generate(PROMPT, NEW) == tiny.tokens(PROMPT), "pages beside theirs are not theirs"
    other.close()
    front.drop(Span(0, 2))
    for engine, _ in stages:
        engine.evict([*names, BlockId(b"unknown")])
    assert (front.kv_tokens_free, back.kv_tokens_free) == free


def test_growing_a_span_keeps_what_is_there_and_its_sessions(tiny: Tiny) -> None:
    model = tiny.model
    front, back = engine_with(model, Span(0, 2)), engine_with(model, Span(2, LAYERS))
    pipeline = Pipeline([(front, Span(0, 2)), (back, Span(2, LAYERS))], "s", 64)
    expected = tiny.tokens(PROMPT)
    tokens = pipeline.generate(PROMPT, NEW // 2)
    front.load(Span(0, LAYERS))
    back.load(Span(1, 2))
    assert front.held() == (Span(0, LAYERS),) and back.held() == (Span(1, LAYERS),)
    while len(tokens) < NEW:
        token = pipeline.feed(tokens[-1:])
        assert token is not None
        tokens.append(token)
    assert tokens == expected
    back.drop(None)
    alone = Pipeline([(front, Span(0, LAYERS))], "alone", 64)
    assert alone.generate(PROMPT, NEW) == expected


def test_dropping_one_end_leaves_a_tied_model_whole(tiny: Tiny) -> None:
    model = tiny.model
    engine, other = engine_with(model, Span(0, LAYERS)), engine_with(model, Span(0, 2))
    engine.drop(Span(2, LAYERS))
    assert engine.held() == (Span(2, LAYERS),)
    pipeline = Pipeline([(other, Span(0, 2)), (engine, Span(2, LAYERS))], "s", 64)
    assert pipeline.generate(PROMPT, NEW) == tiny.tokens(PROMPT)


def gather_decode_rows(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """Attend as on an accelerator, where all decode rows are gathered, or one by one."""
    from helixnet.engine import torch_engine
    from helixnet.engine.attention import Step

    monkeypatch.setattr(torch_engine, "Step", lambda pool, layers, rows, _: Step(pool, layers, rows, pages))


def test_sampling_is_not_asked_for_inside_a_prompt(tiny: Tiny) -> None:
    model = tiny.model
    engine = engine_with(model, Span(0, LAYERS))
    engine.open(SessionId("s"), Span(0, LAYERS), 20)
    work = Work(session=SessionId("s"), layers=Span(0, LAYERS), position=0, token_ids=(1, 2, 3))
    (done,) = engine.run([work])
    assert (done.token_id, done.activation, done.error) == (None, None, None)
    assert GREEDY.temperature == 0

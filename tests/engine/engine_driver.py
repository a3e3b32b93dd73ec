"""Drives engines the way stages do: work in, activations over the (imaginary) wire, a token out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from msgspec.structs import replace

from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.sampling import History, Sampling
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.core.wire.activation import Activation
from helixnet.engine.base import Engine
from helixnet.engine.torch_engine import TorchEngine

GREEDY = Sampling()

SETTINGS = {
    "greedy": GREEDY,
    "plain": Sampling(temperature=0.8, seed=3),
    "cut": Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=4),
    "penalties": Sampling(
        temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=4, seed=5
    ),
    "bans": Sampling(logit_bias=((7, 3.0), (9, -100.0)), bad_words=((31,), (5, 6)), logprobs=3),
}
"""Requests that want their tokens chosen in different ways."""


def chosen(engine: Engine, span: Span, prompts: dict[str, list[int]], count: int, order: int) -> dict[str, list[int]]:
    """`count` tokens of a session for each of `SETTINGS`, all in one batch, in another order in each step.

    With `order` 0 each has the engine for itself.
    """
    if not order:
        return {name: chosen(engine, span, {name: prompts[name]}, count, -1)[name] for name in prompts}
    mixed = random.Random(order)
    histories = {name: History(prompt=tuple(prompt), stop_ids=(2,)) for name, prompt in prompts.items()}
    for name in prompts:
        engine.open(SessionId(name), span, 64)
    for _ in range(count):
        names = mixed.sample(list(prompts), len(prompts))
        batch = [_next_choice(name, span, prompts[name], histories[name]) for name in names]
        for work, done in zip(batch, engine.run(batch), strict=True):
            assert done.token_id is not None, done.error
            histories[work.session].made.append(done.token_id)
    for name in prompts:
        engine.release(SessionId(name))
    return {name: history.made for name, history in histories.items()}


def with_drafts(
    stages: Sequence[tuple[Engine, Span]], prompts: dict[str, list[int]], expected: dict[str, list[int]]
) -> dict[str, list[int]]:
    """The same tokens by steps with up to three right drafts and two wrong ones, of all sessions in one batch."""
    mixed = random.Random(1)
    histories = {name: History(prompt=tuple(prompt), stop_ids=(2,)) for name, prompt in prompts.items()}
    for engine, span in stages:
        for name in prompts:
            engine.open(SessionId(name), span, 64)
    while going := [name for name in prompts if len(histories[name].made) < len(expected[name])]:
        batch, right = [], []
        for name in going:
            work = _next_choice(name, stages[0][1], prompts[name], histories[name])
            made = len(histories[name].made)
            rights = expected[name][made : made + mixed.randrange(4)] if made else []
            wrong = [(token + 1) % 100 for token in expected[name][made + len(rights) :][: mixed.randrange(3)]]
            drafts = (*rights, *wrong) if made else ()
            batch.append(replace(work, token_ids=(*(work.token_ids or ()), *drafts), drafts=drafts))
            right.append(len(rights))
        for work, done, count in zip(batch, _through(stages, batch), right, strict=True):
            assert done.token_id is not None and done.right == count, done.error
            histories[work.session].made += (*work.drafts[:count], done.token_id)
    for engine, _ in stages:
        for name in prompts:
            engine.release(SessionId(name))
    return {name: histories[name].made[: len(tokens)] for name, tokens in expected.items()}


def _through(stages: Sequence[tuple[Engine, Span]], batch: list[Work]) -> list[Done]:
    """What comes of a batch at the end of all stages."""
    done = stages[0][0].run(batch)
    for engine, span in stages[1:]:
        batch = [
            replace(work, layers=span, token_ids=None, activation=one.activation)
            for work, one in zip(batch, done, strict=True)
        ]
        done = engine.run(batch)
    return done


def _next_choice(name: str, span: Span, prompt: list[int], history: History) -> Work:
    made = history.made
    return Work(
        session=SessionId(name),
        layers=span,
        position=len(prompt) + len(made) - 1 if made else 0,
        token_ids=tuple(made[-1:] or prompt),
        sample=SETTINGS[name],
        history=history,
    )


class Pipeline:
    """One session over a chain of engines, each running its part of the layers."""

    def __init__(
        self,
        stages: Sequence[tuple[Engine, Span]],
        session: str,
        tokens_max: int,
        begun: Sequence[BlockId] = (),
    ) -> None:
        self.stages = stages
        self.session = SessionId(session)
        self.position = BLOCK_TOKENS * len(begun)
        for engine, span in stages:
            engine.open(self.session, span, tokens_max, begun)

    def close(self) -> None:
        for engine, _ in self.stages:
            engine.release(self.session)

    def first_work(self, tokens: Sequence[int], sample: bool) -> Work:
        span = self.stages[0][1]
        return Work(
            session=self.session,
            layers=span,
            position=self.position,
            token_ids=tuple(tokens),
            sample=GREEDY if sample else None,
        )

    def feed(self, tokens: Sequence[int], sample: bool = True) -> int | None:
        """Run `tokens` through every stage; the sampled token, or None."""
        done = run_one(self.stages[0][0], self.first_work(tokens, sample))
        for engine, span in self.stages[1:]:
            assert done.activation is not None
            done = run_one(engine, next_work(self.session, span, self.position, done.activation, sample))
        self.position += len(tokens)
        return done.token_id

    def generate(self, prompt: Sequence[int], count: int, chunk: int = 1000) -> list[int]:
        """`count` greedy tokens after `prompt`, prefilled in chunks."""
        pieces = [prompt[start : start + chunk] for start in range(0, len(prompt), chunk)]
        for piece in pieces[:-1]:
            assert self.feed(piece, sample=False) is None
        tokens = [self.feed(pieces[-1])]
        while len(tokens) < count:
            assert tokens[-1] is not None
            tokens.append(self.feed([tokens[-1]]))
        return [token for token in tokens if token is not None]


def together(engine: Engine, span: Span, prompts: dict[str, list[int]], count: int) -> dict[str, list[int]]:
    """`count` greedy tokens of each session, decoding in one batch; the last one's prompt comes two turns late."""
    late = list(prompts)[-1]
    lines = {name: Pipeline([(engine, span)], name, 40) for name in prompts}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    for turn in range(count + 2):
        batch = [
            line.first_work(tokens[name][-1:] or prompts[name], sample=True)
            for name, line in lines.items()
            if name != late or turn >= 2
        ]
        for work, done in zip(batch, engine.run(batch), strict=True):
            assert done.token_id is not None, done.error
            tokens[work.session].append(done.token_id)
            lines[work.session].position += work.tokens
    return {name: made[:count] for name, made in tokens.items()}


@contextmanager
def watched(engine: TorchEngine) -> Iterator[list[torch.Tensor]]:
    """The logits that it computes, [rows, vocab] each time."""
    seen: list[torch.Tensor] = []
    compute = engine._model.logits

    def watch(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        seen.append(logits.cpu())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._model, "logits", watch)
        yield seen


def logits_after(engine: TorchEngine, span: Span, prompt: Sequence[int]) -> torch.Tensor:
    """What the whole model says after a prompt: [vocab], in float32."""
    with watched(engine) as seen:
        Pipeline([(engine, span)], "logits", len(prompt)).feed(prompt)
    return seen[0][0].float()


def next_work(session: SessionId, span: Span, position: int, activation: Activation, sample: bool = True) -> Work:
    return Work(
        session=session,
        layers=span,
        position=position,
        activation=Activation(
            dtype=activation.dtype,
            tokens=activation.tokens,
            hidden_size=activation.hidden_size,
            data=memoryview(bytes(activation.data)),
            packing=activation.packing,
        ),
        sample=GREEDY if sample else None,
    )


def run_one(engine: Engine, work: Work) -> Done:
    (done,) = engine.run([work])
    assert done.error is None, done.error
    return done

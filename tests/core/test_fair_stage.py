"""Who comes first at a stage: tokens that somebody waits for, clients in turns, and last those who can wait."""

from __future__ import annotations

import pytest

from helixnet.core.machine import BatchDone, RunBatch
from helixnet.core.route.pipeline import Pipeline, Stage
from helixnet.core.stage.batch import PREFILL_BUDGET_TOKENS, Batcher
from helixnet.core.stage.prompts import PIECE_TOKENS_MIN
from helixnet.core.stage.stage import StageMachine
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import SessionId, Span
from helixnet.core.wire import messages as wire
from tests.core.one_stage import CLIENT, ME, PIPELINE, WHOLE, a_stage, refusal, reserve, sent, work
from tests.virtual_swarm import LAYERS

ALONE = (Stage(ME, Span(0, LAYERS)),)


def sessions(batch: tuple[Work, ...]) -> list[str]:
    return [item.session for item in batch]


def test_a_client_with_many_prompts_does_not_hold_up_one_with_a_single_one() -> None:
    batcher = Batcher()
    for number in range(12):
        batcher.add(work(f"many{number}", 0, 128), "greedy")
    batcher.add(work("one", 0, 128), "modest")
    assert sessions(batcher.take()) == ["many0", "one", "many1", "many2"]
    assert sessions(batcher.take()) == ["many3", "many4", "many5", "many6"]


def test_turns_are_kept_from_batch_to_batch() -> None:
    batcher = Batcher(prefill_budget=128)
    for owner in "abc":
        for number in range(2):
            batcher.add(work(f"{owner}{number}", 0, 128), owner)
    assert [sessions(batcher.take()) for _ in range(6)] == [["a0"], ["b0"], ["c0"], ["a1"], ["b1"], ["c1"]]


def test_who_can_wait_comes_after_all_others_however_late_those_come() -> None:
    batcher = Batcher(prefill_budget=128)
    batcher.add(work("later", 0, 128), "a", yields=True)
    batcher.add(work("first", 0, 128), "b")
    assert [sessions(batcher.take()) for _ in range(2)] == [["first"], ["later"]]
    batcher.add(work("gone", 0, 128), "a", yields=True)
    batcher.forget(SessionId("gone"))
    assert batcher.take() == () and len(batcher) == 0


@pytest.mark.parametrize(
    ("prompts", "beside", "budget"),
    [(1, 30.0, 30), (3, 30.0, 90), (1, 2.0, PIECE_TOKENS_MIN), (9, 1e6, PREFILL_BUDGET_TOKENS)],
    ids=["one", "three", "hardly any", "all there is room for"],
)
def test_each_prompt_in_line_brings_what_it_may(prompts: int, beside: float, budget: int) -> None:
    batcher = Batcher()
    for number in range(prompts):
        batcher.add(work(f"p{number}", 0, 128))
    batcher.add(work("d", 9, 1, decode=True))
    taken = batcher.take(beside=beside)
    assert sum(item.tokens for item in taken) - 1 <= budget
    assert taken[0].decode and taken[1].tokens == min(128, budget)


def test_a_prompt_in_pieces_is_the_same_prompt() -> None:
    batcher, ids = Batcher(), tuple(range(100))
    batcher.add(Work(session=SessionId("p"), layers=WHOLE, position=40, token_ids=ids, wanted=True))
    pieces: list[Work] = []
    for number in range(9):
        batcher.add(work("d", number, 1, decode=True))
        pieces += batcher.take(beside=30.0)[1:]
    assert [item.position for item in pieces] == [40, 70, 100, 130]
    assert tuple(token for item in pieces for token in item.token_ids or ()) == ids
    assert [item.wanted for item in pieces] == [False, False, False, True], "only after the last is there an answer"


def prompt_s(stage: StageMachine, pipeline: Pipeline, tokens: int) -> tuple[float, float]:
    """Run a prompt on a device that takes 30 ms for a step and 1.25 ms for a prompt token beside it.

    Returns how long it took, and the longest time between two tokens of a session that was there before.
    """
    layers, now, position, last, gap = pipeline[0].layers, 0.0, 0, 0.0, 0.0
    for name, count in (("d", 1), ("p", tokens)):
        message = reserve(name, pipeline=pipeline, prompt_tokens=count, tokens_max=count + 1000)
        assert sent(stage.reserve(ME, message, 0.0)) == [wire.Reserved(session=SessionId(name))]
    stage.submit(work("d", 0, 1, layers=layers), now)
    started = stage.pump()
    while "p" in stage.sessions and stage.sessions[SessionId("p")].prompt_left:
        if position == 10:
            for start in range(0, tokens, 128):
                stage.submit(work("p", start, min(128, tokens - start), layers=layers), now)
        (batch,) = (effect.batch for effect in started if isinstance(effect, RunBatch))
        steps = [one for one in batch if one.session == "d"]
        seconds = 0.03 + 0.00125 * (sum(one.tokens for one in batch) - len(steps))
        now += seconds
        token = 7 if len(pipeline) == 1 else None
        results = tuple(Done(session=one.session, token_id=token if one in steps else None) for one in batch)
        started = stage.done(BatchDone(results, seconds), now)
        if steps:
            gap, last, position = max(gap, now - last), now, position + 1
            stage.submit(work("d", position, 1, decode=True, layers=layers), now)
            started += stage.pump()
    return now - 0.3, gap


@pytest.mark.parametrize(("pipeline", "gaps", "times"), [(ALONE, 1.76, 3.1), (PIPELINE, 3.01, 6.2)], ids=["one", "two"])
def test_a_long_prompt_slows_tokens_by_less_than_they_slow_it(pipeline: Pipeline, gaps: float, times: float) -> None:
    """Alone, a token meets one piece that takes less than itself; with other stages it may find another running."""
    took, gap = prompt_s(a_stage(held=pipeline[0].layers, pages=10_000), pipeline, 4000)
    assert gap <= gaps * 0.03
    assert took <= times * 4000 * 0.00125


def test_where_nobody_waits_for_tokens_a_prompt_runs_in_whole_chunks() -> None:
    stage = a_stage(held=Span(0, LAYERS), pages=10_000)
    stage.reserve(CLIENT, reserve("p", pipeline=ALONE, prompt_tokens=256, tokens_max=300), 0.0)
    for start in (0, 128):
        stage.submit(work("p", start, 128, layers=ALONE[0].layers), 0.0)
    sizes = []
    started = stage.pump()
    while started:
        (batch,) = (effect.batch for effect in started if isinstance(effect, RunBatch))
        sizes.append(batch[0].tokens)
        after = stage.done(BatchDone((Done(session=SessionId("p")),), 0.1), 0.1)
        started = [effect for effect in after if isinstance(effect, RunBatch)]
    assert sizes == [128, 128]


def test_who_can_wait_makes_room_first_and_is_let_in_where_there_is_plenty() -> None:
    stage = a_stage(pages=3 * 20)  # 320 tokens
    stage.reserve(CLIENT, reserve("patient", prompt_tokens=120, tokens_max=320, yields=True), 0.0)
    stage.submit(work("patient", 0, 120), 0.0)
    stage.reserve(CLIENT, reserve("new", prompt_tokens=10, tokens_max=320), 0.0)
    assert refusal(stage.reserve(CLIENT, reserve("more", prompt_tokens=10, tokens_max=320, yields=True), 0.0)) == "busy"
    stage.submit(work("new", 0, 10), 0.0)
    (broken,) = sent(stage.submit(work("new", 10, 240), 0.0))
    assert isinstance(broken, wire.Broken) and (broken.session, broken.code) == ("patient", wire.PREEMPTED)

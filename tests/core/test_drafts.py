"""Drafts: what is guessed, what a stage does with it, and that answers are what they would be without."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.machine import BatchDone, Effect, RunBatch, SealKv
from helixnet.core.prefix import BLOCK_TOKENS, chain_of
from helixnet.core.route.pipeline import Stage
from helixnet.core.sampling import Sampling
from helixnet.core.stage.drafts import FIRST, GRAM, ROWS_MAX, Drafter
from helixnet.core.stage.entry import EntryConfig, EntryMachine
from helixnet.core.stage.stage import StageMachine
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import PeerId, SessionId, Span
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import Activation
from tests.core.one_stage import CLIENT, ME, NEXT, PIPELINE, ROW, STRANGER, a_stage, reserve, sent
from tests.virtual_swarm import LAYERS, MANIFEST, VirtualSwarm, toy_output

S = SessionId("s")
PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2)
MOST = 8

# --- what is guessed -----------------------------------------------------------------------------------------------


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    drafter = Drafter((*PROMPT, 3), MOST)
    assert drafter.guess(100) == (4, 5, 6, 7)
    assert drafter.guess(2) == (4, 5)
    assert drafter.guess(0) == drafter.guess(-1) == ()
    drafter.add((77,))
    assert drafter.guess(100) == ()


def test_the_last_time_counts_and_a_loop_goes_on() -> None:
    assert Drafter((1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3), 3).guess(9) == (9, 1, 2)
    assert Drafter((5, 5, 5, 5), 6).guess(9) == (5,) * FIRST
    assert Drafter((4, 6) * 3, 6).guess(9) == (4, 6, 4, 6)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 20))
def test_guesses_are_what_looking_for_them_finds(tokens: list[int], room: int) -> None:
    """Against a search from the end, token by token."""
    last = tokens[-GRAM:]
    starts = [end for end in range(GRAM, len(tokens)) if tokens[end - GRAM : end] == last]
    expected: list[int] = []
    if starts:
        seen = tokens[starts[-1] :]
        expected = (seen * 20)[: min(room, FIRST)]
    drafter = Drafter(tuple(tokens[:7]), MOST)
    drafter.add(tokens[7:])
    assert list(drafter.guess(room)) == expected


def test_more_are_guessed_while_they_come_true_and_fewer_while_none_does() -> None:
    drafter = Drafter((1,) * 10, MOST)

    def width_after(guessed: int, right: int) -> int:
        drafter.judge(guessed, right)
        return len(drafter.guess(100))

    assert [width_after(4, 4), width_after(8, 8), width_after(8, 3), width_after(8, 0)] == [8, 8, 8, 4]
    assert [width_after(4, 0), width_after(2, 0), width_after(1, 0), width_after(0, 0), width_after(1, 1)] == [
        2,
        1,
        1,
        1,
        2,
    ]


# --- the entry -----------------------------------------------------------------------------------------------------


class Ring:
    """An entry with its stage, and an exit that says what the test tells it to."""

    def __init__(self, **changes: Any) -> None:
        values: dict[str, Any] = {
            "session": S,
            "pipeline": PIPELINE,
            "manifest_hash": MANIFEST.hash,
            "prompt": PROMPT,
            "tokens_max": 20,
            "sampling": Sampling(),
            "drafts": MOST,
        }
        self.stage = a_stage()
        self.entry = EntryMachine(ME, self.stage, EntryConfig())
        said = sent(self.entry.open(CLIENT, wire.Open(**{**values, **changes}), 0.0))
        self.stage.reserve(ME, next(one for one in said if isinstance(one, wire.Reserve)), 0.0)
        self.entry.reserved(ME, wire.Reserved(session=S), 0.0)
        self.run(self.entry.reserved(NEXT, wire.Reserved(session=S), 0.0))

    def run(self, effects: list[Effect]) -> Work | None:
        """Let the stage's engine run what there is to run."""
        batch = next((effect.batch for effect in effects if isinstance(effect, RunBatch)), ())
        for work in batch:
            activation = Activation("float32", work.tokens, 8, memoryview(bytes(ROW * work.tokens)))
            self.stage.done(BatchDone((Done(session=S, activation=activation),), 0.1), 0.1)
        return batch[0] if batch else None

    def sampled(self, position: int, token: int, right: int = 0, sender: PeerId = NEXT) -> list[Effect]:
        item = wire.SampledItem(S, position, token, None, right)
        return self.entry.sampled(sender, wire.Sampled(items=(item,)), 1.0)


def tokens(effects: list[Effect]) -> list[tuple[int, int, str]]:
    return [(one.index, one.token_id, one.finish) for one in sent(effects) if isinstance(one, wire.Token)]


def test_drafts_that_came_true_are_passed_on_and_the_next_step_begins_after_them() -> None:
    ring = Ring()
    effects = ring.sampled(10, 3)
    assert tokens(effects) == [(0, 3, "")]
    step = ring.run(effects)
    assert step is not None
    assert (step.position, step.token_ids, step.drafts, step.decode) == (11, (3, 4, 5, 6, 7), (4, 5, 6, 7), True)
    before = ring.stage.meter.total
    effects = ring.sampled(13, 66, right=2)
    assert ring.stage.meter.total - before == 3, "wrong drafts are no tokens of the flow"
    assert tokens(effects) == [(1, 4, ""), (2, 5, ""), (3, 66, "")]
    step = ring.run(effects)
    assert step is not None and (step.position, step.token_ids, step.drafts) == (14, (66,), ())


@pytest.mark.parametrize(
    ("position", "right", "sender"), [(15, 5, NEXT), (13, 1, NEXT), (10, -1, NEXT), (13, 2, STRANGER)]
)
def test_an_exit_cannot_say_what_was_not_asked(position: int, right: int, sender: PeerId) -> None:
    ring = Ring()
    ring.run(ring.sampled(10, 3))
    assert sent(ring.sampled(position, 9, right, sender)) == []
    assert ring.entry.sessions[S].made == [3]


def test_an_answer_ends_where_it_would_without_drafts() -> None:
    stops = Ring(stop_ids=(5,))
    stops.run(stops.sampled(10, 3))
    effects = stops.sampled(14, 66, right=3)
    assert tokens(effects) == [(1, 4, ""), (2, 5, "stop")] and not stops.entry.sessions
    short = Ring(tokens_max=3)
    step = short.run(short.sampled(10, 3))
    assert step is not None and step.drafts == (4,), "with the token after them there would be more than three"
    assert tokens(short.sampled(12, 5, right=1)) == [(1, 4, ""), (2, 5, "length")] and not short.entry.sessions


def test_who_wants_no_drafts_or_log_probabilities_gets_none() -> None:
    for changes in ({"drafts": 0}, {"sampling": Sampling(logprobs=0)}):
        ring = Ring(**changes)
        step = ring.run(ring.sampled(10, 3))
        assert step is not None and step.token_ids == (3,) and not step.drafts


def test_with_many_who_make_tokens_nothing_is_guessed() -> None:
    ring = Ring()
    ring.stage.decoding = ROWS_MAX // 2
    step = ring.run(ring.sampled(10, 3))
    assert step is not None and step.drafts == (4,)
    ring.stage.decoding = ROWS_MAX
    step = ring.run(ring.sampled(12, 5, right=1))
    assert step is not None and step.drafts == ()


# --- a stage -------------------------------------------------------------------------------------------------------

EXIT = (Stage(NEXT, Span(0, 3)), Stage(ME, Span(3, LAYERS)))


def an_exit(**changes: Any) -> StageMachine:
    stage = a_stage(Span(3, LAYERS))
    stage.reserve(NEXT, reserve(pipeline=EXIT, stage=1, prompt_tokens=2, **changes), 0.0)
    step(stage, 0, 2, decode=False)
    return stage


def step(stage: StageMachine, position: int, count: int, drafts: tuple[int, ...] = (), decode: bool = True) -> Work:
    frame = wire.Steps(items=(wire.StepItem(S, position, count, True, decode, drafts),))
    (run,) = (e for e in stage.steps(NEXT, frame, memoryview(bytes(ROW * count)), 0.0) if isinstance(e, RunBatch))
    return run.batch[0]


def answer(stage: StageMachine, token: int, right: int = 0) -> list[Effect]:
    return stage.done(BatchDone((Done(session=S, token_id=token, right=right),), 0.1), 0.1)


def test_the_exit_tells_how_many_were_right_and_remembers_them() -> None:
    history: dict[str, Any] = {"prompt": (4, 5), "sampling": Sampling(min_tokens=3)}
    stage = an_exit(**history)
    answer(stage, 8)
    assert step(stage, 2, 4, (10, 11, 12)).drafts == (10, 11, 12)
    (said,) = sent(answer(stage, 30, right=2))
    assert said == wire.Sampled(items=(wire.SampledItem(S, 4, 30, None, 2),))
    seen = step(stage, 5, 1).history
    assert seen is not None and seen.made == [8, 10, 11, 30]


@pytest.mark.parametrize("position", [1, 6])
def test_a_step_may_only_take_the_place_of_drafts(position: int) -> None:
    stage = an_exit()
    answer(stage, 8)
    step(stage, 2, 3, (10, 11))
    answer(stage, 9)
    for place in (3, 4):
        assert step(stage, place, 2, (5,)).position == place
        answer(stage, 9)
    frame = wire.Steps(items=(wire.StepItem(S, position + 1, 1, True, True),))
    (said,) = sent(stage.steps(NEXT, frame, memoryview(bytes(ROW)), 0.0))
    assert isinstance(said, wire.Broken)


@pytest.mark.parametrize(
    ("count", "drafts", "decode"),
    [(3, (1,), True), (1, (1,), True), (2, (1,), False), (20, (1,) * 19, True)],
    ids=["too few", "none is theirs", "a prompt's", "too many"],
)
def test_drafts_that_cannot_be_break_the_protocol(count: int, drafts: tuple[int, ...], decode: bool) -> None:
    stage = an_exit()
    answer(stage, 8)
    with pytest.raises(RemoteProtocolError, match="drafts"):
        step(stage, 2, count, drafts, decode)


def test_blocks_with_drafts_in_them_are_nobody_elses() -> None:
    """A block whose last place a wrong draft was in looks like one of the answer, and is not."""
    stage = a_stage(Span(3, LAYERS))
    prompt = tuple(range(BLOCK_TOKENS - 3))
    whole = chain_of("salt", (*prompt, 70, 71, 72))
    stage.reserve(NEXT, reserve(pipeline=EXIT, stage=1, prompt_tokens=len(prompt), tokens_max=100), 0.0)
    step(stage, 0, len(prompt), decode=False)
    answer(stage, 70)
    step(stage, len(prompt), 3, (71, 99))
    answer(stage, 72, right=1)
    assert not any(isinstance(effect, SealKv) for effect in stage.end(wire.Release(session=S, chain=whole)))


# --- swarms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 2, 3])
def test_a_text_that_repeats_itself_comes_in_fewer_rounds_and_is_the_same(words: int) -> None:
    took = []
    for drafts in (0, 4, MOST):
        swarm = VirtualSwarm(seed=1, words=words)
        for name, room in (("a", 2), ("b", 3), ("c", 4)):
            swarm.join(name, room)
        swarm.run_until(lambda swarm=swarm: all(peer.follower.active for peer in swarm.peers.values()))  # type: ignore[misc]
        begun = swarm.now
        request = swarm.ask("client", PROMPT, 60, drafts=drafts)
        swarm.run_until(lambda request=request: request.over)  # type: ignore[misc]
        assert request.tokens == toy_output(PROMPT, 60, words=words)
        took.append(swarm.now - begun)
        swarm.run_for(1.0)
        assert not any(peer.stage.sessions or peer.stage.ledger.used for peer in swarm.peers.values())
    assert all(more > less for more, less in pairwise(took)) if words == 1 else took[0] > max(took[1:])

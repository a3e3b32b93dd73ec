"""A stage and an entry, message by message: room is made, work batched, handed on, freed; bad input harms nobody."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.machine import BatchDone, Effect, OpenKv, ReleaseKv, RunBatch, Send
from helixnet.core.route.pipeline import Stage
from helixnet.core.sampling import Sampling
from helixnet.core.stage.batch import BUSY, DECODE_BATCH_MAX, PREFILL_BUDGET_TOKENS, Batcher
from helixnet.core.stage.entry import EntryConfig, EntryMachine
from helixnet.core.stage.meter import WINDOW_S, Meter
from helixnet.core.stage.stage import StageMachine
from helixnet.core.stage.work import Done
from helixnet.core.types import PeerId, SessionId, Span
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import Activation
from tests.core.one_stage import (
    CLIENT,
    FIRST_HALF,
    ME,
    NEXT,
    PIPELINE,
    ROW,
    STRANGER,
    a_stage,
    refusal,
    reserve,
    sent,
    work,
)
from tests.virtual_swarm import LAYERS, MANIFEST

# --- stage ---------------------------------------------------------------------------------------------------------


def test_a_reservation_counts_kv_and_says_so() -> None:
    stage = a_stage()
    assert sent(stage.reserve(CLIENT, reserve(), 0.0)) == [wire.Reserved(session=SessionId("s"))]
    assert stage.ledger.used == 3 * 3, "three layers, three pages of 16 tokens each"
    (opened,) = stage.submit(work("s", 0, 1), 0.0)
    assert isinstance(opened, OpenKv) and (opened.layers, opened.tokens) == (Span(0, 3), 40), "with the first token"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"manifest_hash": "other"}, "manifest"),
        ({"pipeline": PIPELINE[:1]}, "bad_request"),
        ({"stage": 1}, "bad_request"),
        ({"pipeline": (Stage(ME, Span(0, 4)), Stage(NEXT, Span(4, LAYERS)))}, "not_held"),
        ({"tokens_max": 10**6}, "too_long"),
    ],
    ids=["manifest", "short pipeline", "not our stage", "not held", "too large"],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(changes: dict[str, Any], code: str) -> None:
    stage = a_stage()
    assert refusal(stage.reserve(CLIENT, reserve(**changes), 0.0)) == code
    assert stage.sessions == {} and stage.ledger.used == 0


def test_while_layers_change_a_request_that_is_too_long_may_come_again() -> None:
    stage = a_stage()
    stage.set_held((FIRST_HALF, Span(3, LAYERS)), (FIRST_HALF,))
    assert refusal(stage.reserve(CLIENT, reserve(tokens_max=10**6), 0.0)) == "busy"


def test_a_draining_stage_admits_nothing_new() -> None:
    stage = a_stage()
    stage.draining = True
    assert refusal(stage.reserve(CLIENT, reserve(), 0.0)) == "draining"


def test_with_long_prompts_in_line_a_stage_admits_nobody_until_they_have_run() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve("s", prompt_tokens=20), 0.0)
    stage.submit(work("s", 0, 10), 0.0)
    stage.pump()
    stage.done(BatchDone((Done(session=SessionId("s")),), 1_000.0), 1_000.0)  # ten prompt tokens took so long
    assert refusal(stage.reserve(CLIENT, reserve("t"), 1_000.0)) == "busy"
    stage.submit(work("s", 10, 10), 1_000.0)
    stage.pump()
    stage.done(BatchDone((Done(session=SessionId("s")),), 1_000.0), 2_000.0)
    assert sent(stage.reserve(CLIENT, reserve("t"), 2_000.0)) == [wire.Reserved(session=SessionId("t"))]


def test_a_released_session_is_no_longer_in_line() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve("s", prompt_tokens=20), 0.0)
    stage.submit(work("s", 0, 10), 0.0)
    stage.pump()
    stage.done(BatchDone((Done(session=SessionId("s")),), 1_000.0), 1_000.0)
    stage.release(SessionId("s"))
    assert sent(stage.reserve(CLIENT, reserve("t"), 1_000.0)) == [wire.Reserved(session=SessionId("t"))]


def test_activations_of_the_wrong_length_break_the_protocol() -> None:
    stage = a_stage(Span(3, LAYERS))
    steps = wire.Steps(items=(wire.StepItem(SessionId("s"), 0, 2, True, False),))
    with pytest.raises(RemoteProtocolError, match="not as long"):
        stage.steps(NEXT, steps, memoryview(bytes(ROW)), 0.0)


def test_steps_of_a_session_that_is_not_here_are_reported_back() -> None:
    stage = a_stage()
    steps = wire.Steps(items=(wire.StepItem(SessionId("s"), 0, 1, True, False),))
    (message,) = sent(stage.steps(STRANGER, steps, memoryview(bytes(ROW)), 0.0))
    assert isinstance(message, wire.Broken) and message.suspects == (ME,)


def test_a_step_out_of_place_breaks_its_session_only() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve("s"), 0.0)
    stage.reserve(CLIENT, reserve("t"), 0.0)
    (message,) = sent(stage.submit(work("s", 5, 1), 0.0))
    assert isinstance(message, wire.Broken)
    assert list(stage.sessions) == [SessionId("t")]


def test_outputs_for_one_next_hop_share_one_frame() -> None:
    stage = a_stage()
    for name in "st":
        stage.reserve(CLIENT, reserve(name), 0.0)
        stage.submit(work(name, 0, 1), 0.0)
    (run,) = stage.pump()
    assert isinstance(run, RunBatch) and len(run.batch) == 2
    results = tuple(
        Done(session=work.session, activation=Activation("float32", 1, 8, memoryview(bytes([n]) * ROW)))
        for n, work in enumerate(run.batch)
    )
    (frame,) = (effect for effect in stage.done(BatchDone(results, 0.1), 0.1) if isinstance(effect, Send))
    assert isinstance(frame.message, wire.Steps)
    assert [item.session for item in frame.message.items] == ["s", "t"] and len(bytes(frame.body)) == 2 * ROW


def test_a_failure_of_the_engine_breaks_the_session_and_frees_it() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve(), 0.0)
    stage.submit(work("s", 0, 1), 0.0)
    stage.pump()
    effects = stage.done(BatchDone((Done(session=SessionId("s"), error="out of memory"),), 0.1), 0.1)
    assert any(isinstance(message, wire.Broken) for message in sent(effects))
    assert any(isinstance(effect, ReleaseKv) for effect in effects) and stage.ledger.used == 0


def test_when_the_next_hop_is_gone_the_entry_is_told() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve(), 0.0)
    (message,) = sent(stage.gone(NEXT, "reset"))
    assert isinstance(message, wire.Broken) and message.suspects == (NEXT,)


def test_an_idle_session_is_released() -> None:
    stage = a_stage()
    stage.reserve(CLIENT, reserve(), 0.0)
    due = stage.deadline()
    assert stage.tick(due - 0.1) == []
    stage.tick(due)
    assert stage.sessions == {} and stage.ledger.used == 0


# --- batching and pages --------------------------------------------------------------------------------------------


def test_decode_comes_first_then_prefill_within_its_budget() -> None:
    batcher = Batcher()
    for number in range(4):
        batcher.add(work(f"p{number}", 0, 2 * PREFILL_BUDGET_TOKENS // 5))
    batcher.add(work("d", 9, 1, decode=True))
    assert [item.session for item in batcher.take()] == ["d", "p0", "p1"]
    assert [item.session for item in batcher.take()] == ["p2", "p3"]


def test_who_is_busy_takes_the_whole_pile() -> None:
    batcher = Batcher()
    for number in range(40):
        batcher.add(work(f"d{number:02d}", 9, 1, decode=True))
    assert len(batcher.take(2.0, BUSY)) == 40


@pytest.mark.parametrize(
    ("ready", "share", "taken"),
    [
        (8, 8.0, [8]),
        (8, 4.0, [6, 2]),
        (8, 0.5, [2, 2, 1, 1, 1, 1]),
        (40, 2.0, [10, 8, 6, 4, 3, 3, 3, 3]),
        (1, 0.1, [1]),
    ],
    ids=["an even share at once", "a lump in parts", "hardly any share", "more of a pile", "one"],
)
def test_steps_that_came_together_do_not_all_go_on_together(ready: int, share: float, taken: list[int]) -> None:
    batcher = Batcher()
    for number in range(ready):
        batcher.add(work(f"d{number:02d}", 9, 1, decode=True))
    batches = []
    while batch := batcher.take(share):
        batches.append([item.session for item in batch])
    assert [len(batch) for batch in batches] == taken
    in_order = [f"d{number:02d}" for number in range(ready)]
    assert [session for batch in batches for session in batch] == in_order, "first come, first served"


def reserve_at(stage: StageMachine, session: SessionId) -> None:
    """Room for a session that goes on to another stage from here."""
    reserve = wire.Reserve(
        session=session,
        pipeline=PIPELINE,
        stage=0,
        manifest_hash=MANIFEST.hash,
        tokens_max=128,
        prompt_tokens=1,
        sampling=None,
    )
    stage.reserve(ME, reserve, 0.0)


def test_a_stage_that_never_rests_takes_all_that_is_ready() -> None:
    stage, sessions = a_stage(), [SessionId(f"s{number:02d}") for number in range(13)]
    for session in sessions:
        reserve_at(stage, session)
    now = 0.0
    for turn in range(100):
        stage.submit(work(sessions[0], turn, 1, decode=True), now)
        (effect,) = stage.pump()
        assert isinstance(effect, RunBatch)
        if turn == 99:
            for session in sessions[1:]:
                stage.submit(work(session, 0, 1, decode=True), now)
        now += 1.0
        after = stage.done(BatchDone((Done(session=sessions[0]),), 1.0), now)
    (last,) = (effect for effect in after if isinstance(effect, RunBatch))
    assert len(last.batch) == 12


def test_a_stage_takes_its_share_of_the_requests_in_flight_at_once() -> None:
    """Twelve sessions over two stages: six are here at a time if all is even, and half as many again go at once."""
    stage = a_stage()
    for number in range(12):
        session = SessionId(f"s{number:02d}")
        reserve_at(stage, session)
        stage.submit(work(session, 0, 1, decode=True), 0.0)
    (first,) = (effect for effect in stage.pump() if isinstance(effect, RunBatch))
    assert len(first.batch) == 9
    for number in range(12):
        stage.release(SessionId(f"s{number:02d}"))
    results = tuple(Done(session=item.session) for item in first.batch)
    assert not any(isinstance(effect, RunBatch) for effect in stage.done(BatchDone(results, 1.0), 1.0))


@pytest.mark.parametrize(
    ("parts", "steps"),
    [((Span(0, 6),), DECODE_BATCH_MAX), ((Span(0, 3), Span(3, 6)), 2 * DECODE_BATCH_MAX)],
)
def test_a_batch_is_full_when_each_layer_has_as_many_steps_as_it_may(parts: tuple[Span, ...], steps: int) -> None:
    batcher = Batcher()
    for number in range(3 * DECODE_BATCH_MAX):
        batcher.add(work(f"s{number}", 9, 1, decode=True, layers=parts[number % len(parts)]))
    assert len(batcher.take(busy=1.0)) == steps


def test_a_chunk_larger_than_the_budget_still_runs() -> None:
    batcher = Batcher()
    batcher.add(work("p", 0, PREFILL_BUDGET_TOKENS + 1))
    assert len(batcher.take()) == 1


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 300)), max_size=30))
def test_whatever_is_queued_runs_once_and_each_sessions_chunks_stay_in_order(queue: list[tuple[str, int]]) -> None:
    batcher = Batcher()
    positions = dict.fromkeys("abcd", 0)
    expected = dict.fromkeys("abcd", 0)
    for session, tokens in queue:
        batcher.add(work(session, positions[session], tokens))
        positions[session] += tokens
    while batch := batcher.take():
        assert len({item.session for item in batch}) == len(batch) <= DECODE_BATCH_MAX + 8
        for item in batch:
            assert item.position == expected[item.session]
            expected[item.session] += item.tokens
    assert expected == positions and len(batcher) == 0


def test_the_meter_forgets_what_is_older_than_its_window() -> None:
    meter = Meter()
    for second in range(20):
        meter.count(None, 10, float(second))
    (rate,) = meter.rates(19.0)
    assert 9 <= rate.tokens_per_s <= 12
    assert meter.rates(19.0 + 2 * WINDOW_S) == () and meter.total == 200


# --- entry ---------------------------------------------------------------------------------------------------------


def an_open(session: str = "s", **changes: Any) -> wire.Open:
    values: dict[str, Any] = {
        "session": SessionId(session),
        "pipeline": PIPELINE,
        "manifest_hash": MANIFEST.hash,
        "prompt": tuple(range(1, 201)),
        "tokens_max": 5,
        "sampling": Sampling(),
        "stop_ids": (7,),
    }
    return wire.Open(**{**values, **changes})


class Ring:
    """An entry with its stage, opened by a client."""

    def __init__(self) -> None:
        self.stage = a_stage()
        self.entry = EntryMachine(ME, self.stage, EntryConfig())
        self.said = self.entry.open(CLIENT, an_open(), 0.0)
        self.stage.reserve(ME, next(m for m in sent(self.said) if isinstance(m, wire.Reserve)), 0.0)

    def opened(self) -> list[Effect]:
        effects = self.entry.reserved(ME, wire.Reserved(session=SessionId("s")), 0.0)
        return effects + self.entry.reserved(NEXT, wire.Reserved(session=SessionId("s")), 0.1)

    def sampled(self, position: int, token: int, sender: PeerId = NEXT) -> list[Effect]:
        return self.entry.sampled(sender, wire.Sampled(items=(wire.SampledItem(SessionId("s"), position, token),)), 1.0)


def test_the_prompt_goes_in_by_chunks_once_every_stage_has_room() -> None:
    ring = Ring()
    assert len(sent(ring.said)) == 2
    effects = ring.opened()
    assert wire.Opened(session=SessionId("s")) in sent(effects)
    (run,) = (effect for effect in effects if isinstance(effect, RunBatch))
    assert run.batch[0].tokens == 128 and not run.batch[0].wanted


def test_only_an_exit_that_looks_back_is_told_the_prompt() -> None:
    resumed = an_open(prompt=(1, 2, 3), made=1, sampling=Sampling(repetition_penalty=1.1))
    for opened, made, told in ((an_open(), 0, ((), ())), (resumed, 1, ((1, 2, 3), (7,)))):
        reserves = sent(EntryMachine(ME, a_stage(), EntryConfig()).open(CLIENT, opened, 0.0))
        assert [(r.prompt, r.stop_ids) for r in reserves if isinstance(r, wire.Reserve)] == [((), ()), told]
        assert {r.made for r in reserves if isinstance(r, wire.Reserve)} == {made}


def test_an_exit_remembers_what_it_chose() -> None:
    stage, session = a_stage(Span(3, LAYERS)), SessionId("s")
    way = (Stage(NEXT, Span(0, 3)), Stage(ME, Span(3, LAYERS)))
    history: dict[str, Any] = {"prompt": (4, 5, 6), "made": 1, "stop_ids": (7,), "sampling": Sampling(min_tokens=3)}
    stage.reserve(NEXT, reserve(pipeline=way, stage=1, prompt_tokens=3, **history), 0.0)
    stage.sessions[session].next_position = 2
    looked_back = []
    for position, token in ((2, 8), (3, 9)):
        step = wire.Steps(items=(wire.StepItem(session, position, 1, True, True),))
        (run,) = (e for e in stage.steps(NEXT, step, memoryview(bytes(ROW)), 0.0) if isinstance(e, RunBatch))
        seen = run.batch[0].history
        assert seen is not None
        looked_back.append((seen.prompt, tuple(seen.made), seen.stop_ids))
        stage.done(BatchDone((Done(session=session, token_id=token),), 0.1), 0.1)
    assert looked_back == [((4, 5), (6,), (7,)), ((4, 5), (6, 8), (7,))]


def test_a_refusal_frees_every_stage_and_reaches_the_client() -> None:
    ring = Ring()
    refused = wire.Refused(session=SessionId("s"), peer=NEXT, code="busy")
    effects = ring.entry.refused(NEXT, refused)
    assert sent(effects) == [refused, *[wire.Release(session=SessionId("s"))] * 2]
    late = ring.entry.reserved(ME, wire.Reserved(session=SessionId("s")), 0.2)
    assert sent(late) == [wire.Release(session=SessionId("s"))], "what was reserved too late must not stay"


def test_tokens_reach_the_client_once_and_in_order() -> None:
    ring = Ring()
    ring.opened()
    assert sent(ring.sampled(199, 42))[0] == wire.Token(session=SessionId("s"), index=0, token_id=42)
    assert sent(ring.sampled(199, 42)) == [], "the same position again is not a new token"
    assert sent(ring.sampled(200, 9, sender=STRANGER)) == [], "only the exit samples"


@pytest.mark.parametrize(("token", "finish"), [(7, "stop"), (8, "length")])
def test_a_stop_id_or_the_limit_ends_the_session_everywhere(token: int, finish: str) -> None:
    ring = Ring()
    ring.opened()
    for position in range(199, 203):
        ring.stage.sessions[SessionId("s")].next_position = position + 1
        ring.sampled(position, 5)
    effects = ring.sampled(203, token)
    last = sent(effects)[0]
    assert isinstance(last, wire.Token) and last.finish == finish
    assert sent(effects)[1:] == [wire.Release(session=SessionId("s"))] * 2
    assert ring.entry.sessions == {}


def test_a_silent_stage_is_suspected_and_a_living_one_is_waited_for() -> None:
    ring, config = Ring(), EntryConfig()
    ring.opened()
    now = 0.1
    while now < config.pong_s - 1:
        now = ring.entry.deadline()
        assert wire.Ping(nonce=0) in sent(ring.entry.tick(now))
    ring.entry.pong(NEXT, now)
    assert not any(isinstance(message, wire.Broken) for message in sent(ring.entry.tick(ring.entry.deadline())))
    for _ in range(10):
        messages = sent(ring.entry.tick(ring.entry.deadline()))
        if broken := [message for message in messages if isinstance(message, wire.Broken)]:
            assert broken[0].suspects == (NEXT,)
            return
    raise AssertionError("the silent stage was never suspected")


def test_when_the_client_is_gone_its_session_is_released() -> None:
    ring = Ring()
    ring.opened()
    assert sent(ring.entry.gone(CLIENT, "closed")) == [wire.Release(session=SessionId("s"))] * 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"manifest_hash": "other"}, "manifest"),
        ({"pipeline": PIPELINE[1:]}, "bad_request"),
        ({"prompt": (1,) * 600}, "bad_request"),
        ({"prompt": (MANIFEST.vocab_size,)}, "bad_request"),
    ],
    ids=["manifest", "pipeline", "too long", "not a token"],
)
def test_an_open_that_cannot_be_is_refused(changes: dict[str, Any], code: str) -> None:
    entry = EntryMachine(ME, a_stage(), EntryConfig())
    assert refusal(entry.open(CLIENT, an_open(**changes), 0.0)) == code
    assert entry.sessions == {}

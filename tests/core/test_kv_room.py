"""KV room: counted before it is used, never over-committed, never leaked; it grows with its session."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.errors import Busy
from helixnet.core.machine import Effect, ExtendKv, OpenKv, ReleaseKv
from helixnet.core.stage.pages import PageLedger, Paging
from helixnet.core.stage.stage import StageMachine
from helixnet.core.types import SessionId
from helixnet.core.wire import messages as wire
from tests.core.one_stage import AHEAD_TOKENS, CLIENT, WHOLE, a_stage, refusal, reserve, sent, work


def test_room_grows_with_the_answer_and_is_given_back() -> None:
    stage = a_stage(pages=3 * 20)
    stage.reserve(CLIENT, reserve("s", prompt_tokens=10, tokens_max=300), 0.0)
    assert stage.ledger.used == Paging().pages(WHOLE, 10 + AHEAD_TOKENS), "the prompt, and some ahead of it"
    grown = grow_to(stage, "s", 10 + AHEAD_TOKENS + 1)
    assert [e.tokens for e in grown if isinstance(e, ExtendKv)] == [10 + 2 * AHEAD_TOKENS + 1]
    grown = grow_to(stage, "s", 300)
    assert [e.tokens for e in grown if isinstance(e, ExtendKv)] == [300], "never more than it may become"
    stage.release(SessionId("s"))
    assert stage.ledger.used == 0


def test_who_has_come_least_far_makes_room_for_the_others() -> None:
    stage = a_stage(pages=3 * 20)  # 320 tokens
    for name, tokens in (("far", 120), ("new", 30)):
        assert sent(stage.reserve(CLIENT, reserve(name, prompt_tokens=tokens, tokens_max=320), 0.0)) == [
            wire.Reserved(session=SessionId(name))
        ]
        assert [type(effect) for effect in grow_to(stage, name, tokens)] == [OpenKv]
    effects = grow_to(stage, "far", 250)
    (broken,) = sent(effects)
    assert isinstance(broken, wire.Broken) and (broken.session, broken.code) == ("new", wire.PREEMPTED)
    room = [(type(e), e.session) for e in effects if isinstance(e, ExtendKv | ReleaseKv)]
    assert room == [(ReleaseKv, "new"), (ExtendKv, "far")], "pages are free before they are taken"
    assert list(stage.sessions) == ["far"]


def test_who_grows_and_has_come_least_far_goes_itself() -> None:
    stage = a_stage(pages=3 * 20)
    for name, tokens in (("far", 120), ("new", 30)):
        stage.reserve(CLIENT, reserve(name, prompt_tokens=tokens, tokens_max=320), 0.0)
        grow_to(stage, name, tokens)
    grow_to(stage, "far", 150)
    (broken,) = sent(grow_to(stage, "new", 149))
    assert isinstance(broken, wire.Broken) and broken.session == "new"
    assert list(stage.sessions) == ["far"]


def test_no_newcomer_is_let_in_where_room_to_grow_would_be_gone() -> None:
    stage = a_stage(pages=3 * 20)
    stage.reserve(CLIENT, reserve("s", prompt_tokens=150, tokens_max=160), 0.0)
    assert refusal(stage.reserve(CLIENT, reserve("t", prompt_tokens=150, tokens_max=160), 0.0)) == "busy"
    resumed = stage.reserve(CLIENT, reserve("t", prompt_tokens=150, made=3, tokens_max=160), 0.0)
    assert sent(resumed) == [wire.Reserved(session=SessionId("t"))], "who goes on is"
    stage.release(SessionId("s"))
    stage.release(SessionId("t"))
    alone = stage.reserve(CLIENT, reserve("t", prompt_tokens=310, tokens_max=320), 0.0)
    assert sent(alone) == [wire.Reserved(session=SessionId("t"))]


def grow_to(stage: StageMachine, session: str, tokens: int) -> list[Effect]:
    """What happens when so many tokens of a session are there, and nothing runs."""
    at = stage.sessions[SessionId(session)].next_position
    effects = stage.submit(work(session, at, tokens - at), 0.0)
    stage._batcher.forget(SessionId(session))
    return effects


LEDGER_STEPS = st.lists(
    st.tuples(st.sampled_from(["reserve", "extend", "release", "resize"]), st.integers(0, 5), st.integers(1, 90)),
    max_size=80,
)


PAGINGS = (Paging(), Paging(32, by_layer=False), Paging(64, by_layer=False))


@given(LEDGER_STEPS, st.sampled_from([0.5, 0.9, 1.0]), st.sampled_from(PAGINGS))
def test_pages_are_never_over_committed_and_never_leak(
    steps: list[tuple[str, int, int]], share: float, paging: Paging
) -> None:
    """Against a dictionary that knows nothing but each session's tokens."""
    ledger, naive, capacity = PageLedger(10, paging), dict[SessionId, int](), 20
    held = 7
    page_bytes = 10 * paging.tokens * (1 if paging.by_layer else held)
    ledger.resize(20 * page_bytes + 5, held)
    rows = len(WHOLE) if paging.by_layer else 1
    pages = {tokens: rows * math.ceil(tokens / paging.tokens) for tokens in range(91)}
    for step, number, tokens in steps:
        session = SessionId(str(number))
        used = sum(pages[held] for held in naive.values())
        if step == "reserve":
            fits = used + pages[tokens] <= (int(share * capacity) if naive else capacity)
            if session not in naive and fits:
                ledger.reserve(session, WHOLE, tokens, share)
                naive[session] = tokens
            else:
                with pytest.raises(Busy):
                    ledger.reserve(session, WHOLE, tokens, share)
        elif step == "extend" and session in naive:
            tokens = max(tokens, naive[session])
            fits = used + pages[tokens] - pages[naive[session]] <= capacity
            assert ledger.extend(session, tokens) == fits
            naive[session] = tokens if fits else naive[session]
        elif step == "release":
            ledger.release(session)
            naive.pop(session, None)
        elif step == "resize":
            capacity = tokens
            ledger.resize(page_bytes * tokens + 5, held)
        assert ledger.used == sum(pages[held] for held in naive.values())
        assert [ledger.tokens(SessionId(str(n))) for n in range(6)] == [
            naive.get(SessionId(str(n)), 0) for n in range(6)
        ]
    for session in list(naive):
        ledger.release(session)
    assert ledger.used == 0 and ledger.free_share == 1.0

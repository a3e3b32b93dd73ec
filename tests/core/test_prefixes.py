"""Prompts that begin alike: what was computed of one serves the next, at all stages or at none."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.errors import Busy, RemoteProtocolError
from helixnet.core.machine import BatchDone, Effect, EvictKv, ExtendKv, OpenKv, ReleaseKv, RunBatch, SealKv
from helixnet.core.prefix import BLOCK_TOKENS, HASH_BYTES, blocks_before, chain_of
from helixnet.core.route.pipeline import Stage
from helixnet.core.stage.pages import PAGE_TOKENS, PageLedger, Paging
from helixnet.core.stage.session import block_ids
from helixnet.core.stage.stage import StageMachine
from helixnet.core.stage.work import Done
from helixnet.core.types import BlockId, SessionId, Span
from helixnet.core.wire import messages as wire
from helixnet.core.wire.coding import decode_message, encode_message
from tests.core.one_stage import CLIENT, ME, NEXT, PIPELINE, STRANGER, WHOLE, a_stage, reserve, sent, work
from tests.virtual_swarm import LAYERS, VirtualSwarm, toy_output

PROMPT = tuple(range(200))


def test_chains_tell_how_much_prompts_have_in_common() -> None:
    chain = chain_of("salt", PROMPT)
    assert len(chain) == 200 // BLOCK_TOKENS and len(set(chain)) == len(chain)
    assert chain_of("salt", PROMPT[:130]) == chain[:2]
    assert chain_of("salt", PROMPT, known=chain[:1]) == chain
    other = chain_of("salt", (*PROMPT[:100], 7, *PROMPT[101:]))
    assert other[0] == chain[0] and not set(other[1:]) & set(chain), "a block's hash is of all before it, too"
    assert not set(chain_of("pepper", PROMPT)) & set(chain)
    assert [blocks_before(tokens) for tokens in (1, 64, 65, 128, 129)] == [0, 0, 1, 1, 2]


def test_blocks_are_named_after_the_way_they_came() -> None:
    chain = chain_of("", PROMPT)
    names = block_ids(PIPELINE, 1, chain)
    assert names == block_ids(PIPELINE, 1, chain)
    by_another = (Stage(STRANGER, Span(0, 3)), PIPELINE[1])
    otherwise = (Stage(ME, Span(0, 2)), Stage(NEXT, Span(2, LAYERS)))
    for pipeline in (by_another, otherwise):
        assert not set(block_ids(pipeline, 1, chain)) & set(names)
    onward = (PIPELINE[0], Stage(STRANGER, Span(3, LAYERS)))
    assert block_ids(onward, 0, chain) == block_ids(PIPELINE, 0, chain), "where it goes on does not matter"


# --- a stage -------------------------------------------------------------------------------------------------------


def run(stage: StageMachine, session: str, tokens: int, chunk: int = 128) -> list[Effect]:
    """Bring a session so many tokens forward; all effects of that."""
    effects: list[Effect] = []
    held = stage.sessions[SessionId(session)]
    at = held.next_position if held.has_begun else None
    start = at if at is not None else BLOCK_TOKENS * held.taken
    for position in range(start, tokens, chunk):
        effects += stage.submit(work(session, position, min(chunk, tokens - position)), 0.0)
        effects += finish(stage, stage.pump())
    return effects


def finish(stage: StageMachine, started: list[Effect]) -> list[Effect]:
    """The batch that was started ends."""
    effects = list(started)
    for effect in started:
        if isinstance(effect, RunBatch):
            done = tuple(Done(session=one.session) for one in effect.batch)
            effects += stage.done(BatchDone(done, 0.1), 0.1)
    return effects


def opens(stage: StageMachine, session: str, prompt: tuple[int, ...]) -> int:
    """Reserve for a prompt; how many of its tokens the stage has."""
    chain = chain_of("", prompt)
    message = reserve(session, prompt_tokens=len(prompt), tokens_max=len(prompt) + 100, chain=chain)
    (reserved,) = sent(stage.reserve(CLIENT, message, 0.0))
    assert isinstance(reserved, wire.Reserved)
    return reserved.cached


def end(stage: StageMachine, session: str, tokens: tuple[int, ...], prompt_tokens: int) -> list[Effect]:
    chain = chain_of("", tokens)[prompt_tokens // BLOCK_TOKENS :]
    return stage.end(wire.Release(session=SessionId(session), chain=chain))


def test_a_prompt_begins_where_another_that_began_alike_has_been() -> None:
    stage = a_stage()
    assert opens(stage, "first", PROMPT) == 0
    sealed = [effect for effect in run(stage, "first", 200) if isinstance(effect, SealKv)]
    names = block_ids(PIPELINE, 0, chain_of("", PROMPT))
    assert [one for effect in sealed for one in effect.blocks] == list(enumerate(names)), "as soon as they have run"
    before = stage.ledger.used
    assert opens(stage, "second", (*PROMPT[:150], 9, 9)) == 128, "also while the other still runs"
    assert stage.ledger.used - before == 3 * math.ceil((152 + 64 - 128) / PAGE_TOKENS), "nothing is counted twice"
    (opened,) = (effect for effect in run(stage, "second", 152) if isinstance(effect, OpenKv))
    assert opened.begun == names[:2]
    for session in ("first", "second"):
        assert [type(effect) for effect in stage.release(SessionId(session))] == [ReleaseKv]
    assert stage.ledger.used == 0 and stage.ledger.cached == 3 * 3 * Paging().block_pages
    assert stage.ledger.free_share == 1.0, "what nobody uses is free to take"
    assert opens(stage, "third", PROMPT[:128]) == 64, "the last token is always run"


def test_an_answer_stays_for_the_next_turn_of_the_conversation() -> None:
    stage, answer = a_stage(), tuple(range(1000, 1070))
    opens(stage, "s", PROMPT)
    run(stage, "s", 200)
    for position in range(200, 269):
        stage.submit(work("s", position, 1, decode=True), 0.0)
        finish(stage, stage.pump())
    effects = end(stage, "s", (*PROMPT, *answer), 200)
    assert [type(effect) for effect in effects] == [SealKv, ReleaseKv]
    assert opens(stage, "next", (*PROMPT, *answer, 1, 2, 3)) == 256


def test_what_has_not_run_is_not_kept() -> None:
    stage = a_stage()
    opens(stage, "s", PROMPT)
    stage.submit(work("s", 0, 128), 0.0)
    stage.pump()
    assert [type(effect) for effect in end(stage, "s", PROMPT, 0)] == [ReleaseKv]
    assert opens(stage, "next", PROMPT) == 0


def test_all_stages_begin_where_the_one_does_that_has_least() -> None:
    stage = a_stage()
    opens(stage, "s", PROMPT)
    run(stage, "s", 200)
    end(stage, "s", PROMPT, 200)
    assert opens(stage, "next", PROMPT) == 192
    opened, extended = stage.submit(work("next", 64, 100), 0.0)
    assert isinstance(opened, OpenKv) and len(opened.begun) == 1, "another stage had 64 tokens only"
    assert isinstance(extended, ExtendKv) and extended.tokens >= 164
    finish(stage, stage.pump())
    assert stage.sessions[SessionId("next")].next_position == 164
    stage.release(SessionId("next"))
    assert stage.ledger.used == 0 and stage.ledger.cached == 3 * 3 * Paging().block_pages, (
        "blocks that it did not use stay"
    )


@pytest.mark.parametrize("position", [63, 100, 192])
def test_a_session_begins_at_the_end_of_a_block_that_is_here(position: int) -> None:
    stage = a_stage()
    opens(stage, "s", PROMPT)
    run(stage, "s", 200)
    assert opens(stage, "next", PROMPT[:150]) == 128
    (broken,) = sent(stage.submit(work("next", position, 1), 0.0))
    assert isinstance(broken, wire.Broken)
    assert "was due" in broken.reason


def test_cached_blocks_go_when_their_pages_are_needed_the_longest_unused_first() -> None:
    stage = a_stage(pages=3 * 40)  # 640 tokens
    for name in ("a", "b"):
        opens(stage, name, tuple(range(ord(name), ord(name) + 200)))
        run(stage, name, 200)
        stage.release(SessionId(name))
    assert stage.ledger.cached == 2 * 3 * 3 * Paging().block_pages
    a = block_ids(PIPELINE, 0, chain_of("", tuple(range(ord("a"), ord("a") + 200))))
    evicted: list[BlockId] = []
    for effect in stage.reserve(CLIENT, reserve("long", prompt_tokens=300, tokens_max=310), 0.0):
        evicted += effect.blocks if isinstance(effect, EvictKv) else ()
    assert evicted == [a[2]], "the end of what was used longest ago"
    assert opens(stage, "again", tuple(range(ord("a"), ord("a") + 150))) == 128


def test_layers_that_come_or_go_take_the_room_of_what_is_cached() -> None:
    stage = a_stage(held=Span(0, 3), pages=3 * 40)
    opens(stage, "s", PROMPT)
    run(stage, "s", 200)
    stage.release(SessionId("s"))
    opens(stage, "t", PROMPT[:50])
    stage.memory_bytes += stage.manifest.layer_bytes - 3 * 36 * stage.ledger.page_bytes(held=0)
    kinds = [type(effect).__name__ for effect in stage.load(Span(0, 4))]
    assert kinds[:2] == ["Send", "EvictKv"] and kinds[-1] == "LoadSpan", "nothing is over-committed while it loads"
    assert stage.ledger.used + stage.ledger.cached <= stage.ledger.capacity == 12
    stage = a_stage()
    opens(stage, "s", PROMPT)
    run(stage, "s", 200)
    stage.release(SessionId("s"))
    assert [type(effect).__name__ for effect in stage.drop(Span(1, 3))] == ["EvictKv", "DropLayers"]


@pytest.mark.parametrize(
    "changes",
    [{"chain": (b"short",)}, {"chain": (b"x" * HASH_BYTES,) * 4}, {"chain": (b"x" * HASH_BYTES,) * 10_000}],
    ids=["no hash", "more than the prompt has", "too long"],
)
def test_impossible_chains_break_the_protocol(changes: dict[str, Any]) -> None:
    data = encode_message(reserve(prompt_tokens=200, tokens_max=300, **changes))
    with pytest.raises(RemoteProtocolError):
        decode_message(data)


# --- a swarm -------------------------------------------------------------------------------------------------------


def test_the_second_of_two_prompts_that_begin_alike_runs_only_what_is_new() -> None:
    swarm = VirtualSwarm(seed=7)
    for name, room in (("a", 2), ("b", 3), ("c", 4)):
        swarm.join(name, room)
    prompt = tuple(random.Random(1).choices(range(1, 50_000), k=300))
    followed = (*prompt, 5, 6, 7)
    for number, (asked, cached) in enumerate([(prompt, 0), (followed, 256), (followed, 256), (prompt[:64], 0)]):
        request = swarm.ask("client", asked, 8)
        swarm.run_until(lambda request=request: request.over)  # type: ignore[misc]
        assert request.tokens == toy_output(asked, 8) and request.cached == cached, number
    other = swarm.ask("another", prompt, 8)
    swarm.run_until(lambda: other.over)
    assert other.tokens == toy_output(prompt, 8) and other.cached == 0, "what one client asked is nobody else's"
    swarm.run_for(1)
    assert all(peer.stage.ledger.used == 0 for peer in swarm.peers.values())
    assert any(peer.stage.ledger.cached for peer in swarm.peers.values())


# --- the ledger ----------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "extend", "seal", "cut", "release", "resize", "forget"]),
        st.integers(0, 3),
        st.integers(1, 400),
        st.integers(0, 2),
    ),
    max_size=60,
)


class Naive:
    """What the ledger is compared with: sessions know their tokens and blocks, and nothing is counted on the way."""

    def __init__(self, paging: Paging) -> None:
        self.sessions: dict[SessionId, tuple[int, list[BlockId]]] = {}
        self.rows = len(WHOLE) if paging.by_layer else 1
        self.block = self.rows * (BLOCK_TOKENS // paging.tokens)
        self._page_tokens = paging.tokens

    def pages(self, tokens: int) -> int:
        return self.rows * math.ceil(tokens / self._page_tokens)

    @property
    def used(self) -> int:
        """Of all sessions, what they share counted once."""
        own = sum(self.pages(tokens) - self.block * len(blocks) for tokens, blocks in self.sessions.values())
        return own + self.block * len({one for _, blocks in self.sessions.values() for one in blocks})


def name_of(topic: int, place: int) -> BlockId:
    return BlockId(f"{topic}/{place}".encode())


@given(STEPS, st.sampled_from([Paging(), Paging(64, by_layer=False)]))
def test_shared_pages_are_counted_once_and_go_when_nobody_uses_them(
    steps: list[tuple[str, int, int, int]], paging: Paging
) -> None:
    ledger, naive = PageLedger(1, paging), Naive(paging)
    page_bytes = paging.tokens * (1 if paging.by_layer else len(WHOLE))
    ledger.resize(250 * naive.block // 12 * page_bytes, len(WHOLE))
    there: set[BlockId] = set()
    for step, number, tokens, topic in steps:
        session = SessionId(str(number))
        held = naive.sessions.get(session)
        if step == "reserve" and held is None:
            names = [name_of(topic, place) for place in range(blocks_before(tokens))]
            begun = names[: ledger.begun(names)]
            assert begun == names[: next((n for n, one in enumerate(names) if one not in there), len(names))]
            naive.sessions[session] = (tokens, list(begun))
            if naive.used <= ledger.capacity:
                ledger.reserve(session, WHOLE, tokens, begun=begun)
            else:
                del naive.sessions[session]
                with pytest.raises(Busy):
                    ledger.reserve(session, WHOLE, tokens, begun=begun)
        elif step == "extend" and held is not None and tokens > held[0]:
            naive.sessions[session] = (tokens, held[1])
            if not ledger.extend(session, tokens):
                assert naive.used > ledger.capacity
                naive.sessions[session] = held
        elif step == "seal" and held is not None:
            place = len(held[1])
            if (place + 1) * BLOCK_TOKENS <= held[0]:
                name = name_of(topic, place)
                assert ledger.seal(session, place, name) == (name not in there)
                if name not in there:
                    held[1].append(name)
                    there.add(name)
        elif step == "cut" and held is not None and tokens // 100 < len(held[1]):
            gone = len(held[1]) - tokens // 100
            ledger.cut(session, tokens // 100)
            naive.sessions[session] = (held[0] - BLOCK_TOKENS * gone, held[1][: tokens // 100])
        elif step == "release":
            ledger.release(session)
            naive.sessions.pop(session, None)
        elif step == "resize":
            ledger.resize(tokens * naive.block // 12 * page_bytes, len(WHOLE))
        elif step == "forget" and topic == 0:
            ledger.forget()
        gone_now = ledger.take_evicted()
        in_use = {one for _, blocks in naive.sessions.values() for one in blocks}
        assert not in_use & set(gone_now) and set(gone_now) <= there
        there -= set(gone_now)
        assert ledger.used == naive.used and ledger.blocks == len(there)
        assert ledger.cached == naive.block * len(there - in_use)
        assert not ledger.cached or ledger.used + ledger.cached <= ledger.capacity
    for session in list(naive.sessions):
        ledger.release(session)
    assert ledger.used == 0

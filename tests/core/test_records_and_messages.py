"""What strangers send: records and messages come through whole or are refused with one kind of error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.route.pipeline import Stage
from helixnet.core.sampling import Sampling
from helixnet.core.swarm.records import (
    LINKS_MAX,
    RECORD_BYTES_MAX,
    LinkMeasure,
    PeerRecord,
    decode_pointer,
    decode_record,
    encode_record,
    essentials,
    links_differ,
)
from helixnet.core.types import PeerId, SessionId, Span
from helixnet.core.wire import messages as wire
from helixnet.core.wire.coding import decode_message, encode_message
from tests.virtual_swarm import capability

ME = PeerId("12D3KooWLnCof22fPtHjv3DfLUaDLcoM8nc6jKMnWa3SeC2i44Yb")


def a_record(links: int = 0) -> PeerRecord:
    return PeerRecord(
        peer=ME,
        name="office",
        addresses=("/ip4/127.0.0.1/tcp/4001/p2p/" + ME,) * 2,
        model="SmolLM2-135M-Instruct",
        manifest_hash="0" * 64,
        capability=capability(10**9),
        held=(Span(0, 4),),
        links=tuple(LinkMeasure(PeerId(f"{ME[:-3]}{n:03d}"), 0.01, 1e7) for n in range(links)),
    )


def test_a_record_comes_through_whole() -> None:
    assert decode_record(ME, encode_record(a_record(3))) == a_record(3)


def test_the_largest_record_stays_below_its_limit() -> None:
    assert len(encode_record(a_record(LINKS_MAX))) <= RECORD_BYTES_MAX


def test_a_record_about_another_peer_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="about another peer"):
        decode_record(PeerId("someone else"), encode_record(a_record()))


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    for decode in (lambda d: decode_record(ME, d), lambda d: decode_pointer(ME, d), decode_message):
        with pytest.raises(RemoteProtocolError):
            decode(data)


@given(st.data())
def test_a_damaged_message_is_refused_or_is_still_a_message(data: st.DataObject) -> None:
    good = bytearray(encode_message(an_open()))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] = data.draw(st.integers(0, 255))
    try:
        decode_message(bytes(good))
    except RemoteProtocolError:
        return


def an_open(**changes: Any) -> wire.Open:
    values: dict[str, Any] = {
        "session": SessionId("s"),
        "pipeline": (Stage(PeerId("a"), Span(0, 3)), Stage(PeerId("b"), Span(3, 6))),
        "manifest_hash": "m",
        "prompt": (1, 2),
        "tokens_max": 5,
        "sampling": Sampling(temperature=0.7, seed=3),
        "stop_ids": (2,),
    }
    return wire.Open(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "king"},
        {"held": [[0, 1]] * 5},
        {"observed": [["a", 1.0]] * 5},
        {"uptime_s": float("nan")},
        {"tokens_per_s": float("inf")},
    ],
    ids=["state", "spans", "flows", "uptime", "rate"],
)
def test_a_beat_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    plain = {"type": "Beat", "state": "active", "term": 1, "uptime_s": 1.0}
    assert isinstance(decode_message(msgspec.msgpack.encode(plain)), wire.Beat)
    with pytest.raises(RemoteProtocolError):
        decode_message(msgspec.msgpack.encode(plain | changes))


def test_the_essentials_of_a_record_are_a_fraction_of_it() -> None:
    whole = a_record(24)
    assert len(encode_record(essentials(whole))) < len(encode_record(whole)) / 3
    assert essentials(whole).addresses == whole.addresses


def test_links_differ_when_a_planner_would_care() -> None:
    old = (LinkMeasure(ME, 0.1, 1e6),)
    assert not links_differ(old, (LinkMeasure(ME, 0.11, 0.9e6),))
    assert links_differ(old, (LinkMeasure(ME, 0.1, 2e6),)) and links_differ(old, (LinkMeasure(ME, 0.2, 1e6),))
    assert links_differ(old, ()) and links_differ(old, (LinkMeasure(PeerId("x"), 0.1, 1e6),))


def test_messages_come_through_whole() -> None:
    said: list[wire.Message] = [
        an_open(),
        wire.Steps(items=(wire.StepItem(SessionId("s"), 3, 1, True, True),)),
        wire.Sampled(items=(wire.SampledItem(SessionId("s"), 3, 17),)),
        wire.Sampled(items=(wire.SampledItem(SessionId("s"), 3, 17, ((17, -0.5), (4, -1.0))),)),
        wire.Token(session=SessionId("s"), index=0, token_id=17, logprobs=((17, -0.5),)),
        an_open(made=1, sampling=Sampling(min_p=0.1, logit_bias=((3, 1.5),), bad_words=((1, 2),), logprobs=2)),
        wire.Announce(record=a_record(2)),
        wire.Beat(state="active", term=3, uptime_s=1.5, held=(Span(0, 3),), plan=(1, 2), plan_active=True),
        wire.GetRecord(),
        wire.GetView(subscribe=True, since=7, plan=(1, 2)),
        wire.Lease(term=3, coordinator=ME, stability=2, duration_s=4.0),
        wire.Broken(session=SessionId("s"), suspects=(ME,), reason="gone"),
    ]
    assert [decode_message(encode_message(message)) for message in said] == said


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (an_open(prompt=()), "out of bounds"),
        (an_open(tokens_max=0), "out of bounds"),
        (an_open(prompt=(1, -2)), "negative"),
        (an_open(prompt=(1, 2), made=2), "not made"),
        (wire.Sampled(items=(wire.SampledItem(SessionId("s"), 3, 17, ((1, 0.0),) * 22),)), "log probabilities"),
        (wire.Token(session=SessionId("s"), index=0, token_id=1, logprobs=((1, 0.0),) * 22), "log probabilities"),
        (an_open(session="x" * 65), "session id is too long"),
        (wire.Broken(session=SessionId("s"), reason="x" * 3_000), "reason is too long"),
        (wire.Steps(items=(wire.StepItem(SessionId("s"), 0, 1, True, True),) * 1_025), "too many steps"),
    ],
    ids=[
        "empty prompt",
        "no tokens",
        "negative id",
        "all made",
        "many logprobs",
        "many logprobs of a token",
        "long id",
        "long reason",
        "many steps",
    ],
)
def test_a_message_out_of_bounds_is_refused(message: wire.Message, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode_message(encode_message(message))

from __future__ import annotations

import heapq
import random

import pytest

from helixnet.core.swarm.records import LinkMeasure
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Lane
from helixnet.core.wire.messages import GetView, Ping, Pong, ProbeData, ProbeReport
from helixnet.net.base import Traffic
from helixnet.net.probe import INCOMING_MAX, PROBE_S, SECONDS_MIN, TRANSFER_BYTES, Post, Prober, refined

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NOTHING = memoryview(b"")


def measure_over(round_trip_s: float, bandwidth: float) -> tuple[LinkMeasure, float, int]:
    """Run two probers over a link under virtual time; the measure, seconds taken, bytes sent."""
    asker, answerer = Prober(random.Random(1)), Prober(random.Random(2))
    events: list[tuple[float, int, PeerId, Post]] = []
    free_at, sent, order = 0.0, 0, 0

    def send(sender: PeerId, posts: list[Post] | None, now: float) -> None:
        nonlocal free_at, sent, order
        for post in posts or []:
            size = len(post.body) + 40
            if sender == A:
                sent += size
            free_at = max(free_at, now) + size / bandwidth
            order += 1
            heapq.heappush(events, (free_at + round_trip_s / 2, order, sender, post))

    send(A, asker.measure(B, 0.0), 0.0)
    now = 0.0
    while events:
        now, _, sender, post = heapq.heappop(events)
        receiver, machine = (B, answerer) if sender == A else (A, asker)
        send(receiver, machine.receive(sender, post.message, memoryview(post.body), now), now)
    return asker.links()[B], now, sent


@pytest.mark.parametrize("round_trip_s", [0.0005, 0.05, 0.3])
@pytest.mark.parametrize("bandwidth", [100e3, 1e6, 12.5e6, 125e6])
def test_a_link_is_measured_within_a_tenth_and_a_few_seconds(round_trip_s: float, bandwidth: float) -> None:
    link, seconds, sent = measure_over(round_trip_s, bandwidth)
    assert link.target == B
    assert link.round_trip_s == pytest.approx(round_trip_s, rel=0.1, abs=0.001)
    assert link.bandwidth == pytest.approx(bandwidth, rel=0.1)
    assert seconds < 2 + 10 * round_trip_s
    assert sent < sum(TRANSFER_BYTES) + 4_000


def test_links_are_measured_one_after_the_other() -> None:
    prober = Prober(random.Random(1))
    assert [post.to for post in prober.measure(B, 0.0)] == [B]
    assert prober.measure(C, 0.0) == []
    assert prober.measure(C, 0.0) == []
    assert [post.to for post in prober.forget(B, 1.0)] == [C]
    assert prober.measure(C, 1.0) == []


def test_a_peer_that_does_not_answer_is_given_up_and_has_no_measure() -> None:
    prober = Prober(random.Random(1))
    prober.measure(B, 0.0)
    prober.measure(C, 0.0)
    assert prober.deadline() == PROBE_S
    assert prober.tick(PROBE_S - 0.1) == []
    assert [post.to for post in prober.tick(PROBE_S)] == [C]
    assert prober.links() == {}


def test_answers_that_nobody_asked_for_change_nothing() -> None:
    prober = Prober(random.Random(1))
    (ping,) = prober.measure(B, 0.0)
    assert isinstance(ping.message, Ping)
    assert prober.receive(C, Pong(nonce=ping.message.nonce), NOTHING, 0.1) == []
    assert prober.receive(B, Pong(nonce=ping.message.nonce + 1), NOTHING, 0.1) == []
    assert prober.receive(B, ProbeReport(nonce=0, received_bytes=1, seconds=1), NOTHING, 0.1) == []
    assert prober.receive(B, GetView(), NOTHING, 0.1) is None
    assert prober.links() == {}


@pytest.mark.parametrize("claim", [0.0, -1.0, float("nan"), 1e-300])
def test_a_boasting_receiver_is_believed_up_to_twice_what_was_seen(claim: float) -> None:
    prober, now = Prober(random.Random(1)), 0.0
    posts = prober.measure(B, now)
    while isinstance(posts[0].message, Ping):
        now += 0.1
        posts = prober.receive(B, Pong(nonce=posts[0].message.nonce), NOTHING, now) or []
    while posts:
        assert isinstance(posts[0].message, ProbeData)
        sent = sum(len(post.body) for post in posts)
        now += 0.1 + sent / 1e6
        report = ProbeReport(nonce=posts[0].message.nonce, received_bytes=sent, seconds=claim)
        posts = prober.receive(B, report, NOTHING, now) or []
    assert prober.links()[B].bandwidth <= 2.01e6


def test_strangers_cannot_make_the_answerer_remember_without_end() -> None:
    prober = Prober(random.Random(1))
    for number in range(INCOMING_MAX * 3):
        prober.receive(PeerId(str(number)), ProbeData(nonce=1, sequence=0), NOTHING, 0.0)
    assert len(prober._incoming) == INCOMING_MAX


def test_parts_that_arrive_at_once_do_not_divide_by_zero() -> None:
    prober = Prober(random.Random(1))
    prober.receive(B, ProbeData(nonce=1, sequence=0), NOTHING, 5.0)
    (post,) = prober.receive(B, ProbeData(nonce=1, sequence=1, final=True), memoryview(bytes(10)), 5.0) or []
    assert post.message == ProbeReport(nonce=1, received_bytes=10, seconds=SECONDS_MIN)


def test_a_full_link_pulls_the_measure_and_a_link_with_room_only_raises_it() -> None:
    link = LinkMeasure(B, 0.1, 1e6)
    assert refined(link, 2e5, busy=False).bandwidth == 1e6
    assert refined(link, 3e6, busy=False).bandwidth == 3e6
    assert 2e5 < refined(link, 2e5, busy=True).bandwidth < 1e6


def test_traffic_refines_what_was_measured() -> None:
    prober = Prober(random.Random(1))
    prober._links[B] = LinkMeasure(B, 0.1, 1e6)
    traffic = Traffic()
    prober.observe({B: traffic}, 0.0)
    traffic.sent.add(Lane.BULK, 4_000_000)
    prober.observe({B: traffic}, 1.0)
    assert prober.links()[B].bandwidth == 4e6
    traffic.sent.add(Lane.PREFILL, 500_000)
    traffic.blocked_s += 0.95
    prober.observe({B: traffic}, 2.0)
    assert 5e5 < prober.links()[B].bandwidth < 4e6

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from helixnet.core.errors import PeerGone
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import CHUNK_BYTES_MAX, Frame, FrameDecoder, Lane, encode_frame, frame_bytes
from helixnet.core.wire.coding import encode_message
from helixnet.core.wire.messages import Goodbye, Ping, ProbeData
from helixnet.net import streams
from helixnet.net.base import RECORD_VALUE_BYTES_MAX, Gone, Received
from helixnet.net.inbox import Inbox
from helixnet.net.memory import MemoryHost, MemoryNetwork
from helixnet.net.pipe import MemoryStream, memory_pipe
from helixnet.net.sendqueue import SendQueue
from helixnet.net.streams import Channels

WAIT_S = 5.0
A, B = PeerId("a"), PeerId("b")


@pytest.fixture
async def network() -> AsyncIterator[MemoryNetwork]:
    network = MemoryNetwork()
    yield network
    await asyncio.gather(*(host.close() for host in list(network._hosts.values())))


async def next_of(host: MemoryHost | Channels) -> Received | Gone:
    return await asyncio.wait_for(host.receive(), WAIT_S)


async def message_of(host: MemoryHost | Channels) -> Received:
    item = await next_of(host)
    assert isinstance(item, Received), item
    return item


async def test_a_message_and_its_body_arrive_as_they_were_posted(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    body = bytes(range(256)) * 4000
    a.post(B, ProbeData(nonce=1, sequence=2), body, Lane.BULK)
    got = await message_of(b)
    assert (got.sender, got.message, bytes(got.body)) == (A, ProbeData(nonce=1, sequence=2), body)


async def test_messages_of_one_lane_keep_their_order_in_both_directions(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    for nonce in range(500):
        a.post(B, Ping(nonce=nonce))
        b.post(A, Ping(nonce=nonce))
    for host in (a, b):
        assert [(await message_of(host)).message for _ in range(500)] == [Ping(nonce=n) for n in range(500)]


async def test_a_token_overtakes_bulk_that_was_posted_earlier(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    for sequence in range(4):
        a.post(B, ProbeData(nonce=0, sequence=sequence), bytes(8 * CHUNK_BYTES_MAX), Lane.BULK)
    a.post(B, Ping(nonce=7))
    assert (await message_of(b)).message == Ping(nonce=7)


async def test_a_peer_can_post_to_itself(network: MemoryNetwork) -> None:
    a = network.host("a")
    for nonce in range(3):
        a.post(A, Ping(nonce=nonce), bytes(CHUNK_BYTES_MAX))
    got = [await message_of(a) for _ in range(3)]
    assert [(item.sender, item.message) for item in got] == [(A, Ping(nonce=n)) for n in range(3)]


async def test_a_cut_gives_gone_on_both_sides_and_a_healed_link_works_again(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    a.post(B, Ping(nonce=1))
    await message_of(b)
    network.cut(A, B)
    assert [type(await next_of(host)) for host in (a, b)] == [Gone, Gone]
    a.post(B, Ping(nonce=2))
    assert isinstance(await next_of(a), Gone)
    network.heal(A, B)
    a.post(B, Ping(nonce=3))
    assert (await message_of(b)).message == Ping(nonce=3)


async def test_a_killed_peer_is_gone_once_for_everyone_it_talked_to(network: MemoryNetwork) -> None:
    a, b, c = (network.host(name) for name in "abc")
    for host in (a, c):
        host.post(B, Ping(nonce=1))
        b.post(host.peer_id, Ping(nonce=2))
        await message_of(host)
    network.kill(B)
    for host in (a, c):
        assert isinstance(await next_of(host), Gone)
        host.post(host.peer_id, Ping(nonce=9))
        assert (await message_of(host)).message == Ping(nonce=9)
    await b.close()


async def test_what_was_posted_before_close_still_arrives(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    a.post(B, Goodbye(reason="done"), bytes(3 * CHUNK_BYTES_MAX))
    closing = asyncio.create_task(a.close())
    assert (await message_of(b)).message == Goodbye(reason="done")
    assert await next_of(b) == Gone(A, "closed the channel")
    await closing
    with pytest.raises(PeerGone):
        await a.receive()


async def test_traffic_counts_the_same_bytes_on_both_sides_by_lane(network: MemoryNetwork) -> None:
    a, b = network.host("a"), network.host("b")
    a.post(B, Ping(nonce=1))
    a.post(B, ProbeData(nonce=1, sequence=0), bytes(10_000), Lane.BULK)
    await message_of(b)
    await message_of(b)
    sent, received = a.traffic()[B].sent, b.traffic()[A].received
    assert sent.bytes == received.bytes
    assert (sent.frames[Lane.TOKEN], sent.frames[Lane.PREFILL], sent.frames[Lane.BULK]) == (1, 0, 1)
    assert sent.bytes[Lane.BULK] > 10_000 > sent.bytes[Lane.TOKEN]


@pytest.fixture
def far_ends_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test ends no stream, so closing would wait for all of them: let it give up at once."""
    monkeypatch.setattr(streams, "FLUSH_S", 0.01)


def channels_with(queue: SendQueue | None = None, inbox: Inbox | None = None) -> tuple[Channels, list[MemoryStream]]:
    """Channels whose streams end in our hands."""
    far_ends: list[MemoryStream] = []

    async def open_stream(_: PeerId) -> MemoryStream:
        near, far = memory_pipe()
        far_ends.append(far)
        return near

    return Channels(A, open_stream, lambda: queue or SendQueue(), inbox), far_ends


async def test_garbage_bytes_cost_the_connection_and_are_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    channels, _ = channels_with()
    near, far = memory_pipe()
    channels.accept(B, near)
    await far.write(encode_frame(Lane.TOKEN, encode_message(Ping(nonce=1)))[0])
    assert (await message_of(channels)).message == Ping(nonce=1)
    await far.write((b"GET / HTTP/1.1\r\n\r\n",))
    gone = await next_of(channels)
    assert isinstance(gone, Gone)
    assert "broke the protocol" in gone.reason
    assert await far.read() == b""
    assert [record.exc_info for record in caplog.records] == [None]
    await channels.close()


async def test_a_frame_that_is_no_message_costs_the_connection() -> None:
    channels, _ = channels_with()
    near, far = memory_pipe()
    channels.accept(B, near)
    await far.write(encode_frame(Lane.TOKEN, b"\xc1not msgpack")[0])
    assert await far.read() == b""
    await channels.close()


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_a_full_queue_gives_one_gone_and_is_dropped() -> None:
    channels, far_ends = channels_with(SendQueue(frames_max=3))
    for nonce in range(4):
        channels.post(B, Ping(nonce=nonce))
    gone = await next_of(channels)
    assert isinstance(gone, Gone)
    assert "too much is waiting" in gone.reason
    assert far_ends == []
    channels.post(B, Ping(nonce=9))
    for _ in range(5):
        await asyncio.sleep(0)
    assert await far_ends[0].read() == encode_frame(Lane.TOKEN, encode_message(Ping(nonce=9)))[0][0]
    await channels.close()


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_an_inbox_that_nobody_reads_stops_the_sender_instead_of_growing() -> None:
    channels, _ = channels_with(inbox=Inbox(frames_max=2))
    near, far = memory_pipe()
    channels.accept(B, near)
    frame = encode_frame(Lane.BULK, encode_message(Ping(nonce=1)), bytes(CHUNK_BYTES_MAX // 2))[0]
    written = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            while True:
                await far.write(frame)
                written += 1
    assert written < 20
    for _ in range(written):
        await message_of(channels)
    await channels.close()


async def test_a_peer_that_takes_nothing_is_gone_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WRITE_STALL_S", 0.05)
    channels, _ = channels_with()
    channels.post(B, Ping(nonce=1), bytes(16 * CHUNK_BYTES_MAX), Lane.BULK)
    gone = await next_of(channels)
    assert isinstance(gone, Gone)
    assert "took nothing" in gone.reason
    await channels.close()


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_whoever_cannot_be_dialled_is_answered_on_its_own_stream_in_every_lane() -> None:
    async def open_stream(peer: PeerId) -> MemoryStream:
        raise PeerGone(f"{peer} cannot be reached")

    channels = Channels(A, open_stream)
    near, far = memory_pipe()
    channels.accept(B, near)
    await far.write(encode_frame(Lane.TOKEN, encode_message(Ping(nonce=1)))[0])
    await message_of(channels)
    decoder = FrameDecoder()
    frames: list[Frame] = []
    for lane in Lane:
        channels.post(B, Ping(nonce=lane), bytes(100), lane)
    while len(frames) < len(Lane):
        frames += decoder.feed(await asyncio.wait_for(far.read(), WAIT_S))
    assert {frame.lane for frame in frames} == set(Lane)
    await channels.close()


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_tokens_and_heavy_frames_have_streams_of_their_own() -> None:
    channels, far_ends = channels_with()
    channels.post(B, Ping(nonce=1), bytes(100), Lane.BULK)
    channels.post(B, Ping(nonce=2))
    lanes = []
    for _ in range(5):
        await asyncio.sleep(0)
    for far in far_ends:
        lanes.append([frame.lane for frame in FrameDecoder().feed(await far.read())])
    assert sorted(lanes) == [[Lane.TOKEN], [Lane.BULK]]
    await channels.close()


def test_the_queue_gives_the_most_urgent_chunk_and_gathers_small_ones() -> None:
    queue = SendQueue()
    large = encode_frame(Lane.BULK, b"bulk", bytes(2 * CHUNK_BYTES_MAX))
    small = [encode_frame(Lane.PREFILL, bytes([number])) for number in range(3)]
    assert queue.push(Lane.BULK, large, frame_bytes(4, 2 * CHUNK_BYTES_MAX))
    assert queue.take() == large[0]
    for chunks in small:
        assert queue.push(Lane.PREFILL, chunks, frame_bytes(1, 0))
    assert queue.take() == (b"".join(chunks[0][0] for chunks in small),)
    assert [queue.take(), queue.take(), queue.take()] == [large[1], large[2], ()]
    assert (queue.frames, queue.bytes) == (0, 0)


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_a_stranger_cannot_open_streams_without_end() -> None:
    channels, _ = channels_with()
    ends = [memory_pipe() for _ in range(streams.STREAMS_PER_PEER_MAX + 1)]
    for near, _ in ends:
        channels.accept(B, near)
    assert [near.broken for near, _ in ends] == [False] * streams.STREAMS_PER_PEER_MAX + [True]
    await channels.close()


@pytest.mark.usefixtures("far_ends_stay_open")
async def test_unfinished_frames_of_all_peers_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ASSEMBLY_BYTES_MAX", 100_000)
    channels, _ = channels_with()
    first, second = memory_pipe(), memory_pipe()
    channels.accept(B, first[0])
    channels.accept(PeerId("c"), second[0])
    partial = encode_frame(Lane.BULK, b"h", bytes(90_000))[0]
    await first[1].write((partial[0], partial[1][:60_000]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await second[1].write((partial[0], partial[1][:60_000]))
    assert await second[1].read() == b""
    assert not first[0].broken
    await channels.close()


async def test_a_directory_in_memory_forgets_expired_values_and_refuses_large_ones(network: MemoryNetwork) -> None:
    a, b = network.directory("a"), network.directory("b")
    assert await a.publish("k", b"one", 60)
    assert await b.publish("k", b"two", 0.01)
    assert await a.read("other") == {}
    await asyncio.sleep(0.02)
    assert await b.read("k") == {A: b"one"}
    with pytest.raises(ValueError, match="out of bounds"):
        await a.publish("k", bytes(RECORD_VALUE_BYTES_MAX + 1), 60)
    with pytest.raises(ValueError, match="out of bounds"):
        await a.publish("k", b"", 121)

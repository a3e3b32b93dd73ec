from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.wire.codec import (
    CHUNK_BYTES_MAX,
    HEADER_BYTES_MAX,
    LANE_BYTES_MAX,
    Chunk,
    FrameDecoder,
    Lane,
    encode_frame,
    frame_bytes,
)

frames = st.lists(
    st.tuples(st.sampled_from(Lane), st.binary(min_size=1, max_size=40), st.binary(max_size=200)), max_size=8
)


def wire(chunks: list[Chunk]) -> bytes:
    return b"".join(bytes(buffer) for chunk in chunks for buffer in chunk)


def decode(decoder: FrameDecoder, data: bytes) -> list[tuple[Lane, bytes, bytes]]:
    return [(frame.lane, frame.header, bytes(frame.body)) for frame in decoder.feed(data)]


@given(frames, st.data(), st.integers(1, 64))
def test_frames_survive_any_interleaving_of_lanes_and_any_chunking(
    sent: list[tuple[Lane, bytes, bytes]], data: st.DataObject, chunk_bytes: int
) -> None:
    lanes: dict[Lane, list[Chunk]] = {lane: [] for lane in Lane}
    for lane, header, body in sent:
        lanes[lane] += encode_frame(lane, header, body, chunk_bytes)
    stream = b""
    while waiting := [lane for lane in Lane if lanes[lane]]:
        stream += wire([lanes[data.draw(st.sampled_from(waiting))].pop(0)])
    decoder, received, position = FrameDecoder(), [], 0
    while position < len(stream):
        step = data.draw(st.integers(1, 300))
        received += decode(decoder, stream[position : position + step])
        position += step
    for lane in Lane:
        assert [f for f in received if f[0] == lane] == [f for f in sent if f[0] == lane]
    assert decoder.buffered_bytes == 0


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=400), max_size=6))
def test_garbage_raises_nothing_but_a_protocol_error_and_keeps_no_more_than_arrived(pieces: list[bytes]) -> None:
    decoder, fed = FrameDecoder(), 0
    for piece in pieces:
        fed += len(piece)
        try:
            decoder.feed(piece)
        except RemoteProtocolError:
            assert decoder.buffered_bytes <= 6
            return
        assert decoder.buffered_bytes <= fed


@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=64))
def test_a_garbled_chunk_header_is_refused_or_harmless(length: int, lane: int, flags: int, rest: bytes) -> None:
    decoder = FrameDecoder()
    valid = 1 <= length <= CHUNK_BYTES_MAX and lane <= 2 and flags <= 1
    try:
        decoder.feed(struct.pack("!IBB", length, lane, flags))
        assert valid
        decoder.feed(rest)
    except RemoteProtocolError:
        return


def test_a_decoder_that_met_garbage_refuses_everything_after() -> None:
    decoder = FrameDecoder()
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"\xff" * 6)
    with pytest.raises(RemoteProtocolError):
        decoder.feed(wire(encode_frame(Lane.TOKEN, b"fine")))


def test_a_cut_frame_waits_for_the_rest() -> None:
    data = wire(encode_frame(Lane.PREFILL, b"head", b"body"))
    decoder = FrameDecoder()
    assert decode(decoder, data[:-1]) == []
    assert decode(decoder, data[-1:]) == [(Lane.PREFILL, b"head", b"body")]


def test_a_token_frame_overtakes_a_bulk_frame_between_two_chunks() -> None:
    bulk = encode_frame(Lane.BULK, b"bulk", bytes(3 * CHUNK_BYTES_MAX))
    token = encode_frame(Lane.TOKEN, b"token")
    received = decode(FrameDecoder(), wire(bulk[:1] + token + bulk[1:]))
    assert [header for _, header, _ in received] == [b"token", b"bulk"]


@pytest.mark.parametrize("lane", Lane)
def test_a_frame_at_its_lanes_limit_passes_and_one_byte_more_does_not(lane: Lane) -> None:
    most = LANE_BYTES_MAX[lane] - 5
    decoder = FrameDecoder()
    received = [f for chunk in encode_frame(lane, b"h", bytes(most)) for buf in chunk for f in decoder.feed(buf)]
    assert [frame.body.nbytes for frame in received] == [most]
    with pytest.raises(ValueError, match="out of bounds"):
        encode_frame(lane, b"h", bytes(most + 1))


def test_a_stranger_cannot_make_a_frame_larger_than_its_lane_allows() -> None:
    decoder = FrameDecoder()
    decoder.feed(struct.pack("!IBBIB", 5, Lane.TOKEN, 0, 1, 7))
    chunk = struct.pack("!IBB", CHUNK_BYTES_MAX, Lane.TOKEN, 0) + bytes(CHUNK_BYTES_MAX)
    for _ in range(LANE_BYTES_MAX[Lane.TOKEN] // CHUNK_BYTES_MAX - 1):
        decoder.feed(chunk)
    with pytest.raises(RemoteProtocolError, match="larger than"):
        decoder.feed(chunk)
    assert decoder.buffered_bytes == 0


@pytest.mark.parametrize("length", [0, HEADER_BYTES_MAX + 1, 2**32 - 1])
def test_a_header_length_out_of_bounds_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="header"):
        FrameDecoder().feed(struct.pack("!IBBI", 4, Lane.BULK, 0, length))


def test_a_frame_that_ends_inside_its_header_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="ended inside"):
        FrameDecoder().feed(struct.pack("!IBBIB", 5, Lane.TOKEN, 1, 2, 7))


def test_a_large_body_is_not_copied_when_encoded() -> None:
    body = bytearray(CHUNK_BYTES_MAX * 2)
    chunks = encode_frame(Lane.BULK, b"h", body)
    assert all(memoryview(chunk[1]).obj is body for chunk in chunks[:2])


@given(st.integers(1, 70), st.integers(0, 3 * CHUNK_BYTES_MAX))
@settings(max_examples=30)
def test_the_announced_size_is_the_size_on_the_stream(header: int, body: int) -> None:
    assert frame_bytes(header, body) == len(wire(encode_frame(Lane.BULK, b"h" * header, bytes(body))))

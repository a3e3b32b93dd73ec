"""Frames on a stream: three lanes of priority, cut into chunks so that a token never waits for a bulk transfer.

```
stream = chunk*            chunk = u32 payload length | u8 lane | u8 flags | payload          (big-endian)
frame  = u32 header length | header (one encoded message) | body (raw bytes)
```
A frame is the concatenated payloads of one lane's chunks up to and including the one flagged LAST. Chunks of
different lanes may interleave freely; within a lane frames keep their order.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from helixnet.core.errors import RemoteProtocolError

MIB = 1 << 20
CHUNK_BYTES_MAX = 256 << 10
"""Payload of one chunk: what a token may have to wait for."""
HEADER_BYTES_MAX = 4 * MIB
"""One encoded message: a plan for a thousand peers, a prompt of 262 144 ids."""
SMALL_CHUNK_BYTES = 16 << 10
"""Chunks up to this size are copied into one buffer: a copy is cheaper than a second write."""

_CHUNK = struct.Struct("!IBB")
_LENGTH = struct.Struct("!I")
_FLAG_LAST = 1

Buffer = bytes | bytearray | memoryview
Chunk = tuple[Buffer, ...]
"""Buffers to be written one after the other with nothing in between."""


class Lane(enum.IntEnum):
    """Who overtakes whom: lower values first."""

    TOKEN = 0
    """Control messages and decode steps."""
    PREFILL = 1
    """Activations of prompt chunks."""
    BULK = 2
    """Weights, files, probes."""


LANE_BYTES_MAX = {Lane.TOKEN: 4 * MIB, Lane.PREFILL: 64 * MIB, Lane.BULK: 64 * MIB}
"""Largest frame of each lane, its length prefix included."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One whole frame. `body` is writable and starts at an aligned address of its own."""

    lane: Lane
    header: bytes
    body: memoryview


def frame_bytes(header_bytes: int, body_bytes: int) -> int:
    """Bytes a frame takes on the stream, when cut into the largest chunks."""
    payload = _LENGTH.size + header_bytes + body_bytes
    return payload + -(-payload // CHUNK_BYTES_MAX) * _CHUNK.size


def encode_frame(lane: Lane, header: bytes, body: Buffer = b"", chunk_bytes: int = CHUNK_BYTES_MAX) -> list[Chunk]:
    """The frame as chunks. Large bodies are not copied: leave them alone until they are sent.

    Raises:
        ValueError: the header is empty, or header or frame is larger than its limit.
    """
    view = memoryview(body).cast("B") if body else memoryview(b"")
    size = _LENGTH.size + len(header) + view.nbytes
    if not 1 <= len(header) <= HEADER_BYTES_MAX or size > LANE_BYTES_MAX[lane]:
        raise ValueError(
            f"a {lane.name} frame of {len(header)} + {view.nbytes} bytes is out of bounds "
            f"(header 1 to {HEADER_BYTES_MAX}, frame up to {LANE_BYTES_MAX[lane]})"
        )
    head = memoryview(_LENGTH.pack(len(header)) + header)
    return list(_cut(lane, head, view, chunk_bytes))


def _cut(lane: Lane, head: memoryview, body: memoryview, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks over the concatenation of `head` and `body`."""
    total = head.nbytes + body.nbytes
    for start in range(0, total, chunk_bytes):
        stop = min(start + chunk_bytes, total)
        prefix = _CHUNK.pack(stop - start, lane, _FLAG_LAST if stop == total else 0)
        from_head = head[start:stop]
        from_body = body[max(0, start - head.nbytes) : max(0, stop - head.nbytes)]
        if stop - start <= SMALL_CHUNK_BYTES:
            yield (b"".join((prefix, from_head, from_body)),)
        else:
            yield (prefix + bytes(from_head), from_body)


class FrameDecoder:
    """Puts frames together again from bytes cut anywhere.

    Memory grows only with what has arrived, up to one frame per lane. After garbage it refuses everything.
    """

    def __init__(self) -> None:
        self._prefix = bytearray()
        self._chunk_left = 0
        self._chunk_last = False
        self._lane = Lane.TOKEN
        self._assemblies = {lane: _Assembly(lane) for lane in Lane}
        self._refused: str | None = None

    def feed(self, data: Buffer) -> list[Frame]:
        """The frames that `data` completes, in the order in which they were completed.

        Raises:
            RemoteProtocolError: the bytes break the protocol, now or earlier.
        """
        if self._refused is not None:
            raise RemoteProtocolError(self._refused)
        try:
            return list(self._frames(memoryview(data)))
        except RemoteProtocolError as error:
            self._refused = str(error)
            self._assemblies.clear()
            raise

    @property
    def buffered_bytes(self) -> int:
        """Bytes of unfinished frames held now."""
        return len(self._prefix) + sum(assembly.size for assembly in self._assemblies.values())

    def _frames(self, view: memoryview) -> Iterator[Frame]:
        while view.nbytes:
            if self._chunk_left == 0:
                missing = _CHUNK.size - len(self._prefix)
                self._prefix += view[:missing]
                view = view[missing:]
                if len(self._prefix) < _CHUNK.size:
                    return
                self._start_chunk()
            part = view[: self._chunk_left]
            view = view[part.nbytes :]
            self._chunk_left -= part.nbytes
            assembly = self._assemblies[self._lane]
            assembly.add(part)
            if self._chunk_left == 0 and self._chunk_last:
                yield assembly.finish()

    def _start_chunk(self) -> None:
        length, lane, flags = _CHUNK.unpack(self._prefix)
        self._prefix.clear()
        if lane not in LANE_BYTES_MAX or flags & ~_FLAG_LAST or not 1 <= length <= CHUNK_BYTES_MAX:
            raise RemoteProtocolError(f"not a chunk: length {length}, lane {lane}, flags {flags:#x}")
        self._lane, self._chunk_left, self._chunk_last = Lane(lane), length, bool(flags & _FLAG_LAST)
        self._assemblies[self._lane].admit(length)


class _Assembly:
    """The unfinished frame of one lane: header and body in buffers of their own."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._start()

    def _start(self) -> None:
        self._head = bytearray()
        self._head_bytes = _LENGTH.size
        self._body = bytearray()

    @property
    def size(self) -> int:
        return len(self._head) + len(self._body)

    def admit(self, length: int) -> None:
        """Refuse a chunk that would make the frame too large, before its bytes are kept."""
        if self.size + length > LANE_BYTES_MAX[self._lane]:
            raise RemoteProtocolError(f"a {self._lane.name} frame is larger than {LANE_BYTES_MAX[self._lane]} bytes")

    def add(self, part: memoryview) -> None:
        part = self._fill_head(part)
        if len(self._head) == _LENGTH.size and self._head_bytes == _LENGTH.size:
            (length,) = _LENGTH.unpack(self._head)
            if not 1 <= length <= HEADER_BYTES_MAX:
                raise RemoteProtocolError(f"a header of {length} bytes is out of bounds (1 to {HEADER_BYTES_MAX})")
            self._head_bytes += length
            part = self._fill_head(part)
        self._body += part

    def _fill_head(self, part: memoryview) -> memoryview:
        """Move what belongs to the head; return the rest."""
        missing = self._head_bytes - len(self._head)
        if missing:
            self._head += part[:missing]
        return part[missing:]

    def finish(self) -> Frame:
        if len(self._head) < self._head_bytes or self._head_bytes == _LENGTH.size:
            raise RemoteProtocolError(f"a {self._lane.name} frame ended inside its header")
        frame = Frame(self._lane, bytes(memoryview(self._head)[_LENGTH.size :]), memoryview(self._body))
        self._start()
        return frame

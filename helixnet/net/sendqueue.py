"""Frames that wait for one peer, by lane."""

from __future__ import annotations

from collections import deque

from helixnet.core.wire.codec import SMALL_CHUNK_BYTES, Buffer, Chunk, Lane

QUEUE_FRAMES_MAX = 4_096
QUEUE_BYTES_MAX = 128 << 20


class SendQueue:
    """A bounded queue that always gives the most urgent lane's next chunk."""

    def __init__(self, frames_max: int = QUEUE_FRAMES_MAX, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self._lanes: dict[Lane, deque[tuple[Chunk, bool]]] = {lane: deque() for lane in Lane}
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self.frames = 0
        self.bytes = 0

    def push(self, lane: Lane, chunks: list[Chunk], size: int) -> bool:
        """Whether the frame was taken in; False if the queue is full."""
        if self.frames >= self._frames_max or self.bytes + size > self._bytes_max:
            return False
        self.frames += 1
        self.bytes += size
        self._lanes[lane].extend((chunk, False) for chunk in chunks[:-1])
        self._lanes[lane].append((chunks[-1], True))
        return True

    def take(self) -> Chunk:
        """The next buffers to write; small chunks are gathered into one. Empty if nothing waits."""
        small: list[Buffer] = []
        gathered = 0
        while gathered < SMALL_CHUNK_BYTES and (lane := self._most_urgent()) is not None:
            chunk, _ = lane[0]
            size = sum(memoryview(buffer).nbytes for buffer in chunk)
            if gathered and gathered + size > SMALL_CHUNK_BYTES:
                break
            self._drop_first(lane, size)
            if not gathered and size > SMALL_CHUNK_BYTES:
                return chunk
            small.extend(chunk)
            gathered += size
        return (b"".join(small),) if small else ()

    def clear(self) -> None:
        """Drop everything."""
        for lane in self._lanes.values():
            lane.clear()
        self.frames = self.bytes = 0

    def _most_urgent(self) -> deque[tuple[Chunk, bool]] | None:
        return next((lane for lane in self._lanes.values() if lane), None)

    def _drop_first(self, lane: deque[tuple[Chunk, bool]], size: int) -> None:
        _, last = lane.popleft()
        self.frames -= last
        self.bytes -= size

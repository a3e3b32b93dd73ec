"""What carries our frames: a duplex stream of bytes. Here: its interface, and one that lives in memory."""

from __future__ import annotations

import asyncio
from typing import Protocol

from helixnet.core.wire.codec import CHUNK_BYTES_MAX, Chunk

READ_BYTES = CHUNK_BYTES_MAX
PIPE_BYTES_MAX = 4 * CHUNK_BYTES_MAX
"""What a memory pipe holds before its writer has to wait."""


class ByteStream(Protocol):
    """A duplex stream. Every failure is an OSError (asyncio's connection errors are)."""

    async def read(self) -> bytes:
        """Some bytes, at least one; none at the end."""

    async def write(self, chunk: Chunk) -> None:
        """Write the buffers and return when there is room for more."""

    def finish(self) -> None:
        """Say that nothing more will be written; what was written still arrives."""

    def abort(self) -> None:
        """Close both directions at once; may be called again."""


class AsyncioStream:
    """A stream over asyncio's reader and writer (a socket)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        return await self._reader.read(READ_BYTES)

    async def write(self, chunk: Chunk) -> None:
        for buffer in chunk:
            self._writer.write(buffer)
        await self._writer.drain()

    def finish(self) -> None:
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        self._writer.transport.abort()


class MemoryStream:
    """One end of a pair of pipes within one event loop."""

    def __init__(self) -> None:
        self._incoming = bytearray()
        self._ended = False
        self._broken = False
        self._changed = asyncio.Event()
        self.other: MemoryStream

    @property
    def broken(self) -> bool:
        """Whether either end aborted."""
        return self._broken

    async def read(self) -> bytes:
        while not self._incoming:
            if self._broken or self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data, self._incoming = bytes(self._incoming), bytearray()
        self.other._changed.set()
        return data

    async def write(self, chunk: Chunk) -> None:
        while len(self.other._incoming) >= PIPE_BYTES_MAX and not self._broken:
            self._changed.clear()
            await self._changed.wait()
        if self._broken:
            raise ConnectionResetError("the other end is closed")
        for buffer in chunk:
            self.other._incoming += buffer
        self.other._changed.set()

    def finish(self) -> None:
        self.other._ended = True
        self.other._changed.set()

    def abort(self) -> None:
        for end in (self, self.other):
            end._broken = True
            end._changed.set()


def memory_pipe() -> tuple[MemoryStream, MemoryStream]:
    """Two ends; what is written to one is read from the other."""
    left, right = MemoryStream(), MemoryStream()
    left.other, right.other = right, left
    return left, right

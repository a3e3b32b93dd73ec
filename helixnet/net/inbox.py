"""Where everything that arrives waits for its one reader."""

from __future__ import annotations

import asyncio
from collections import deque

from helixnet.core.errors import PeerGone
from helixnet.core.types import PeerId
from helixnet.net.base import Gone, Received

INBOX_FRAMES_MAX = 2_048
INBOX_BYTES_MAX = 128 << 20


class Inbox:
    """A bounded queue: whoever reads a stream waits here while it is full, and so the stream is not read on.

    A `Gone` never waits and is never lost; two in a row about one peer are one.
    """

    def __init__(self, frames_max: int = INBOX_FRAMES_MAX, bytes_max: int = INBOX_BYTES_MAX) -> None:
        self._items: deque[tuple[Received | Gone, int]] = deque()
        self._bytes = 0
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._unread_gone: set[PeerId] = set()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False

    async def put(self, received: Received, size: int) -> None:
        """Append as soon as there is room; `size` counts against the bytes. Dropped once the inbox is closed."""
        while self._items and not self._closed and not self._has_room(size):
            self._taken.clear()
            await self._taken.wait()
        if not self._closed:
            self._unread_gone.discard(received.sender)
            self._append(received, size)

    def put_gone(self, gone: Gone) -> None:
        """Append at once."""
        if not self._closed and gone.peer not in self._unread_gone:
            self._unread_gone.add(gone.peer)
            self._append(gone, 0)

    async def get(self) -> Received | Gone:
        """The oldest item.

        Raises:
            PeerGone: the inbox is closed.
        """
        while not self._items:
            if self._closed:
                raise PeerGone("this host is closed; nothing more will arrive")
            self._arrived.clear()
            await self._arrived.wait()
        item, size = self._items.popleft()
        self._bytes -= size
        self._taken.set()
        if isinstance(item, Gone):
            self._unread_gone.discard(item.peer)
        return item

    def close(self) -> None:
        """Let every waiter go; what was not read is dropped."""
        self._closed = True
        self._items.clear()
        self._arrived.set()
        self._taken.set()

    def _has_room(self, size: int) -> bool:
        return len(self._items) < self._frames_max and self._bytes + size <= self._bytes_max

    def _append(self, item: Received | Gone, size: int) -> None:
        self._items.append((item, size))
        self._bytes += size
        self._arrived.set()

"""KV room as pages: counted before it is used, never over-committed, never leaked."""

from __future__ import annotations

import math

from helixnet.core.errors import Busy
from helixnet.core.types import SessionId, Span

PAGE_TOKENS = 16
"""Tokens of one layer in a page; small enough that a short chat wastes little."""


def pages_for(layers: Span, tokens: int) -> int:
    """How many a session of so many tokens takes in these layers."""
    return len(layers) * math.ceil(tokens / PAGE_TOKENS)


class PagePool:
    """Pages of one peer; a page is PAGE_TOKENS tokens in one layer.

    The capacity changes when weights are loaded or dropped; what is reserved stays reserved.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.capacity = 0
        self._reserved: dict[SessionId, int] = {}
        self.used = 0

    def resize(self, kv_bytes: int) -> None:
        """Set the room for KV, in bytes; a negative number counts as none."""
        self.capacity = max(0, kv_bytes) // self.page_bytes

    def reserve(self, session: SessionId, layers: Span, tokens_max: int) -> None:
        """Take pages for `tokens_max` tokens in each of `layers`.

        Raises:
            Busy: not enough free pages, or the session already has some.
        """
        pages = pages_for(layers, tokens_max)
        if session in self._reserved:
            raise Busy(f"session {session} is already open here")
        if self.used + pages > self.capacity:
            raise Busy(f"{pages} KV pages were asked for, {max(0, self.capacity - self.used)} are free")
        self._reserved[session] = pages
        self.used += pages

    def release(self, session: SessionId) -> None:
        """Give the session's pages back; unknown sessions are ignored."""
        self.used -= self._reserved.pop(session, 0)

    @property
    def free_share(self) -> float:
        """Share of the pages that is free, 0 to 1."""
        return 0.0 if self.capacity <= 0 else max(0.0, 1.0 - self.used / self.capacity)

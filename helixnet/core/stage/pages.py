"""KV room as pages: counted before it is used, never over-committed, never leaked. It grows with its session."""

from __future__ import annotations

import math
from dataclasses import dataclass

from helixnet.core.errors import Busy
from helixnet.core.types import SessionId, Span

PAGE_TOKENS = 16
"""Tokens of one layer in a page; small enough that a short chat wastes little."""


def pages_for(layers: Span, tokens: int) -> int:
    """How many a session of so many tokens takes in these layers."""
    return len(layers) * math.ceil(tokens / PAGE_TOKENS)


@dataclass(slots=True)
class _Held:
    layers: Span
    tokens: int
    """There is room for so many in each of the layers."""
    pages: int


class PageLedger:
    """Pages of one peer; a page is PAGE_TOKENS tokens in one layer.

    The capacity changes when weights are loaded or dropped; what is held stays held.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.capacity = 0
        self.used = 0
        self._held: dict[SessionId, _Held] = {}

    def resize(self, kv_bytes: int) -> None:
        """Set the room for KV, in bytes; a negative number counts as none."""
        self.capacity = max(0, kv_bytes) // self.page_bytes

    def reserve(self, session: SessionId, layers: Span, tokens: int, share_max: float = 1.0) -> None:
        """Take pages for `tokens` tokens in each of `layers`.

        Whoever is not alone leaves some free for others to grow: no more than `share_max` of all pages are used then.

        Raises:
            Busy: not enough free pages, or the session already has some.
        """
        pages = pages_for(layers, tokens)
        if session in self._held:
            raise Busy(f"session {session} is already open here")
        most = int(self.capacity * share_max) if self._held else self.capacity
        if self.used + pages > most:
            raise Busy(f"{pages} KV pages were asked for, {max(0, most - self.used)} are free")
        self._held[session] = _Held(layers, tokens, pages)
        self.used += pages

    def tokens(self, session: SessionId) -> int:
        """For how many tokens the session has room; 0 if it is unknown."""
        held = self._held.get(session)
        return held.tokens if held is not None else 0

    def extend(self, session: SessionId, tokens: int) -> bool:
        """Make the session's room one for `tokens` tokens. False, and nothing has changed, if there is too little."""
        held = self._held[session]
        pages = pages_for(held.layers, tokens)
        if self.used + pages - held.pages > self.capacity:
            return False
        self.used += pages - held.pages
        held.tokens, held.pages = tokens, pages
        return True

    def release(self, session: SessionId) -> None:
        """Give the session's pages back; unknown sessions are ignored."""
        held = self._held.pop(session, None)
        if held is not None:
            self.used -= held.pages

    @property
    def free_share(self) -> float:
        """Share of the pages that is free, 0 to 1."""
        return 0.0 if self.capacity <= 0 else max(0.0, 1.0 - self.used / self.capacity)

"""Which pages of KV memory are whose: reserved per session, never over-committed, some of them shared.

Sealed blocks outlive their session, and other sessions begin with the very same pages: nobody writes to them again. Who
uses which is counted by the stage's ledger, which says when one may go. The memory itself is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from helixnet.core.errors import Busy, UsageError
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.pages import Paging
from helixnet.core.types import BlockId, SessionId, Span

SESSIONS_MAX = 4096


@dataclass(slots=True)
class SessionKv:
    """One session's pages: `pages[row, i]` holds tokens `[i * page tokens, ...)`; a row is a layer, or all of them."""

    layers: Span
    tokens: int
    """There is room for so many."""
    pages: np.ndarray
    shared: np.ndarray
    """[pages per row] Which of them belong to blocks."""
    filled: dict[int, int] = field(default_factory=dict)
    """Tokens stored so far, per layer."""
    drafted: int = 0
    """So many of them are drafts: what comes next may take their places."""
    reached: int = 0
    """Tokens that were ever stored."""
    consecutive: bool = field(init=False)
    """Whether each row's pages follow one another, so that its KV is a view and needs no gathering."""

    def __post_init__(self) -> None:
        self.place(self.pages)

    def place(self, pages: np.ndarray) -> None:
        """Its pages are these now."""
        self.pages = pages
        self.consecutive = bool((np.diff(pages, axis=1) == 1).all())

    @property
    def own(self) -> np.ndarray:
        """Pages that no block has, [rows, pages]."""
        return self.pages[:, ~self.shared]

    def written(self, page_tokens: int) -> np.ndarray:
        """Those of them that were written to."""
        used = -(-max([self.reached, *self.filled.values()]) // page_tokens)
        return self.pages[:, :used][:, ~self.shared[:used]]


class PageTable:
    """Pages by number. What is to happen to the memory itself (`_wipe`, `_move`) is for those who have it."""

    def __init__(self, paging: Paging) -> None:
        self.paging = paging
        self.sessions: dict[SessionId, SessionKv] = {}
        self.blocks: dict[BlockId, np.ndarray] = {}
        """Pages of each sealed block, [rows, pages]."""
        self._block_layers: dict[BlockId, Span] = {}
        self._free = np.zeros(0, dtype=bool)

    @property
    def pages_free(self) -> int:
        return int(self._free.sum())

    @property
    def pages_reserved(self) -> int:
        return int(self._free.size) - self.pages_free

    def reserve(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId] = ()) -> None:
        """Reserve room for `tokens` tokens in each of `layers`, the first of which are in the blocks `begun`.

        Raises Busy, or UsageError for blocks that are not here; then nothing has changed.
        """
        if any(self._block_layers.get(one) != layers for one in begun):
            raise UsageError(f"session {session} is to begin with blocks of {layers} that are not here")
        rows, taken = self.paging.rows(layers), self.paging.block_pages * len(begun)
        per_row = max(0, self._pages(tokens) - taken)
        if session in self.sessions:
            raise Busy(f"session {session} is already open here")
        if per_row * rows > self.pages_free or len(self.sessions) >= SESSIONS_MAX:
            raise Busy(
                f"no KV room for {tokens} tokens in {len(layers)} layers: {per_row * rows} pages needed, "
                f"{self.pages_free} free; try again later or on another peer"
            )
        pages = np.concatenate([*(self.blocks[one] for one in begun), self._take(rows, per_row)], axis=1)
        shared = np.arange(pages.shape[1]) < taken
        filled = dict.fromkeys(layers.layers(), BLOCK_TOKENS * len(begun))
        self.sessions[session] = SessionKv(layers, tokens, pages, shared, filled)

    def extend(self, session: SessionId, tokens: int) -> None:
        """Make the session's room one for `tokens` tokens; what is there stays. Raises Busy, changing nothing."""
        held = self.sessions[session]
        more = self._pages(tokens) - held.pages.shape[1]
        if more > 0:
            needed = more * len(held.pages)
            if needed > self.pages_free:
                raise Busy(f"{needed} more KV pages are needed, {self.pages_free} are free")
            self._grow(held, more)
        held.tokens = max(held.tokens, tokens)

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        """Give names to whole blocks of a session, by their places; they stay when it is released.

        Raises UsageError, for a session or tokens that are not here; then nothing has changed.
        """
        held = self.sessions.get(session)
        whole = min(held.filled.values()) // BLOCK_TOKENS if held is not None else 0
        if held is None or any(not 0 <= place < whole for place, _ in blocks):
            raise UsageError(f"session {session} has {whole} whole blocks here, and others were to be shared")
        size = self.paging.block_pages
        for place, block in blocks:
            columns = slice(place * size, (place + 1) * size)
            if block not in self.blocks and not held.shared[columns].any():
                self.blocks[block] = held.pages[:, columns].copy()
                self._block_layers[block] = held.layers
                held.shared[columns] = True

    def evict(self, blocks: Sequence[BlockId]) -> None:
        """Free blocks that no session uses; unknown ones are ignored."""
        for block in blocks:
            pages = self.blocks.pop(block, None)
            if pages is not None:
                del self._block_layers[block]
                self._wipe(pages)
                self._free[pages.reshape(-1)] = True

    def release(self, session: SessionId) -> None:
        """Give the session's pages back, but not those of blocks; unknown sessions are ignored."""
        held = self.sessions.pop(session, None)
        if held is not None:
            self._wipe(held.written(self.paging.tokens))
            self._free[held.own.reshape(-1)] = True

    def resize(self, pages: int, anew: bool = False) -> None:
        """Change how many pages there are; sessions and blocks keep their KV. Raises Busy if they would not fit.

        With `anew`, layers have come or gone: pages are made even if there are to be as many as before.
        """
        if pages == self._free.size and not anew:
            return
        if pages < self.pages_reserved:
            raise Busy(
                f"sessions in flight hold {self.pages_reserved} KV pages and only {pages} would be left; "
                "release sessions first or give the peer more memory"
            )
        # Pages in use move to the front, in order: what followed one another still does.
        before = np.flatnonzero(~self._free)
        moved = np.cumsum(~self._free) - 1
        self._move(before, pages)
        self._free = np.arange(pages) >= before.size
        for held in self.sessions.values():
            held.place(moved[held.pages])
        self.blocks = {block: moved[pages] for block, pages in self.blocks.items()}

    def _pages(self, tokens: int) -> int:
        """In each row, for so many tokens."""
        return -(-tokens // self.paging.tokens)

    def _grow(self, held: SessionKv, more: int) -> None:
        """So many more pages for each row, wherever they are."""
        held.shared = np.append(held.shared, np.zeros(more, dtype=bool))
        held.place(np.concatenate([held.pages, self._take(len(held.pages), more)], axis=1))

    def _take(self, rows: int, per_row: int) -> np.ndarray:
        """Pages `[rows, per_row]`: the first that are free."""
        pages = np.flatnonzero(self._free)[: rows * per_row].astype(np.int64)
        self._free[pages] = False
        return pages.reshape(rows, per_row)

    def _wipe(self, pages: np.ndarray) -> None:
        """What was written to these pages is no longer needed."""

    def _move(self, before: np.ndarray, pages: int) -> None:
        """There are to be so many pages; those numbered `before` are the first of them now, in this order."""

"""KV room as pages: counted before it is used, never over-committed, never leaked. It grows with its session.

What a prompt began with may stay when its session ends: blocks of tokens that the next prompt that begins alike need
not run again. Sessions share them; blocks that nobody uses go when their pages are needed, those first that were used
longest ago.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from helixnet.core.errors import Busy
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.types import BlockId, SessionId, Span

PAGE_TOKENS = 16
"""Tokens of one layer in a page, as our own engine has it; small enough that a short chat wastes little."""


class Paging(msgspec.Struct, frozen=True):
    """How an engine divides its KV memory.

    Raises:
        ValueError: a block is not a whole number of pages.
    """

    tokens: int = PAGE_TOKENS
    """In a page."""
    by_layer: bool = True
    """A page is of one layer. Otherwise of all that are held: a session that runs a few takes as much as one of all."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or BLOCK_TOKENS % self.tokens:
            raise ValueError(f"a page has a part of {BLOCK_TOKENS} tokens, not {self.tokens}")

    @property
    def block_pages(self) -> int:
        """Pages of one layer (or of all held) in a block."""
        return BLOCK_TOKENS // self.tokens

    def rows(self, layers: Span) -> int:
        """How many pages a session has for each `tokens` of its tokens, if it runs these layers."""
        return len(layers) if self.by_layer else 1

    def pages(self, layers: Span, tokens: int) -> int:
        """How many a session of so many tokens takes in these layers."""
        return self.rows(layers) * math.ceil(tokens / self.tokens)


BY_LAYER = Paging()
"""How our own engine does it."""


@dataclass(slots=True)
class _Held:
    layers: Span
    tokens: int
    """There is room for so many in each of the layers."""
    own: int
    """Pages that nobody shares."""
    blocks: dict[int, BlockId] = field(default_factory=dict)
    """Shared ones, by their place in the session."""


@dataclass(slots=True)
class _Block:
    layers: Span
    pages: int
    users: int


class PageLedger:
    """Pages of one peer, of whose tokens each takes `token_bytes` in one layer.

    The capacity changes when weights are loaded or dropped; what sessions hold stays theirs.
    """

    def __init__(self, token_bytes: int, paging: Paging = BY_LAYER) -> None:
        self.paging = paging
        self._token_bytes = token_bytes
        self.capacity = 0
        self.used = 0
        """By sessions; what several of them share counts once."""
        self.cached = 0
        """In blocks that no session uses."""
        self._held: dict[SessionId, _Held] = {}
        self._blocks: dict[BlockId, _Block] = {}
        self._unused: dict[BlockId, _Block] = {}
        """Who goes first comes first."""
        self._evicted: list[BlockId] = []

    def resize(self, kv_bytes: int, held: int) -> None:
        """Set the room for KV, in bytes (a negative number counts as none), and how many layers are held."""
        self.capacity = max(0, kv_bytes) // self.page_bytes(held)
        self._evict()

    def page_bytes(self, held: int) -> int:
        """What a page takes if so many layers are held."""
        return self.paging.tokens * self._token_bytes * (1 if self.paging.by_layer else max(1, held))

    def reserve(
        self, session: SessionId, layers: Span, tokens: int, share_max: float = 1.0, begun: Sequence[BlockId] = ()
    ) -> None:
        """Take pages for `tokens` tokens in each of `layers`, of which the blocks `begun` are there already.

        Whoever is not alone leaves some free for others to grow: no more than `share_max` of all pages are used then.

        Raises:
            Busy: not enough free pages, or the session already has some.
        """
        if session in self._held:
            raise Busy(f"session {session} is already open here")
        own = self.paging.pages(layers, tokens) - len(begun) * self._block_pages(layers)
        pages = own + sum(block.pages for one in begun if not (block := self._blocks[one]).users)
        most = int(self.capacity * share_max) if self._held else self.capacity
        if self.used + pages > most:
            raise Busy(f"{pages} KV pages were asked for, {max(0, most - self.used)} are free")
        for one in begun:
            self._use(one)
        self._held[session] = _Held(layers, tokens, own, dict(enumerate(begun)))
        self.used += own
        self._evict()

    def tokens_max(self, layers: Span) -> int:
        """For how many tokens there is room in these layers, if nobody else is here."""
        return self.paging.tokens * (self.capacity // self.paging.rows(layers))

    def tokens(self, session: SessionId) -> int:
        """For how many tokens the session has room; 0 if it is unknown."""
        held = self._held.get(session)
        return held.tokens if held is not None else 0

    def extend(self, session: SessionId, tokens: int) -> bool:
        """Make the session's room one for `tokens` tokens. False, and nothing has changed, if there is too little."""
        held = self._held[session]
        more = self.paging.pages(held.layers, tokens) - self.paging.pages(held.layers, held.tokens)
        if self.used + more > self.capacity:
            return False
        self.used += more
        held.tokens, held.own = tokens, held.own + more
        self._evict()
        return True

    def release(self, session: SessionId) -> None:
        """Give the session's pages back; its blocks stay for others to use. Unknown sessions are ignored."""
        held = self._held.pop(session, None)
        if held is None:
            return
        self.used -= held.own
        self._leave(held, 0)
        self._evict()

    # --- blocks ------------------------------------------------------------------------------------

    def begun(self, blocks: Sequence[BlockId]) -> int:
        """How many of a session's first blocks are there."""
        return next((n for n, one in enumerate(blocks) if one not in self._blocks), len(blocks))

    def cut(self, session: SessionId, count: int) -> None:
        """Of the blocks it was given when it came, the session uses only so many: it has less room now."""
        held = self._held[session]
        given = len(held.blocks)
        if count < given:
            self._leave(held, count)
            held.tokens -= BLOCK_TOKENS * (given - count)
            self._evict()

    def seal(self, session: SessionId, place: int, block: BlockId) -> bool:
        """The session's pages at `place` hold this whole block: others may use it. False if it is there already."""
        if block in self._blocks:
            return False
        held = self._held[session]
        held.blocks[place] = block
        self._blocks[block] = _Block(held.layers, self._block_pages(held.layers), users=1)
        held.own -= self._blocks[block].pages
        return True

    def forget(self, keep: Span | None = None) -> None:
        """Blocks that nobody uses go, unless all their layers are in `keep`."""
        gone = [one for one, block in self._unused.items() if keep is None or not keep.holds(block.layers)]
        for one in gone:
            self._drop(one)

    def take_evicted(self) -> tuple[BlockId, ...]:
        """Blocks that have gone since this was last asked."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    @property
    def blocks(self) -> int:
        """How many there are, in use or not."""
        return len(self._blocks)

    @property
    def free_share(self) -> float:
        """Share of the pages that no session uses, 0 to 1."""
        return 0.0 if self.capacity <= 0 else max(0.0, 1.0 - self.used / self.capacity)

    def _block_pages(self, layers: Span) -> int:
        return self.paging.block_pages * self.paging.rows(layers)

    def _use(self, one: BlockId) -> None:
        block = self._blocks[one]
        if not block.users:
            del self._unused[one]
            self.cached -= block.pages
            self.used += block.pages
        block.users += 1

    def _leave(self, held: _Held, first: int) -> None:
        """The session no longer uses its blocks from the place `first` on; of these, the last are the first to go."""
        for place in sorted((place for place in held.blocks if place >= first), reverse=True):
            one = held.blocks.pop(place)
            block = self._blocks[one]
            block.users -= 1
            if not block.users:
                self._unused[one] = block
                self.used -= block.pages
                self.cached += block.pages

    def _evict(self) -> None:
        """As many unused blocks go as sessions need the pages of."""
        while self._unused and self.used + self.cached > self.capacity:
            self._drop(next(iter(self._unused)))

    def _drop(self, one: BlockId) -> None:
        self.cached -= self._unused.pop(one).pages
        del self._blocks[one]
        self._evicted.append(one)

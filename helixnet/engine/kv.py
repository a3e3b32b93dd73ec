"""KV memory: pages of `PAGE_TOKENS` tokens in one pool, reserved per session and layer, never over-committed.

Sealed blocks outlive their session, and other sessions begin with the very same pages: nobody writes to them again. Who
uses which is counted by the stage's ledger, which says when one may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from helixnet.core.errors import Busy, UsageError
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.pages import BLOCK_PAGES, PAGE_TOKENS
from helixnet.core.types import BlockId, SessionId, Span

SESSIONS_MAX = 4096


@dataclass(slots=True)
class SessionKv:
    """The pages of one session: `pages[layer - layers.start, i]` holds tokens `[i * PAGE_TOKENS, ...)`."""

    layers: Span
    tokens: int
    """There is room for so many."""
    pages: np.ndarray
    shared: np.ndarray
    """[pages per layer] Which of them belong to blocks."""
    filled: dict[int, int] = field(default_factory=dict)
    """Tokens stored so far, per layer."""
    consecutive: bool = field(init=False)
    """Whether each layer's pages follow one another, so that its KV is a view and needs no gathering."""

    def __post_init__(self) -> None:
        self.place(self.pages)

    def place(self, pages: np.ndarray) -> None:
        """Its pages are these now."""
        self.pages = pages
        self.consecutive = bool((np.diff(pages, axis=1) == 1).all())

    @property
    def own(self) -> np.ndarray:
        """Pages that no block has, [layers, pages]."""
        return self.pages[:, ~self.shared]

    @property
    def written(self) -> np.ndarray:
        """Those of them that were written to."""
        used = -(-max(self.filled.values(), default=0) // PAGE_TOKENS)
        return self.pages[:, :used][:, ~self.shared[:used]]


class KvPool:
    """K and V of every layer and session, each `[pages, PAGE_TOKENS, kv_heads, head_dim]`.

    Memory is touched only where tokens are written (the kernel hands out zero pages), so a generous
    budget costs nothing until it is used. Fresh memory is zero: masked positions must be finite.
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._tail = (PAGE_TOKENS, kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._free = np.zeros(0, dtype=bool)
        self.sessions: dict[SessionId, SessionKv] = {}
        self.blocks: dict[BlockId, np.ndarray] = {}
        """Pages of each sealed block, [layers, BLOCK_PAGES]."""
        self._allocate(0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V."""
        return 2 * int(np.prod(self._tail)) * self._dtype.itemsize

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
        if any(one not in self.blocks or len(self.blocks[one]) != len(layers) for one in begun):
            raise UsageError(f"session {session} is to begin with blocks of {layers} that are not here")
        per_layer = max(0, -(-tokens // PAGE_TOKENS) - BLOCK_PAGES * len(begun))
        needed = per_layer * len(layers)
        if session in self.sessions:
            raise Busy(f"session {session} is already open here")
        if needed > self.pages_free or len(self.sessions) >= SESSIONS_MAX:
            raise Busy(
                f"no KV room for {tokens} tokens in {len(layers)} layers: {needed} pages needed, "
                f"{self.pages_free} free; try again later or on another peer"
            )
        pages = np.concatenate([*(self.blocks[one] for one in begun), self._take(len(layers), per_layer)], axis=1)
        shared = np.arange(pages.shape[1]) < BLOCK_PAGES * len(begun)
        filled = dict.fromkeys(layers.layers(), BLOCK_TOKENS * len(begun))
        self.sessions[session] = SessionKv(layers, tokens, pages, shared, filled)

    def extend(self, session: SessionId, tokens: int) -> None:
        """Make the session's room one for `tokens` tokens; what is there stays. Raises Busy, changing nothing."""
        held = self.sessions[session]
        more = -(-tokens // PAGE_TOKENS) - held.pages.shape[1]
        if more > 0:
            needed = more * len(held.layers)
            if needed > self.pages_free:
                raise Busy(f"{needed} more KV pages are needed, {self.pages_free} are free")
            self._grow(held, more)
        held.tokens = max(held.tokens, tokens)

    def _grow(self, held: SessionKv, more: int) -> None:
        """So many more pages for each layer: where they all follow one another if they can, or anywhere."""
        layers, pages = held.pages.shape
        start = self._run(layers * (pages + more)) if not held.shared.any() else None
        if start is None:
            held.shared = np.append(held.shared, np.zeros(more, dtype=bool))
            held.place(np.concatenate([held.pages, self._take(layers, more)], axis=1))
            return
        before, written = held.pages, held.written
        held.shared = np.zeros(pages + more, dtype=bool)
        held.place(self._take(layers, pages + more))
        self._copy(written, held.pages[:, : written.shape[1]])
        self._wipe(written)
        self._free[before.reshape(-1)] = True

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        """Give names to whole blocks of a session, by their places; they stay when it is released.

        Raises UsageError, for a session or tokens that are not here; then nothing has changed.
        """
        held = self.sessions.get(session)
        whole = min(held.filled.values()) // BLOCK_TOKENS if held is not None else 0
        if held is None or any(not 0 <= place < whole for place, _ in blocks):
            raise UsageError(f"session {session} has {whole} whole blocks here, and others were to be shared")
        for place, block in blocks:
            columns = slice(place * BLOCK_PAGES, (place + 1) * BLOCK_PAGES)
            if block not in self.blocks and not held.shared[columns].any():
                self.blocks[block] = held.pages[:, columns].copy()
                held.shared[columns] = True

    def evict(self, blocks: Sequence[BlockId]) -> None:
        """Free blocks that no session uses; unknown ones are ignored."""
        for block in blocks:
            pages = self.blocks.pop(block, None)
            if pages is not None:
                self._wipe(pages)
                self._free[pages.reshape(-1)] = True

    def fill(self, session: SessionId, tokens: int) -> None:
        """Store `tokens` made-up tokens in every layer of the session: what a benchmark needs is their number."""
        held = self.sessions[session]
        where = torch.from_numpy(held.pages[:, : -(-tokens // PAGE_TOKENS)].reshape(-1)).to(self._device)
        self.k.index_fill_(0, where, 1)
        self.v.index_fill_(0, where, 1)
        held.filled = dict.fromkeys(held.layers.layers(), tokens)

    def release(self, session: SessionId) -> None:
        """Give the session's pages back, but not those of blocks; unknown sessions are ignored."""
        held = self.sessions.pop(session, None)
        if held is not None:
            self._wipe(held.written)
            self._free[held.own.reshape(-1)] = True

    def resize(self, pages: int) -> None:
        """Change the pool's size; sessions and blocks keep their KV. Raises Busy if they would not fit."""
        if pages == self._free.size:
            return
        if pages < self.pages_reserved:
            raise Busy(
                f"sessions in flight hold {self.pages_reserved} KV pages and only {pages} would be left; "
                "release sessions first or give the peer more memory"
            )
        old_k, old_v = self.k, self.v
        # Pages in use move to the front, in order: what followed one another still does.
        before = np.flatnonzero(~self._free)
        moved = np.cumsum(~self._free) - 1
        self._allocate(pages)
        self._free[: before.size] = False
        where = torch.from_numpy(before).to(self._device)
        self.k[: before.size] = old_k.index_select(0, where)
        self.v[: before.size] = old_v.index_select(0, where)
        for held in self.sessions.values():
            held.place(moved[held.pages])
        self.blocks = {block: moved[pages] for block, pages in self.blocks.items()}

    def _copy(self, pages: np.ndarray, to: np.ndarray) -> None:
        """The contents of pages [layers, pages] to others."""
        where = torch.from_numpy(pages.reshape(-1)).to(self._device)
        target = torch.from_numpy(np.ascontiguousarray(to).reshape(-1)).to(self._device)
        self.k.index_copy_(0, target, self.k.index_select(0, where))
        self.v.index_copy_(0, target, self.v.index_select(0, where))

    def _wipe(self, pages: np.ndarray) -> None:
        """What was written goes: a NaN left in a page would reach its next owner through masked positions."""
        if pages.size:
            where = torch.from_numpy(np.ascontiguousarray(pages).reshape(-1)).to(self._device)
            self.k.index_fill_(0, where, 0)
            self.v.index_fill_(0, where, 0)

    def _allocate(self, pages: int) -> None:
        self.k, self.v = self._zeros(pages), self._zeros(pages)
        # The same memory token by token: slot = page * PAGE_TOKENS + offset.
        self.k_slots = self.k.view(-1, *self._tail[1:])
        self.v_slots = self.v.view(-1, *self._tail[1:])
        self._free = np.ones(pages, dtype=bool)

    def _zeros(self, pages: int) -> torch.Tensor:
        shape = (pages, *self._tail)
        if self._device.type != "cpu" or pages == 0:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # numpy asks the kernel for zero pages, which take memory when first written; torch would write them all now.
        raw = np.zeros(int(np.prod(shape)) * self._dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(self._dtype).view(shape)

    def _take(self, layers: int, per_layer: int) -> np.ndarray:
        """Pages `[layers, per_layer]`: one run for all of them, or else the first that are free."""
        count = layers * per_layer
        start = self._run(count)
        free = np.flatnonzero(self._free)[:count] if start is None else np.arange(start, start + count)
        pages: np.ndarray = free.astype(np.int64)
        self._free[pages] = False
        return pages.reshape(layers, per_layer)

    def _run(self, length: int) -> int | None:
        """Where the first run of `length` free pages begins."""
        edges = np.flatnonzero(np.diff(self._free.astype(np.int8), prepend=0, append=0))
        starts, stops = edges[0::2], edges[1::2]
        fits = np.flatnonzero(stops - starts >= length)
        return int(starts[fits[0]]) if fits.size else None

"""KV memory: pages of `PAGE_TOKENS` tokens in one pool, reserved per session and layer, never over-committed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from helixnet.core.errors import Busy
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.core.types import SessionId, Span

SESSIONS_MAX = 4096


@dataclass(slots=True)
class SessionKv:
    """The pages of one session: `pages[layer - layers.start, i]` holds tokens `[i * PAGE_TOKENS, ...)`."""

    layers: Span
    tokens: int
    """There is room for so many."""
    pages: np.ndarray
    consecutive: bool
    """Whether each layer's pages follow one another, so that its KV is a view and needs no gathering."""
    filled: dict[int, int] = field(default_factory=dict)
    """Tokens stored so far, per layer."""


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

    def reserve(self, session: SessionId, layers: Span, tokens: int) -> None:
        """Reserve room for `tokens` tokens in each of `layers`. Raises Busy; then nothing has changed."""
        per_layer = -(-tokens // PAGE_TOKENS)
        needed = per_layer * len(layers)
        if session in self.sessions:
            raise Busy(f"session {session} is already open here")
        if needed > self.pages_free or len(self.sessions) >= SESSIONS_MAX:
            raise Busy(
                f"no KV room for {tokens} tokens in {len(layers)} layers: {needed} pages needed, "
                f"{self.pages_free} free; try again later or on another peer"
            )
        pages, consecutive = self._take(len(layers), per_layer)
        self.sessions[session] = SessionKv(layers, tokens, pages, consecutive, dict.fromkeys(layers.layers(), 0))

    def extend(self, session: SessionId, tokens: int) -> None:
        """Make the session's room one for `tokens` tokens; what is there stays. Raises Busy, changing nothing."""
        held = self.sessions[session]
        more = -(-tokens // PAGE_TOKENS) - held.pages.shape[1]
        if more > 0:
            needed = more * len(held.layers)
            if needed > self.pages_free:
                raise Busy(f"{needed} more KV pages are needed, {self.pages_free} are free")
            pages, _ = self._take(len(held.layers), more)
            held.pages = np.concatenate([held.pages, pages], axis=1)
            held.consecutive = _follow_one_another(held.pages)
        held.tokens = max(held.tokens, tokens)

    def fill(self, session: SessionId, tokens: int) -> None:
        """Store `tokens` made-up tokens in every layer of the session: what a benchmark needs is their number."""
        held = self.sessions[session]
        where = torch.from_numpy(held.pages[:, : -(-tokens // PAGE_TOKENS)].reshape(-1)).to(self._device)
        self.k.index_fill_(0, where, 1)
        self.v.index_fill_(0, where, 1)
        held.filled = dict.fromkeys(held.layers.layers(), tokens)

    def release(self, session: SessionId) -> None:
        """Give the session's pages back; unknown sessions are ignored."""
        held = self.sessions.pop(session, None)
        if held is None:
            return
        # What was written is wiped: a NaN left in a page would reach its next owner through masked positions.
        for layer, tokens in held.filled.items():
            used = held.pages[layer - held.layers.start, : -(-tokens // PAGE_TOKENS)]
            if used.size:
                where = torch.from_numpy(used).to(self._device)
                self.k.index_fill_(0, where, 0)
                self.v.index_fill_(0, where, 0)
        self._free[held.pages.reshape(-1)] = True

    def resize(self, pages: int) -> None:
        """Change the pool's size; live sessions keep their KV. Raises Busy if they would not fit."""
        if pages == self._free.size:
            return
        if pages < self.pages_reserved:
            raise Busy(
                f"sessions in flight hold {self.pages_reserved} KV pages and only {pages} would be left; "
                "release sessions first or give the peer more memory"
            )
        old_k, old_v = self.k, self.v
        self._allocate(pages)
        for held in self.sessions.values():
            before = torch.from_numpy(held.pages.reshape(-1)).to(self._device)
            held.pages, held.consecutive = self._take(*held.pages.shape)
            after = torch.from_numpy(held.pages.reshape(-1)).to(self._device)
            self.k.index_copy_(0, after, old_k.index_select(0, before))
            self.v.index_copy_(0, after, old_v.index_select(0, before))

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

    def _take(self, layers: int, per_layer: int) -> tuple[np.ndarray, bool]:
        """Pages `[layers, per_layer]`: one run for all of them, or else the first that are free."""
        start = self._run(layers * per_layer)
        if start is not None:
            pages = np.arange(start, start + layers * per_layer, dtype=np.int64)
            self._free[pages] = False
            return pages.reshape(layers, per_layer), True
        scattered = np.flatnonzero(self._free)[: layers * per_layer].astype(np.int64)
        self._free[scattered] = False
        table = scattered.reshape(layers, per_layer)
        return table, _follow_one_another(table)

    def _run(self, length: int) -> int | None:
        """Where the first run of `length` free pages begins."""
        edges = np.flatnonzero(np.diff(self._free.astype(np.int8), prepend=0, append=0))
        starts, stops = edges[0::2], edges[1::2]
        fits = np.flatnonzero(stops - starts >= length)
        return int(starts[fits[0]]) if fits.size else None


def _follow_one_another(pages: np.ndarray) -> bool:
    """Whether each layer's pages `[layers, pages]` are one run."""
    return bool((np.diff(pages, axis=1) == 1).all())

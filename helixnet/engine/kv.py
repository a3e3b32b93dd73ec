"""The KV memory of our own engine: pages of `PAGE_TOKENS` tokens of one layer, in one pool."""

from __future__ import annotations

import numpy as np
import torch

from helixnet.core.stage.pages import BY_LAYER, PAGE_TOKENS
from helixnet.core.types import SessionId
from helixnet.engine.memory import zeros_when_touched
from helixnet.engine.page_table import PageTable, SessionKv


class KvPool(PageTable):
    """K and V of every layer and session, each `[pages, PAGE_TOKENS, kv_heads, head_dim]`.

    Memory is touched only where tokens are written (the kernel hands out zero pages), so a generous
    budget costs nothing until it is used. Fresh memory is zero: masked positions must be finite.
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(BY_LAYER)
        self._tail = (PAGE_TOKENS, kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._allocate(0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V."""
        return 2 * int(np.prod(self._tail)) * self._dtype.itemsize

    def fill(self, session: SessionId, tokens: int) -> None:
        """Store `tokens` made-up tokens in every layer of the session: what a benchmark needs is their number."""
        held = self.sessions[session]
        where = torch.from_numpy(held.pages[:, : -(-tokens // PAGE_TOKENS)].reshape(-1)).to(self._device)
        self.k.index_fill_(0, where, 1)
        self.v.index_fill_(0, where, 1)
        held.filled = dict.fromkeys(held.layers.layers(), tokens)

    def _grow(self, held: SessionKv, more: int) -> None:
        """So many more pages for each layer: where they all follow one another if they can, or anywhere."""
        layers, pages = held.pages.shape
        start = self._run(layers * (pages + more)) if not held.shared.any() else None
        if start is None:
            super()._grow(held, more)
            return
        before, written = held.pages, held.written(PAGE_TOKENS)
        held.shared = np.zeros(pages + more, dtype=bool)
        held.place(self._take(layers, pages + more))
        self._copy(written, held.pages[:, : written.shape[1]])
        self._wipe(written)
        self._free[before.reshape(-1)] = True

    def _take(self, rows: int, per_row: int) -> np.ndarray:
        """Pages `[rows, per_row]`: one run for all of them, or else the first that are free."""
        start = self._run(rows * per_row)
        if start is None:
            return super()._take(rows, per_row)
        pages = np.arange(start, start + rows * per_row, dtype=np.int64)
        self._free[pages] = False
        return pages.reshape(rows, per_row)

    def _run(self, length: int) -> int | None:
        """Where the first run of `length` free pages begins."""
        edges = np.flatnonzero(np.diff(self._free.astype(np.int8), prepend=0, append=0))
        starts, stops = edges[0::2], edges[1::2]
        fits = np.flatnonzero(stops - starts >= length)
        return int(starts[fits[0]]) if fits.size else None

    def _move(self, before: np.ndarray, pages: int) -> None:
        old_k, old_v = self.k, self.v
        self._allocate(pages)
        where = torch.from_numpy(before).to(self._device)
        self.k[: before.size] = old_k.index_select(0, where)
        self.v[: before.size] = old_v.index_select(0, where)

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

    def _zeros(self, pages: int) -> torch.Tensor:
        shape = (pages, *self._tail)
        return zeros_when_touched(int(np.prod(shape)), self._dtype, self._device).view(shape)

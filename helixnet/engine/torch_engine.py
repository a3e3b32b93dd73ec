"""The engine on torch and transformers: holds spans of one model and runs ragged batches through them."""

from __future__ import annotations

import numpy as np
import torch

from helixnet.core.errors import MemoryTooSmall, UsageError
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.core.types import SessionId, Span, runs
from helixnet.engine.attention import Row, Step, length_class
from helixnet.engine.base import Progress
from helixnet.engine.ends import Part
from helixnet.engine.kv import KvPool
from helixnet.engine.layered import LayeredModel
from helixnet.engine.memory import given_back
from helixnet.engine.staged import Item, StagedEngine
from helixnet.engine.weights.prepared import PreparedModel

GATHER_PAGES = 1 << 30
GATHER_PAGES_CPU = 32
"""With more pages, a row's KV is better read where it is than copied: then a row's own overhead is the smaller part."""


class TorchEngine(StagedEngine):
    """Every decoder family whose transformers code has rotary layers works.

    Args:
        model: what to serve, from `weights.catalog.prepare`.
        device: `cpu`, `cuda:0`, `mps`, as `device.pick_device` gives it.
        memory_bytes: budget for weights and KV together.
        threads: CPU threads torch may use in this process (None leaves torch's setting).
    """

    def __init__(self, model: PreparedModel, *, device: str, memory_bytes: int, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        manifest, torch_device = model.manifest, torch.device(device)
        self._pool = KvPool(manifest.kv_heads, manifest.head_dim, getattr(torch, manifest.dtype), torch_device)
        super().__init__(manifest, torch_device, self._pool)
        self._prepared = model
        self._memory_bytes = memory_bytes
        self._model = LayeredModel(model, torch_device)

    @property
    def weight_factor(self) -> float:
        return self._model.weight_factor

    @property
    def kv_tokens_free(self) -> int:
        """Tokens of one layer for which there is KV room now."""
        return self._pool.pages_free * PAGE_TOKENS

    def held(self) -> tuple[Span, ...]:
        return runs(part for part in self._model.held if isinstance(part, int))

    def load(self, span: Span, progress: Progress | None = None) -> None:
        if span.stop > self._manifest.layers:
            raise UsageError(f"{self._manifest.name} has {self._manifest.layers} layers; {span} reaches past them")
        missing = [part for part in self._parts(span) if part not in self._model.held]
        if not missing:
            return
        self._refuse_too_large(self._model.held | set(missing), span)
        # Reading weights is the long part of a load; sessions go on beside it.
        with given_back():
            loaded = self._model.read(missing, self._prepared.source(), progress)
            with self._running:
                self._model.attach(missing, loaded)
                self._fit_pool()

    def drop(self, keep: Span | None) -> None:
        kept = set(self._parts(keep)) if keep is not None else set()
        with self._running:
            self._model.drop(self._model.held - kept)
            self._fit_pool()

    def fill(self, session: SessionId, tokens: int) -> None:
        self._pool.fill(session, tokens)

    def _order(self, items: list[Item]) -> list[Item]:
        """Single tokens first, those of like length side by side: attention handles them together."""
        return sorted(items, key=_place)

    def _run_segment(self, segment: Span, items: list[Item]) -> None:
        lengths = [item.work.tokens for item in items]
        hidden = torch.cat([item.hidden for item in items]) if len(items) > 1 else items[0].hidden
        hidden = self._model.embed(hidden) if segment.start == 0 else hidden[None]
        where = np.concatenate([np.arange(i.work.position, i.work.position + i.work.tokens) for i in items])
        positions = torch.from_numpy(where).to(self._device)[None]
        rows = [Row(item.kv, item.work.position, item.work.tokens) for item in items]
        with Step(self._pool, segment, rows, GATHER_PAGES_CPU if self._device.type == "cpu" else GATHER_PAGES):
            hidden = self._model.run_layers(segment.layers(), hidden, positions)
        for item, part in zip(items, hidden[0].split(lengths), strict=True):
            item.hidden = part

    def _logits(self, items: list[Item]) -> torch.Tensor:
        return self._model.logits(torch.cat([item.hidden[-item.answers :] for item in items]))

    def _parts(self, span: Span) -> list[Part]:
        parts: list[Part] = list(span.layers())
        if span.start == 0:
            parts.append("entry")
        if span.stop == self._manifest.layers:
            parts.append("exit")
        return parts

    def _refuse_too_large(self, parts: set[Part], span: Span) -> None:
        needed = self._model.bytes_of(parts)
        in_use = self._pool.pages_reserved * self._pool.page_bytes
        if needed + in_use > self._memory_bytes:
            raise MemoryTooSmall(
                f"{span} would bring the weights to {needed / 1e9:.2f} GB, with {in_use / 1e9:.2f} GB of KV in use; "
                f"the budget is {self._memory_bytes / 1e9:.2f} GB (--memory)"
            )

    def _fit_pool(self) -> None:
        """Give to KV what the weights leave of the budget."""
        room = self._memory_bytes - self._model.bytes_of(self._model.held)
        self._pool.resize(max(room, 0) // self._pool.page_bytes if self._model.held else self._pool.pages_reserved)


def _place(item: Item) -> tuple[bool, int, int]:
    work = item.work
    return work.tokens > 1, 0 if work.tokens > 1 else length_class(work.position // PAGE_TOKENS + 1), item.index

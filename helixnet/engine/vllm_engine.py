"""vLLM as an engine: runs of layers on its kernels, sessions and pages on ours."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import torch

from helixnet.core.errors import MemoryTooSmall, ModelError, UsageError
from helixnet.core.model import DTYPE_BYTES
from helixnet.core.stage.pages import Paging
from helixnet.core.types import SessionId, Span, runs
from helixnet.core.wire.activation import PACKINGS
from helixnet.engine.base import Progress
from helixnet.engine.memory import given_back
from helixnet.engine.page_table import PageTable
from helixnet.engine.staged import Item, StagedEngine
from helixnet.engine.vllm_layers import PAGE_TOKENS, Limits, Result, Row, VllmLayers
from helixnet.engine.weights import architecture, convert, keeping
from helixnet.engine.weights.prepared import PreparedModel
from helixnet.engine.weights.source import WeightSource

BATCH_TOKENS = 2048
"""Run at once; what is more in a batch is run after it."""
SESSIONS_MAX = 128
"""Of those, too."""

Part = tuple[Item, int, int]
"""Tokens `[start, stop)` of an item."""
Tensors = list[tuple[str, torch.Tensor]]


class _Pages(PageTable):
    """A page has `PAGE_TOKENS` tokens in every layer that is held, whichever of them a session runs."""

    def __init__(self) -> None:
        super().__init__(Paging(PAGE_TOKENS, by_layer=False))
        self.stages: list[VllmLayers] = []
        """Disjoint, in order."""

    def fill(self, session: SessionId, tokens: int) -> None:
        """Store `tokens` made-up tokens in every layer of the session: what a benchmark needs is their number."""
        held = self.sessions[session]
        for stage in self.stages:
            stage.fill(held.pages[:, : self._pages(tokens)], 1)
        held.filled = dict.fromkeys(held.layers.layers(), tokens)

    def _wipe(self, pages: np.ndarray) -> None:
        """What was written goes: a NaN left in a page would reach its next owner through masked positions."""
        for stage in self.stages if pages.size else ():
            stage.fill(pages, 0)

    def _move(self, before: np.ndarray, pages: int) -> None:
        for stage in self.stages:
            stage.resize(pages, before)


class VllmEngine(StagedEngine):
    """Holds spans of one model as vLLM's layers. Needs a process of its own, in which vLLM sets threads and globals.

    Args:
        model: what to serve, from `weights.catalog.prepare`.
        device: `cpu` or `cuda:0`.
        memory_bytes: budget for weights and KV together.
        batch_tokens: how many are run at once.
    """

    def __init__(
        self, model: PreparedModel, *, device: str, memory_bytes: int, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        manifest = model.manifest
        if keeping.is_ours(manifest.quantization):
            raise ModelError(f"vLLM has no weights in {manifest.quantization} as we keep them; try --engine torch")
        self._pool = _Pages()
        super().__init__(manifest, torch.device(device), self._pool)
        self._prepared = model
        self._memory_bytes = memory_bytes
        # No session gets more tokens than one layer alone leaves room for.
        most = max(PAGE_TOKENS, (memory_bytes - manifest.layer_bytes) // manifest.kv_bytes)
        self._limits = Limits(min(manifest.context_tokens, most), batch_tokens, min(SESSIONS_MAX, batch_tokens))

    @property
    def takes(self) -> tuple[str, ...]:
        return PACKINGS

    @property
    def weight_factor(self) -> float:
        return 1.0

    @property
    def kv_tokens_free(self) -> int:
        """Tokens, in every layer that is held, for which there is KV room now."""
        return self._pool.pages_free * PAGE_TOKENS

    def held(self) -> tuple[Span, ...]:
        return runs(layer for stage in self._pool.stages for layer in stage.span.layers())

    def load(self, span: Span, progress: Progress | None = None) -> None:
        if span.stop > self._manifest.layers:
            raise UsageError(f"{self._manifest.name} has {self._manifest.layers} layers; {span} reaches past them")
        held = {layer for one in self.held() for layer in one.layers()}
        missing = runs(layer for layer in span.layers() if layer not in held)
        if not missing:
            return
        self._refuse_too_large(held | set(span.layers()), span)
        with given_back():
            made = [self._build(one, progress) for one in missing]
            with self._running:
                self._pool.stages = sorted([*self._pool.stages, *made], key=lambda stage: stage.span)
                self._fit_pool(anew=True)

    def drop(self, keep: Span | None) -> None:
        with self._running, given_back():
            kept = []
            for stage in self._pool.stages:
                if keep is not None and stage.span.overlaps(keep):
                    stage.keep(Span(max(stage.span.start, keep.start), min(stage.span.stop, keep.stop)))
                    kept.append(stage)
            self._pool.stages = kept
            gc.collect()
            self._fit_pool(anew=True)

    def fill(self, session: SessionId, tokens: int) -> None:
        self._pool.fill(session, tokens)

    def release(self, session: SessionId) -> None:
        super().release(session)
        with self._running:
            for stage in self._pool.stages:
                stage.forget(session)

    # --- batches -----------------------------------------------------------------------------------

    def _boundaries(self) -> set[int]:
        return {stage.span.start for stage in self._pool.stages}

    def _run_segment(self, segment: Span, items: list[Item]) -> None:
        stage = next(stage for stage in self._pool.stages if stage.span.holds(segment))
        made: dict[int, list[Result]] = {item.index: [] for item in items}
        for parts in self._parts(items):
            rows = [_row(item, start, stop) for item, start, stop in parts]
            for (item, _, _), result in zip(parts, stage.run(segment, rows), strict=True):
                made[item.index].append(result)
        for item in items:
            results = made[item.index]
            logits, hidden = _joined([result.logits for result in results]), _joined([one.hidden for one in results])
            if logits is not None:
                item.logits = logits[-item.answers :]
            else:
                assert hidden is not None, "layers before the last put out hidden states"
                item.hidden, item.residual = hidden, _joined([result.residual for result in results])

    def _parts(self, items: list[Item]) -> Iterator[list[Part]]:
        """Batches that are not too large; an item's tokens may be in several of them, one after the other."""
        batch: list[Part] = []
        room = self._limits.batch_tokens
        for item in items:
            start, tokens = 0, item.work.tokens
            while start < tokens:
                stop = min(tokens, start + room)
                batch.append((item, start, stop))
                room, start = room - (stop - start), stop
                if not room or len(batch) == self._limits.sessions:
                    yield batch
                    batch, room = [], self._limits.batch_tokens
        if batch:
            yield batch

    def _logits(self, items: list[Item]) -> torch.Tensor:
        return torch.cat([item.logits for item in items if item.logits is not None])

    # --- loading -----------------------------------------------------------------------------------

    def _build(self, span: Span, progress: Progress | None) -> VllmLayers:
        """Layers with their weights. Reading is the long part; sessions go on beside it."""
        with self._running:
            stage = VllmLayers(self._prepared, span, self._limits)
        total, done = self._manifest.span_bytes(span.start, span.stop), 0
        for tensors in self._read(span):
            with self._running:
                _take(stage, tensors, self._manifest.architecture)
            done += sum(tensor.numel() for _, tensor in tensors) * DTYPE_BYTES[self._manifest.dtype]
            if progress is not None:
                progress(min(done, total), total)
        with self._running:
            stage.finish()
        return stage

    def _read(self, span: Span) -> Iterator[Tensors]:
        """The checkpoint's tensors of these layers and the ends they touch, layer by layer, as vLLM calls them."""
        source = self._prepared.source()
        by_layer: dict[int, dict[str, str]] = {}
        for stored, name in self._names(source):
            layer = architecture.layer_of(name)
            if layer is None and (span.start == 0 or span.stop == self._manifest.layers):
                by_layer.setdefault(-1, {})[stored] = name
            elif layer is not None and layer in span.layers():
                by_layer.setdefault(layer, {})[stored] = name
        for _, names in sorted(by_layer.items()):
            yield [(names[stored], tensor) for stored, tensor in source.read(sorted(names))]

    def _names(self, source: WeightSource) -> Iterator[tuple[str, str]]:
        """As they are stored, and as vLLM knows them."""
        record, manifest = self._prepared.record, self._manifest
        model_class = architecture.load_class(record.modeling_module, manifest.architecture)
        config = model_class.config_class.from_dict(dict(self._prepared.config))
        return convert.decoder_names(source, architecture.build_skeleton(model_class, config, manifest.dtype, "eager"))

    def _refuse_too_large(self, layers: set[int], span: Span) -> None:
        needed = self._weights(layers)
        in_use = self._pool.pages_reserved * self._page_bytes(len(layers))
        if needed + in_use > self._memory_bytes:
            raise MemoryTooSmall(
                f"{span} would bring the weights to {needed / 1e9:.2f} GB, with {in_use / 1e9:.2f} GB of KV in use; "
                f"the budget is {self._memory_bytes / 1e9:.2f} GB (--memory)"
            )

    def _weights(self, layers: set[int]) -> int:
        return sum(self._manifest.span_bytes(one.start, one.stop) for one in runs(layers))

    def _page_bytes(self, layers: int) -> int:
        return PAGE_TOKENS * self._manifest.kv_bytes * max(1, layers)

    def _fit_pool(self, anew: bool) -> None:
        """Give to KV what the weights leave of the budget."""
        layers = {layer for one in self.held() for layer in one.layers()}
        room = self._memory_bytes - self._weights(layers)
        pages = max(room, 0) // self._page_bytes(len(layers)) if layers else self._pool.pages_reserved
        self._pool.resize(pages, anew)


def _row(item: Item, start: int, stop: int) -> Row:
    residual = item.residual[start:stop] if item.residual is not None else None
    work, answers = item.work, stop - max(start, item.work.tokens - item.answers)
    inputs = item.hidden[start:stop]
    return Row(work.session, item.kv.pages[0], work.position + start, inputs, residual, max(1, answers))


def _joined(pieces: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [piece for piece in pieces if piece is not None]
    return torch.cat(there) if len(there) > 1 else there[0] if there else None


def _take(stage: VllmLayers, tensors: Tensors, name: str) -> None:
    try:
        stage.take(tensors)
    except (KeyError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(f"vLLM cannot load {name} from this checkpoint ({error}); try --engine torch") from error

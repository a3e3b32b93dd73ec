"""The engine on torch and transformers: holds spans of one model and runs ragged batches through them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from helixnet.core.errors import HelixError, MemoryTooSmall, UsageError
from helixnet.core.model import Manifest
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import SESSION_ID_CHARS_MAX, BlockId, SessionId, Span, runs
from helixnet.core.wire.activation import Activation
from helixnet.engine.attention import Row, Step, length_class
from helixnet.engine.base import Progress
from helixnet.engine.kv import KvPool, SessionKv
from helixnet.engine.layered import LayeredModel, Part
from helixnet.engine.memory import given_back
from helixnet.engine.sampler import NO_HISTORY, Chosen, choose
from helixnet.engine.weights.prepared import PreparedModel

log = logging.getLogger("helixnet.engine")


GATHER_PAGES = 1 << 30
GATHER_PAGES_CPU = 32
"""With more pages, a row's KV is better read where it is than copied: then a row's own overhead is the smaller part."""


@dataclass(slots=True)
class _Item:
    """One `Work` that passed the checks, on its way through the layers."""

    index: int
    work: Work
    kv: SessionKv
    hidden: torch.Tensor
    """[tokens, hidden_size]"""


def _order(item: _Item) -> tuple[bool, int, int]:
    work = item.work
    return work.tokens > 1, 0 if work.tokens > 1 else length_class(work.position // PAGE_TOKENS + 1), item.index


class TorchEngine:
    """Implements `helixnet.engine.base.Engine`. Every decoder family whose transformers code has rotary layers works.

    Args:
        model: what to serve, from `weights.catalog.prepare`.
        device: `cpu`, `cuda:0`, `mps`, as `device.pick_device` gives it.
        memory_bytes: budget for weights and KV together.
        threads: CPU threads torch may use in this process (None leaves torch's setting).
    """

    def __init__(self, model: PreparedModel, *, device: str, memory_bytes: int, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._prepared = model
        self._manifest = model.manifest
        self._device = torch.device(device)
        self._memory_bytes = memory_bytes
        self._dtype: torch.dtype = getattr(torch, model.manifest.dtype)
        self._model = LayeredModel(model, self._device)
        self._running = threading.Lock()
        """Held while layers run or change; reading weights, the long part of a load, goes on beside."""
        self._pool = KvPool(model.manifest.kv_heads, model.manifest.head_dim, self._dtype, self._device)

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def weight_factor(self) -> float:
        """How many times as much memory as a checkpoint's own bytes loaded weights take here; at least 1."""
        return self._model.weight_factor

    @property
    def kv_tokens_free(self) -> int:
        """Tokens of one layer for which there is KV room now."""
        return self._pool.pages_free * self._pool.k.shape[1]

    def held(self) -> tuple[Span, ...]:
        return runs(part for part in self._model.held if isinstance(part, int))

    def load(self, span: Span, progress: Progress | None = None) -> None:
        if span.stop > self._manifest.layers:
            raise UsageError(f"{self._manifest.name} has {self._manifest.layers} layers; {span} reaches past them")
        missing = [part for part in self._parts(span) if part not in self._model.held]
        if not missing:
            return
        self._refuse_too_large(self._model.held | set(missing), span)
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

    def open(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId] = ()) -> None:
        if not any(span.holds(layers) for span in self.held()):
            raise UsageError(f"this peer does not hold {layers}")
        self._refuse_tokens(tokens)
        if not 1 <= len(session) <= SESSION_ID_CHARS_MAX:
            raise UsageError(f"a session id has 1 to {SESSION_ID_CHARS_MAX} characters")
        with self._running:
            self._pool.reserve(session, layers, tokens, begun)

    def extend(self, session: SessionId, tokens: int) -> None:
        if session not in self._pool.sessions:
            raise UsageError(f"session {session} is not open here")
        self._refuse_tokens(tokens)
        with self._running:
            self._pool.extend(session, tokens)

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        with self._running:
            self._pool.seal(session, blocks)

    def evict(self, blocks: Sequence[BlockId]) -> None:
        with self._running:
            self._pool.evict(blocks)

    def fill(self, session: SessionId, tokens: int) -> None:
        """Give an open session `tokens` made-up tokens, for measuring; what it then puts out means nothing."""
        self._pool.fill(session, tokens)

    def release(self, session: SessionId) -> None:
        with self._running:
            self._pool.release(session)

    @torch.inference_mode()
    def run(self, batch: Sequence[Work]) -> list[Done]:
        done: list[Done | None] = [None] * len(batch)
        items: list[_Item] = []
        seen: set[SessionId] = set()
        for index, work in enumerate(batch):
            try:
                if work.session in seen:
                    raise UsageError("a session can be in a batch only once")
                items.append(_Item(index, work, self._check(work), self._input(work)))
                seen.add(work.session)
            except HelixError as error:
                done[index] = Done(session=work.session, error=str(error))
        with self._running:
            for item, result in self._run_or_isolate(items):
                done[item.index] = result
        return [result for result in done if result is not None]

    def _run_or_isolate(self, items: list[_Item]) -> list[tuple[_Item, Done]]:
        """Run the items together; if the library fails, one by one, so that only the culprit gets the error."""
        if not items:
            return []
        inputs = [item.hidden for item in items]
        try:
            return list(zip(items, self._run_together(items), strict=True))
        except (RuntimeError, ValueError, IndexError) as error:
            log.exception("a batch of %d failed", len(items))
            if len(items) == 1:
                return [(items[0], Done(session=items[0].work.session, error=f"the engine failed: {error}"))]
        for item, hidden in zip(items, inputs, strict=True):
            item.hidden = hidden
        return [pair for item in items for pair in self._run_or_isolate([item])]

    def _run_together(self, items: list[_Item]) -> list[Done]:
        # Single tokens first, those of like length side by side: attention handles them together.
        ordered = sorted(items, key=_order)
        self._embed([item for item in ordered if item.work.token_ids is not None])
        cuts = sorted({cut for item in ordered for cut in (item.work.layers.start, item.work.layers.stop)})
        for start, stop in pairwise(cuts):
            segment = Span(start, stop)
            active = [item for item in ordered if item.work.layers.holds(segment)]
            if active:
                self._run_segment(segment, active)
        results = self._results(items)
        for item in items:
            for layer in item.work.layers.layers():
                item.kv.filled[layer] = item.work.position + item.work.tokens
        return results

    def _embed(self, items: list[_Item]) -> None:
        """Turn token ids into what layer 0 receives, all items in one look-up."""
        if not items:
            return
        lengths = [item.work.tokens for item in items]
        hidden = self._model.embed(torch.cat([item.hidden for item in items]))[0]
        for item, rows in zip(items, hidden.split(lengths), strict=True):
            item.hidden = rows

    def _run_segment(self, segment: Span, items: list[_Item]) -> None:
        """Run `items`, single tokens first, through the layers they all share."""
        lengths = [item.work.tokens for item in items]
        hidden = torch.cat([item.hidden for item in items])[None] if len(items) > 1 else items[0].hidden[None]
        where = np.concatenate([np.arange(i.work.position, i.work.position + i.work.tokens) for i in items])
        positions = torch.from_numpy(where).to(self._device)[None]
        rows = [Row(item.kv, item.work.position, item.work.tokens) for item in items]
        with Step(self._pool, segment, rows, GATHER_PAGES_CPU if self._device.type == "cpu" else GATHER_PAGES):
            hidden = self._model.run_layers(segment.layers(), hidden, positions)
        for item, part in zip(items, hidden[0].split(lengths), strict=True):
            item.hidden = part

    def _results(self, items: list[_Item]) -> list[Done]:
        """A sampled token, an activation or nothing for each item, in order."""
        last = self._manifest.layers
        sampled = [item for item in items if item.work.layers.stop == last and item.work.sample is not None]
        tokens: dict[int, Chosen | str] = {}
        if sampled:
            logits = self._model.logits(torch.stack([item.hidden[-1] for item in sampled]))
            for item, row in zip(sampled, logits.float().cpu().numpy(), strict=True):
                work = item.work
                assert work.sample is not None
                if np.isnan(row).any():
                    tokens[item.index] = "the logits are not numbers; the request's activations overflowed"
                else:
                    history = work.history or NO_HISTORY
                    tokens[item.index] = choose(work.sample, work.position + work.tokens, row, history)
        results = []
        for item in items:
            session = item.work.session
            token = tokens.get(item.index)
            if isinstance(token, str):
                results.append(Done(session=session, error=token))
            elif token is not None:
                results.append(Done(session=session, token_id=token.token_id, logprobs=token.logprobs))
            elif item.work.layers.stop == last:
                results.append(Done(session=session))
            else:
                results.append(Done(session=session, activation=self._activation(item.hidden)))
        return results

    def _activation(self, hidden: torch.Tensor) -> Activation:
        """The bytes of `hidden` without copying them (on a CPU)."""
        raw = hidden.contiguous().cpu().view(torch.uint8).numpy()
        return Activation(
            dtype=self._manifest.dtype, tokens=hidden.shape[0], hidden_size=hidden.shape[1], data=raw.reshape(-1).data
        )

    def _check(self, work: Work) -> SessionKv:
        """The session's KV, if `work` may run now. Raises UsageError otherwise."""
        kv = self._pool.sessions.get(work.session)
        if kv is None:
            raise UsageError(f"session {work.session} is not open here")
        if not kv.layers.holds(work.layers) or not any(span.holds(work.layers) for span in self.held()):
            raise UsageError(f"session {work.session} was opened for {kv.layers}, not for {work.layers}")
        behind = next((layer for layer in work.layers.layers() if kv.filled[layer] != work.position), None)
        if behind is not None:
            raise UsageError(f"position {work.position} is out of step: layer {behind} has {kv.filled[behind]} tokens")
        if work.position + work.tokens > kv.tokens:
            raise UsageError(f"session {work.session} has room for {kv.tokens} tokens and would get more")
        return kv

    def _input(self, work: Work) -> torch.Tensor:
        """Token ids [tokens] for the first layer, hidden states [tokens, hidden_size] for any other."""
        if (work.token_ids is None) == (work.activation is None) or (work.layers.start == 0) != (
            work.token_ids is not None
        ):
            raise UsageError("work on layer 0 needs token ids, work on any other layer an activation")
        if work.token_ids is not None:
            if not work.token_ids or not all(0 <= token < self._manifest.vocab_size for token in work.token_ids):
                raise UsageError(f"token ids must lie in [0, {self._manifest.vocab_size})")
            return torch.tensor(work.token_ids, device=self._device)
        activation = work.activation
        assert activation is not None
        if (activation.dtype, activation.hidden_size) != (self._manifest.dtype, self._manifest.hidden_size):
            raise UsageError(
                f"an activation of {self._manifest.hidden_size} x {self._manifest.dtype} is needed, "
                f"not {activation.hidden_size} x {activation.dtype}"
            )
        # np.array: the frame it came in may be read-only and is not ours to keep.
        raw = torch.from_numpy(np.array(np.frombuffer(activation.data, dtype=np.uint8)))
        hidden = raw.view(self._dtype).view(activation.tokens, activation.hidden_size).to(self._device)
        if not torch.isfinite(hidden).all():
            raise UsageError("the activation holds infinite or undefined numbers")
        return hidden

    def _parts(self, span: Span) -> list[Part]:
        parts: list[Part] = list(span.layers())
        if span.start == 0:
            parts.append("entry")
        if span.stop == self._manifest.layers:
            parts.append("exit")
        return parts

    def _refuse_tokens(self, tokens: int) -> None:
        if not 1 <= tokens <= self._manifest.context_tokens:
            raise UsageError(f"a session has 1 to {self._manifest.context_tokens} tokens, not {tokens}")

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

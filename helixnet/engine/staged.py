"""What engines have in common: who may run what, ragged batches by segments of layers, sampling."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from helixnet.core.errors import HelixError, UsageError
from helixnet.core.model import Manifest
from helixnet.core.sampling import History
from helixnet.core.stage.pages import Paging
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import SESSION_ID_CHARS_MAX, BlockId, SessionId, Span
from helixnet.core.wire.activation import INT8, RAW
from helixnet.engine.base import Progress
from helixnet.engine.packing import pack, unpack
from helixnet.engine.page_table import PageTable, SessionKv
from helixnet.engine.sampler import NO_HISTORY, choose

log = logging.getLogger("helixnet.engine")


@dataclass(slots=True)
class Item:
    """One `Work` that passed the checks, on its way through the layers."""

    index: int
    work: Work
    kv: SessionKv
    hidden: torch.Tensor
    """[tokens] token ids before layer 0, [tokens, hidden_size] after any."""
    residual: torch.Tensor | None = None
    """If it is apart: what the layers put out is the sum of both."""
    logits: torch.Tensor | None = None
    """[answers, vocab] for the last tokens, if the layers' own code makes them."""

    @property
    def answers(self) -> int:
        """Of so many of its last tokens the logits are wanted: the last before the drafts, and each of these."""
        return 1 + len(self.work.drafts)


class StagedEngine:
    """Implements `helixnet.engine.base.Engine`, but for the layers themselves: `held`, `load`, `drop`, and those below.

    `_running` is held while layers run or change.
    """

    def __init__(self, manifest: Manifest, device: torch.device, pool: PageTable) -> None:
        self._manifest = manifest
        self._device = device
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._running = threading.Lock()
        self._pages = pool

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def paging(self) -> Paging:
        return self._pages.paging

    # --- for the engines ---------------------------------------------------------------------------

    @property
    def takes(self) -> tuple[str, ...]:
        return (RAW, INT8)

    @property
    def weight_factor(self) -> float:
        """See Engine."""
        raise NotImplementedError

    def held(self) -> tuple[Span, ...]:
        """See Engine."""
        raise NotImplementedError

    def load(self, span: Span, progress: Progress | None = None) -> None:
        """See Engine."""
        raise NotImplementedError

    def drop(self, keep: Span | None) -> None:
        """See Engine."""
        raise NotImplementedError

    def fill(self, session: SessionId, tokens: int) -> None:
        """See Engine."""
        raise NotImplementedError

    def _run_segment(self, segment: Span, items: list[Item]) -> None:
        """Run items, in an order that `_order` gave, through layers that they all share: `hidden` is what comes out."""
        raise NotImplementedError

    def _logits(self, items: list[Item]) -> torch.Tensor:
        """[answers of all items, vocab]: the model's logits for last tokens of items that have left the last layer."""
        raise NotImplementedError

    def _boundaries(self) -> set[int]:
        """Layers before which a segment always ends."""
        return set()

    def _order(self, items: list[Item]) -> list[Item]:
        """The order in which a batch's items are best run."""
        return items

    # --- sessions ----------------------------------------------------------------------------------

    def open(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId] = ()) -> None:
        if not any(span.holds(layers) for span in self.held()):
            raise UsageError(f"this peer does not hold {layers}")
        self._refuse_tokens(tokens)
        if not 1 <= len(session) <= SESSION_ID_CHARS_MAX:
            raise UsageError(f"a session id has 1 to {SESSION_ID_CHARS_MAX} characters")
        with self._running:
            self._pages.reserve(session, layers, tokens, begun)

    def extend(self, session: SessionId, tokens: int) -> None:
        if session not in self._pages.sessions:
            raise UsageError(f"session {session} is not open here")
        self._refuse_tokens(tokens)
        with self._running:
            self._pages.extend(session, tokens)

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        with self._running:
            self._pages.seal(session, blocks)

    def evict(self, blocks: Sequence[BlockId]) -> None:
        with self._running:
            self._pages.evict(blocks)

    def release(self, session: SessionId) -> None:
        with self._running:
            self._pages.release(session)

    def close(self) -> None:
        self.drop(None)

    # --- batches -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, batch: Sequence[Work]) -> list[Done]:
        done: list[Done | None] = [None] * len(batch)
        items: list[Item] = []
        seen: set[SessionId] = set()
        for index, work in enumerate(batch):
            try:
                if work.session in seen:
                    raise UsageError("a session can be in a batch only once")
                items.append(Item(index, work, self._check(work), *self._input(work)))
                seen.add(work.session)
            except HelixError as error:
                done[index] = Done(session=work.session, error=str(error))
        with self._running:
            for item, result in self._run_or_isolate(items):
                done[item.index] = result
        return [result for result in done if result is not None]

    def _run_or_isolate(self, items: list[Item]) -> list[tuple[Item, Done]]:
        """Run the items together; if the library fails, one by one, so that only the culprit gets the error."""
        if not items:
            return []
        inputs = [(item.hidden, item.residual) for item in items]
        try:
            return list(zip(items, self._run_together(items), strict=True))
        except (RuntimeError, ValueError, IndexError) as error:
            log.exception("a batch of %d failed", len(items))
            if len(items) == 1:
                return [(items[0], Done(session=items[0].work.session, error=f"the engine failed: {error}"))]
        for item, (hidden, residual) in zip(items, inputs, strict=True):
            item.hidden, item.residual = hidden, residual
        return [pair for item in items for pair in self._run_or_isolate([item])]

    def _run_together(self, items: list[Item]) -> list[Done]:
        ordered = self._order(items)
        cuts = {cut for item in ordered for cut in (item.work.layers.start, item.work.layers.stop)}
        cuts |= {cut for cut in self._boundaries() if min(cuts) < cut < max(cuts)}
        for start, stop in pairwise(sorted(cuts)):
            segment = Span(start, stop)
            active = [item for item in ordered if item.work.layers.holds(segment)]
            if active:
                self._run_segment(segment, active)
        results = self._results(items)
        for item in items:
            stop = item.work.position + item.work.tokens
            for layer in item.work.layers.layers():
                item.kv.filled[layer] = stop
            item.kv.drafted, item.kv.reached = len(item.work.drafts), max(item.kv.reached, stop)
        return results

    def _results(self, items: list[Item]) -> list[Done]:
        """A sampled token, an activation or nothing for each item, in order."""
        last = self._manifest.layers
        sampled = [item for item in items if item.work.layers.stop == last and item.work.sample is not None]
        tokens: dict[int, Done] = {}
        if sampled:
            each = self._logits(sampled).float().cpu().split([item.answers for item in sampled])
            tokens = {item.index: _choose(item.work, rows.numpy()) for item, rows in zip(sampled, each, strict=True)}
        results = []
        for item in items:
            session = item.work.session
            if item.index in tokens:
                results.append(tokens[item.index])
            elif item.work.layers.stop == last:
                results.append(Done(session=session))
            else:
                activation = pack(item.hidden, item.residual, self._manifest, item.work.packing)
                results.append(Done(session=session, activation=activation))
        return results

    # --- what comes in and goes out ------------------------------------------------------------------

    def _check(self, work: Work) -> SessionKv:
        """The session's KV, if `work` may run now. Raises UsageError otherwise."""
        kv = self._pages.sessions.get(work.session)
        if kv is None:
            raise UsageError(f"session {work.session} is not open here")
        if not kv.layers.holds(work.layers) or not any(span.holds(work.layers) for span in self.held()):
            raise UsageError(f"session {work.session} was opened for {kv.layers}, not for {work.layers}")
        for layer in work.layers.layers():
            if not kv.filled[layer] - kv.drafted <= work.position <= kv.filled[layer]:
                raise UsageError(
                    f"position {work.position} is out of step: layer {layer} has {kv.filled[layer]} tokens"
                )
        if work.drafts and len(work.drafts) >= work.tokens:
            raise UsageError("work has more drafts than tokens after its first")
        if work.position + work.tokens > kv.tokens:
            raise UsageError(f"session {work.session} has room for {kv.tokens} tokens and would get more")
        return kv

    def _input(self, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [tokens] for the first layer, hidden states [tokens, hidden_size] (and residual) for any other."""
        if (work.token_ids is None) == (work.activation is None) or (work.layers.start == 0) != (
            work.token_ids is not None
        ):
            raise UsageError("work on layer 0 needs token ids, work on any other layer an activation")
        if work.token_ids is not None:
            if not work.token_ids or not all(0 <= token < self._manifest.vocab_size for token in work.token_ids):
                raise UsageError(f"token ids must lie in [0, {self._manifest.vocab_size})")
            return torch.tensor(work.token_ids, device=self._device), None
        assert work.activation is not None
        if work.activation.packing not in self.takes:
            raise UsageError(f"this engine does not take activations that are packed as {work.activation.packing!r}")
        return unpack(work.activation, self._manifest, self._device)

    def _refuse_tokens(self, tokens: int) -> None:
        if not 1 <= tokens <= self._manifest.context_tokens:
            raise UsageError(f"a session has 1 to {self._manifest.context_tokens} tokens, not {tokens}")


def _choose(work: Work, rows: np.ndarray) -> Done:
    """The token that `work` asks for, after all its drafts that are chosen, too; `rows` are logits [answers, vocab]."""
    assert work.sample is not None
    history = work.history or NO_HISTORY
    first = work.position + work.tokens - len(work.drafts)
    for right, (row, draft) in enumerate(zip(rows, (*work.drafts, None), strict=True)):
        if np.isnan(row).any():
            break
        chosen = choose(work.sample, first + right, row, history)
        if chosen.token_id != draft:
            return Done(session=work.session, token_id=chosen.token_id, right=right, logprobs=chosen.logprobs)
        history = History(history.prompt, [*history.made, draft], history.stop_ids)
    return Done(session=work.session, error="the logits are not numbers; the request's activations overflowed")

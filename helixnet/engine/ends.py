"""The two ends of a model, embedding and head, run the shortest way that gives what its own forward gives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import nn

from helixnet.engine.fused import PROBE_TOKENS, TOLERANCE, distance
from helixnet.engine.linears import KeptLinear
from helixnet.engine.products import has_own_form
from helixnet.engine.weights import architecture

Part = int | Literal["entry", "exit"]
"""A layer number, or one of the two ends."""


class Ends:
    """Of a transformers model that may lack weights; `settle` when an end has got them.

    Families differ here (embedding multiplier, logit scaling, soft cap); the forward is always right, and costs half a
    millisecond of bookkeeping a token.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._base = model.base_model
        self._device = device
        self.tied = architecture.is_tied(model)
        self.entry_names, self.exit_names = self._names()
        self.output = model.get_output_embeddings()
        self._dtype: torch.dtype = self.output.weight.dtype
        stored = [name for name in self.exit_names if model.get_parameter(name) is self.output.weight]
        self.projection = next(iter(stored), None)
        """The head's matrix, as it is called; None if it cannot be told from other tensors."""
        self.embed: Callable[[torch.Tensor], torch.Tensor] = self._embed_as_written
        """Token ids [1, tokens] to what layer 0 receives."""
        self.head: Callable[[torch.Tensor], torch.Tensor] = self._head_as_written
        """What the last layer puts out [1, rows, hidden_size] to logits [1, rows, vocab]."""
        self._packed: KeptLinear | None = None
        """The head in a form of its own, where the one it is stored in is slow."""

    @property
    def packs_head(self) -> bool:
        """Whether the head gets a form of its own. In float32 a layout of the stored one is as good (`column_wise`)."""
        return self._dtype != torch.float32 and has_own_form(self._device, self._dtype)

    @property
    def has_copy(self) -> bool:
        """Whether the head's matrix as it is stored is not needed for the head."""
        return self._packed is not None and self._packed.product.is_copy

    def settle(self, parts: Collection[Part]) -> None:
        """Call embedding and head directly where that gives what the forward gives; those of `parts` have weights."""
        with torch.inference_mode():
            if "entry" in parts:
                ids = torch.arange(PROBE_TOKENS, device=self._device)[None]
                plain = self._model.get_input_embeddings()
                self.embed = plain if torch.equal(plain(ids), self._embed_as_written(ids)) else self._embed_as_written
            if "exit" in parts:
                self._settle_head()

    def drop(self, parts: Collection[Part]) -> None:
        """Those have no weights any more."""
        if "exit" in parts:
            self.head = self._head_as_written
            self._unpack()

    def _settle_head(self) -> None:
        size = self._model.config.hidden_size
        probe = torch.linspace(-2, 2, PROBE_TOKENS * size, device=self._device).view(1, PROBE_TOKENS, size)
        probe = probe.to(self._dtype)
        expected = self._head_as_written(probe)
        self.head = self._head_directly if torch.equal(self._head_directly(probe), expected) else self._head_as_written
        if self.packs_head:
            self._packed = KeptLinear(self.output, self.output.weight)
            self._model.set_output_embeddings(self._packed)
            if distance(self.head(probe), expected) > TOLERANCE[self._dtype]:
                self._unpack()

    def _unpack(self) -> None:
        self._packed = None
        self._model.set_output_embeddings(self.output)

    def _head_directly(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = getattr(self._base, "norm", None)
        rows = hidden if norm is None else norm(hidden)
        if self._packed is not None:  # in what it computes in, which may have more digits
            product = self._packed.product
            return product(rows[0].to(product.dtype))[None]
        logits: torch.Tensor = self.output(rows)
        return logits

    def _embed_as_written(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run the model's own forward up to its first layer, and take what that is given."""
        stand = _Stand(None)
        with _layers_replaced(self._base, stand), suppress(_ReachedLayers):
            self._base(input_ids=token_ids, position_ids=torch.zeros_like(token_ids), use_cache=False)
        assert stand.received is not None, "the model calls its layers"
        return stand.received

    def _head_as_written(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the model's own forward with one layer that puts out `hidden`, whatever it is given."""
        positions = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with _layers_replaced(self._base, _Stand(hidden)):
            logits: torch.Tensor = self._model(inputs_embeds=hidden, position_ids=positions, use_cache=False).logits
        return logits

    def _names(self) -> tuple[set[str], set[str]]:
        embedding = self._model.get_input_embeddings().weight
        outside = {
            name: value
            for name, value in self._model.state_dict(keep_vars=True).items()
            if architecture.layer_of(name) is None
        }
        entry = {name for name, value in outside.items() if value is embedding}
        head = outside.keys() - entry
        if self.tied:
            # One tensor under two names: both ends ask for it by the embedding's.
            output = self._model.get_output_embeddings().weight
            names = [name for name, value in self._model.named_parameters(remove_duplicate=False) if value is output]
            stored = next(name for name in names if "embed" in name)
            return {stored}, (head - set(names)) | {stored}
        return entry, set(head)


class _ReachedLayers(Exception):
    """The model's forward has come to its first layer."""


class _Stand(nn.Module):
    """Stands in for all decoder layers: puts out `result`, or keeps what it is given and ends the forward."""

    def __init__(self, result: torch.Tensor | None) -> None:
        super().__init__()
        self.received: torch.Tensor | None = None
        self._result = result

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self._result is None:
            self.received = hidden_states
            raise _ReachedLayers
        return self._result


class _layers_replaced:  # noqa: N801 - reads as what it does in a `with`
    """Let `base` see `stand` as its only layer."""

    def __init__(self, base: Any, stand: _Stand) -> None:
        self._base, self._stand, self._layers = base, stand, base._modules["layers"]

    def __enter__(self) -> None:
        self._base._modules["layers"] = nn.ModuleList([self._stand])

    def __exit__(self, *_: object) -> None:
        self._base._modules["layers"] = self._layers

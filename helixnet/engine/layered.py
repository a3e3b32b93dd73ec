"""A transformers model of which only some parts have weights: entry (embedding), layers, exit (norm and head)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from helixnet.core.errors import CorruptCheckpoint, ModelError
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.engine.attention import ATTENTION_NAME, attend
from helixnet.engine.base import Progress
from helixnet.engine.fitness import refuse_unfit
from helixnet.engine.fused import PROBE_TOKENS, TOLERANCE, FusedLayer, distance, fuse, rotation_of
from helixnet.engine.kv import KvPool
from helixnet.engine.products import Product, column_wise, has_own_form, kept_bytes
from helixnet.engine.weights import architecture
from helixnet.engine.weights.prepared import PreparedModel
from helixnet.engine.weights.source import WeightSource

Part = int | Literal["entry", "exit"]
"""A layer number, or one of the two ends."""


class LayeredModel:
    """Built on the meta device; `load` gives parts their tensors, `drop` takes them away again."""

    def __init__(self, prepared: PreparedModel, device: torch.device) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, attend)
        manifest = prepared.manifest
        model_class = architecture.load_class(prepared.record.modeling_module, manifest.architecture)
        config = model_class.config_class.from_dict(copy.deepcopy(prepared.config))
        self._model = architecture.build_skeleton(model_class, config, manifest.dtype, ATTENTION_NAME)
        self._base = self._model.base_model
        self._device = device
        self._layers: Any = getattr(self._base, "layers", None)
        self._rotary: Any = getattr(self._base, "rotary_emb", None)
        if self._layers is None or self._rotary is None or len(self._layers) != manifest.layers:
            raise ModelError(
                f"{manifest.architecture} is not built of uniform rotary decoder layers; this version cannot split it"
            )
        self._layer_types = list(getattr(config, "layer_types", None) or [None] * manifest.layers)
        self._rotary_by_type = "layer_type" in inspect.signature(type(self._rotary).forward).parameters
        self._tied = architecture.is_tied(self._model)
        # Names, shapes and dtypes never change; walking the module tree for them takes milliseconds each time.
        self._described = {name: _Tensor(value) for name, value in self._model.state_dict(keep_vars=True).items()}
        self._embedding_names, self._head_names = self._end_names()
        self._names = self._names_by_part()
        output = self._model.get_output_embeddings().weight
        stored = {name for name in self._head_names if self._model.get_parameter(name) is output}
        self._projection_name = next(iter(stored), None)
        _fill_buffers(self._model, device)
        self.held: set[Part] = set()
        self._fused: dict[int, FusedLayer] = {}
        self._fit: set[tuple[type, Any]] = set()
        """Kinds of layers that were tried."""
        self._probe_pool = KvPool(manifest.kv_heads, manifest.head_dim, getattr(torch, manifest.dtype), device)
        self._embed: Callable[[torch.Tensor], torch.Tensor] = self._embed_as_written
        self._head: Callable[[torch.Tensor], torch.Tensor] = self._head_as_written
        self._project: Product | None = None
        """The head's matrix in a form of its own, where the one it is stored in is slow."""
        self._freed: set[str] = set()
        """Stored forms that nothing needs beside that."""

    def bytes_of(self, parts: Iterable[Part]) -> int:
        """Memory the parts' tensors take together; a tied head counts once, unless it has a form of its own."""
        parts = set(parts)
        total = sum(self._kept_bytes(name) for name in {name for part in parts for name in self._names[part]})
        if self._packs_head and self._tied and {"entry", "exit"} <= parts and self._projection_name is not None:
            total += self._described[self._projection_name].bytes  # the embedding beside the head
        return total

    @property
    def weight_factor(self) -> float:
        """What layers and head take in memory, by what they have as they are stored; at least 1."""
        names = [name for part, each in self._names.items() if part != "entry" for name in each]
        return max(1.0, sum(map(self._kept_bytes, names)) / sum(self._described[name].bytes for name in names))

    def _kept_bytes(self, name: str) -> int:
        """What a tensor takes in the form that is computed with."""
        tensor = self._described[name]
        multiplies = name == self._projection_name or architecture.layer_of(name) is not None
        if not multiplies or len(tensor.shape) != 2:
            return tensor.bytes
        return kept_bytes(*tensor.shape, self._device, tensor.dtype)

    def read(
        self, parts: Iterable[Part], source: WeightSource, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors that the parts lack, by name. Changes nothing, so layers may run meanwhile."""
        from helixnet.engine.weights.convert import read_parameters

        parts = list(parts)
        present = {name for part in self.held for name in self._names[part]} - self._freed
        wanted = {name for part in parts for name in self._names[part]} - present
        total, done = sum(self._described[name].bytes for name in wanted), 0
        loaded: dict[str, torch.Tensor] = {}
        for name, tensor in read_parameters(source, self._model, wanted):
            expected = self._described[name]
            if tensor.shape != expected.shape:
                raise CorruptCheckpoint(f"{name} has shape {tuple(tensor.shape)}, the config says {expected.shape}")
            tensor = tensor.to(self._device, expected.dtype).contiguous()
            loaded[name] = column_wise(tensor) if name == self._projection_name else tensor
            done += expected.bytes
            if progress is not None:
                progress(done, total)
        missing = wanted - loaded.keys()
        if missing:
            raise CorruptCheckpoint(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} among them")
        return loaded

    def attach(self, parts: Iterable[Part], loaded: dict[str, torch.Tensor]) -> None:
        """Give the parts the tensors that `read` brought; empties `loaded`."""
        parts = list(parts)
        self._assign(loaded)
        self._freed -= loaded.keys()
        loaded.clear()  # so that fusing frees each layer's separate matrices as it joins them
        self.held.update(parts)
        try:
            self._refuse_unfit(part for part in parts if isinstance(part, int))
        except ModelError:
            self.drop(parts)
            raise
        self._choose_ends(parts)
        self._fuse([part for part in parts if isinstance(part, int)])

    def drop(self, parts: Iterable[Part]) -> None:
        """Free the parts' tensors; what a remaining part shares with them (a tied head) stays."""
        gone = set(parts) & self.held
        self.held -= gone
        self._fused = {layer: fused for layer, fused in self._fused.items() if layer not in gone}
        kept = {name for part in self.held for name in self._names[part]}
        names = {name for part in gone for name in self._names[part]} - kept
        self._assign({name: self._described[name].without_memory() for name in names})
        if "exit" in gone:
            self._project, self._head = None, self._head_as_written
        self._freed -= names
        self._free_projection()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What layer 0 receives for `token_ids` [tokens]: [1, tokens, hidden_size]."""
        return self._embed(token_ids[None])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits [rows, vocab] for what the last layer put out [rows, hidden_size]."""
        return self._head(hidden[None])[0]

    def run_layers(self, layers: Iterable[int], hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`hidden` [1, tokens, hidden_size] through decoder layers, inside a running `attention.Step`.

        Rotary cosines and sines for `positions` [1, tokens] are computed once per kind of layer.
        """
        plain: dict[Any, Any] = {}
        signed: dict[Any, Any] = {}
        for layer in layers:
            kind = self._layer_types[layer] if self._rotary_by_type else None
            if kind not in plain:
                plain[kind] = self._rotations(hidden, positions, kind)
            fused = self._fused.get(layer)
            if fused is None:
                hidden = self._run_plainly(layer, hidden, positions, plain[kind])
                continue
            of = kind, fused.dtype
            if of not in signed:
                signed[of] = rotation_of(plain[kind], fused.dtype)
            hidden = fused.run(hidden, signed[of])
        return hidden

    def _rotations(self, hidden: torch.Tensor, positions: torch.Tensor, kind: Any) -> Any:
        return self._rotary(hidden, positions, kind) if self._rotary_by_type else self._rotary(hidden, positions)

    def _run_plainly(
        self, layer: int, hidden: torch.Tensor, positions: torch.Tensor, rotation: Any, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's own code; our attention needs no mask."""
        output = self._layers[layer].forward(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
            use_cache=False,
            position_embeddings=rotation,
        )
        return output[0] if isinstance(output, tuple) else output

    def _refuse_unfit(self, layers: Iterable[int]) -> None:
        """Raises ModelError if layers of a kind not seen before cannot be run by us."""
        self._probe_pool.resize(1)
        for layer in layers:
            kind = type(self._layers[layer]), self._layer_types[layer]
            if kind in self._fit:
                continue

            def run(
                hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, layer: int = layer
            ) -> torch.Tensor:
                rotation = self._rotations(hidden, positions, self._layer_types[layer])
                return self._run_plainly(layer, hidden, positions, rotation, mask)

            size = self._model.config.hidden_size
            refuse_unfit(type(self._model).__name__, self._model.config, layer, run, self._probe_pool, size)
            self._fit.add(kind)

    def _fuse(self, layers: Iterable[int]) -> None:
        """Find out which layers may run fused (see `fused`)."""
        self._probe_pool.resize(-(-PROBE_TOKENS // PAGE_TOKENS))
        positions = torch.arange(PROBE_TOKENS, device=self._device)[None]
        hidden = torch.zeros((1, 1, 1), dtype=self._probe_pool.k.dtype, device=self._device)
        for layer in layers:
            rotation = self._rotations(hidden, positions, self._layer_types[layer])
            run = partial(self._run_plainly, layer, positions=positions, rotation=rotation)
            fused = fuse(self._layers[layer], layer, run, rotation, self._probe_pool)
            if fused is not None:
                self._fused[layer] = fused

    def _end_names(self) -> tuple[set[str], set[str]]:
        embedding = self._model.get_input_embeddings().weight
        outside = {
            name: value
            for name, value in self._model.state_dict(keep_vars=True).items()
            if architecture.layer_of(name) is None
        }
        entry = {name for name, value in outside.items() if value is embedding}
        head = outside.keys() - entry
        if self._tied:
            # One tensor under two names: both ends ask for it by the embedding's.
            output = self._model.get_output_embeddings().weight
            names = [name for name, value in self._model.named_parameters(remove_duplicate=False) if value is output]
            stored = next(name for name in names if "embed" in name)
            return {stored}, (head - set(names)) | {stored}
        return entry, set(head)

    def _names_by_part(self) -> dict[Part, list[str]]:
        names: dict[Part, list[str]] = {"entry": sorted(self._embedding_names), "exit": sorted(self._head_names)}
        for name in self._described:
            layer = architecture.layer_of(name)
            if layer is not None:
                names.setdefault(layer, []).append(name)
        return names

    def _assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
                continue
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            if self._tied and name in self._embedding_names:
                self._model.get_output_embeddings().weight = module._parameters[leaf]

    def _choose_ends(self, parts: Iterable[Part]) -> None:
        """Call embedding and head directly where that gives exactly what the model's own forward gives.

        Families differ here (embedding multiplier, logit scaling, soft cap); the forward is always right,
        and costs half a millisecond of bookkeeping a token.
        """
        with torch.inference_mode():
            if "entry" in parts:
                ids = torch.arange(PROBE_TOKENS, device=self._device)[None]
                plain = self._model.get_input_embeddings()
                self._embed = plain if torch.equal(plain(ids), self._embed_as_written(ids)) else self._embed_as_written
            if "exit" in parts:
                self._choose_head()
        self._free_projection()

    def _choose_head(self) -> None:
        output = self._model.get_output_embeddings()
        size = self._model.config.hidden_size
        probe = torch.linspace(-2, 2, PROBE_TOKENS * size, device=self._device).view(1, PROBE_TOKENS, size)
        probe = probe.to(output.weight.dtype)
        expected = self._head_as_written(probe)
        self._project = Product(output.weight, output.bias) if self._packs_head else None
        tolerance = TOLERANCE[output.weight.dtype] if self._project is not None else 0.0
        same = distance(self._head_plainly(probe), expected) <= tolerance
        self._head = self._head_plainly if same else self._head_as_written
        if not same:
            self._project = None

    def _free_projection(self) -> None:
        """The head's matrix as it was stored goes where nothing needs it."""
        name = self._projection_name
        copied = self._project is not None and self._project.is_copy
        if copied and name is not None and not (self._tied and "entry" in self.held):
            self._assign({name: self._described[name].without_memory()})
            self._freed.add(name)

    @property
    def _packs_head(self) -> bool:
        """Whether the head gets a form of its own. In float32 a layout of the stored one is as good (`column_wise`)."""
        stored = self._probe_pool.k.dtype
        return stored != torch.float32 and has_own_form(self._device, stored)

    def _head_plainly(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = getattr(self._base, "norm", None)
        rows = hidden if norm is None else norm(hidden)
        if self._project is not None:
            return self._project(rows[0].to(self._project.dtype))[None]
        logits: torch.Tensor = self._model.get_output_embeddings()(rows)
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


class _Tensor:
    """What a parameter will be like once it is loaded."""

    def __init__(self, value: torch.Tensor) -> None:
        self.shape, self.dtype = tuple(value.shape), value.dtype
        self.bytes = value.numel() * value.element_size()

    def without_memory(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


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


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers no checkpoint holds (rotary frequencies, embedding scales), as transformers itself does."""
    saved = set(model.state_dict())
    for prefix, module in model.named_modules():
        computed = [name for name in module._buffers if f"{prefix}.{name}".lstrip(".") not in saved]
        if not computed:
            continue
        for name in computed:
            module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device=device)
        with torch.no_grad():
            model._init_weights(module)
        for name in computed:
            if torch.isnan(module._buffers[name]).any():
                raise ModelError(f"transformers does not say how to fill {prefix}.{name}; this model cannot be split")

"""A transformers model of which only some parts have weights: entry (embedding), layers, exit (norm and head)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from helixnet.core.errors import CorruptCheckpoint, ModelError
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.engine import fitness
from helixnet.engine.attention import ATTENTION_NAME, attend
from helixnet.engine.base import Progress
from helixnet.engine.ends import Ends, Part
from helixnet.engine.fused import PROBE_TOKENS, FusedLayer, fuse, rotation_of
from helixnet.engine.kv import KvPool
from helixnet.engine.linears import Replaced
from helixnet.engine.products import column_wise, kept_bytes
from helixnet.engine.quantized import Quantized, quantize
from helixnet.engine.weights import architecture, keeping
from helixnet.engine.weights.keeping import DENSE, STORED, form_bytes
from helixnet.engine.weights.prepared import PreparedModel, gguf_types
from helixnet.engine.weights.source import WeightSource

Matrix = torch.Tensor | Quantized


class LayeredModel:
    """Built on the meta device; `load` gives parts their tensors, `drop` takes them away again."""

    def __init__(self, prepared: PreparedModel, device: torch.device) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, attend)
        manifest = prepared.manifest
        if manifest.quantization and not keeping.is_ours(manifest.quantization):
            raise ModelError(
                f"{manifest.name} came quantized by {manifest.quantization}, which only vLLM computes with: serve it "
                "with --engine vllm, or serve the original"
            )
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
        # Names, shapes and dtypes never change; walking the module tree for them takes milliseconds each time.
        self._described = {
            name: _Tensor(value, self._model.get_submodule(name.rpartition(".")[0]))
            for name, value in self._model.state_dict(keep_vars=True).items()
        }
        self._ends = Ends(self._model, device)
        self._names = self._names_by_part()
        architecture.fill_buffers(self._model, device)
        self.held: set[Part] = set()
        shapes, quantization = architecture.layer_linears(self._model), manifest.quantization
        self._linears = {name: cast(nn.Linear, self._described[name].owner) for name in shapes}
        self._forms = keeping.forms(shapes, quantization, gguf_types(prepared.record))
        self._takes_stored = quantization == STORED
        self._fused: dict[int, FusedLayer] = {}
        self._replaced: dict[int, Replaced] = {}
        self._fit: set[tuple[type, Any]] = set()
        """Kinds of layers that were tried."""
        self._probe_pool = KvPool(manifest.kv_heads, manifest.head_dim, getattr(torch, manifest.dtype), device)
        self._freed: set[str] = set()
        """The head's matrix, where nothing needs it beside the form that it is multiplied in."""

    def bytes_of(self, parts: Iterable[Part]) -> int:
        """Memory the parts' tensors take together; a tied head counts once, unless it has a form of its own."""
        parts = set(parts)
        total = sum(self._kept_bytes(name) for name in {name for part in parts for name in self._names[part]})
        name = self._ends.projection
        if self._ends.packs_head and self._ends.tied and {"entry", "exit"} <= parts and name is not None:
            total += self._described[name].bytes  # the embedding beside the head
        return total

    @property
    def weight_factor(self) -> float:
        """What layers and head take in memory, by what they have as they are stored; at least 1."""
        names = [name for part, each in self._names.items() if part != "entry" for name in each]
        return max(1.0, sum(map(self._kept_bytes, names)) / sum(map(self._stored_bytes, names)))

    def _stored_bytes(self, name: str) -> int:
        """What the manifest counts for a tensor."""
        tensor = self._described[name]
        return form_bytes(self._forms.get(name, DENSE), tensor.shape, tensor.dtype.itemsize)

    def _kept_bytes(self, name: str) -> int:
        """What it takes in the form that is computed with."""
        tensor = self._described[name]
        if self._forms.get(name) or (name not in self._linears and name != self._ends.projection):
            return self._stored_bytes(name)
        outputs, inputs = tensor.shape
        return kept_bytes(outputs, inputs, self._device, tensor.dtype)

    def read(self, parts: Iterable[Part], source: WeightSource, progress: Progress | None = None) -> dict[str, Matrix]:
        """The tensors that the parts lack, by name. Changes nothing, so layers may run meanwhile."""
        parts = list(parts)
        present = {name for part in self.held for name in self._names[part]} - self._freed
        wanted = {name for part in parts for name in self._names[part]} - present
        total, done = sum(map(self._stored_bytes, wanted)), 0
        loaded: dict[str, Matrix] = {}
        for name, tensor in self._read(wanted, source):
            loaded[name] = tensor
            done += self._stored_bytes(name)
            if progress is not None:
                progress(done, total)
        missing = wanted - loaded.keys()
        if missing:
            raise CorruptCheckpoint(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} among them")
        return loaded

    def _read(self, wanted: set[str], source: WeightSource) -> Iterator[tuple[str, Matrix]]:
        """One by one, in the form that they are kept in."""
        from helixnet.engine.weights.convert import read_parameters

        as_stored = sorted(name for name in wanted if self._forms.get(name) and self._takes_stored)
        for name in as_stored:
            found = source.kept(name)
            if found is not None:
                wanted = wanted - {name}
                yield name, found.to(self._device)
        for name, tensor in read_parameters(source, self._model, wanted):
            expected, form = self._described[name], self._forms.get(name)
            if tensor.shape != expected.shape:
                raise CorruptCheckpoint(f"{name} has shape {tuple(tensor.shape)}, the config says {expected.shape}")
            tensor = tensor.to(self._device, expected.dtype).contiguous()
            if form:
                yield name, quantize(tensor, form)
            else:
                yield name, column_wise(tensor) if name == self._ends.projection else tensor

    def attach(self, parts: Iterable[Part], loaded: dict[str, Matrix]) -> None:
        """Give the parts the tensors that `read` brought; empties `loaded`.

        Raises ModelError if they cannot be run by us; then nothing has changed.
        """
        parts = list(parts)
        quantized = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Quantized)}
        self._assign({name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)})
        self._freed -= loaded.keys()
        loaded.clear()  # so that each layer's separate matrices are freed as they are joined
        self.held.update(parts)
        self._probe_pool.resize(-(-max(PROBE_TOKENS, fitness.TOKENS) // PAGE_TOKENS))
        try:
            for layer in sorted(part for part in parts if isinstance(part, int)):
                names = [name for name in self._names[layer] if name in quantized]
                self._settle(layer, {self._linears[name]: quantized.pop(name) for name in names})
        except ModelError:
            self.drop(parts)
            raise
        self._ends.settle(parts)
        self._free_projection()

    def drop(self, parts: Iterable[Part]) -> None:
        """Free the parts' tensors; what a remaining part shares with them (a tied head) stays."""
        gone = set(parts) & self.held
        self.held -= gone
        for layer in [layer for layer in self._replaced if layer in gone]:
            self._replaced.pop(layer).restore()
        self._fused = {layer: fused for layer, fused in self._fused.items() if layer not in gone}
        kept = {name for part in self.held for name in self._names[part]}
        names = {name for part in gone for name in self._names[part]} - kept
        self._assign({name: self._described[name].without_memory() for name in names})
        self._ends.drop(gone)
        self._freed -= names
        self._free_projection()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What layer 0 receives for `token_ids` [tokens]: [1, tokens, hidden_size]."""
        return self._ends.embed(token_ids[None])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits [rows, vocab] for what the last layer put out [rows, hidden_size]."""
        return self._ends.head(hidden[None])[0]

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
            if kind not in signed:
                signed[kind] = rotation_of(plain[kind], fused.dtype)
            hidden = fused.run(hidden, signed[kind])
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

    def _settle(self, layer: int, kept: dict[nn.Linear, Quantized]) -> None:
        """Try whether a layer can be run by us, and find the fastest way to; `kept` are its quantized matrices."""
        for linear, quantized in kept.items():
            linear.weight = nn.Parameter(quantized.dense().to(self._probe_pool.k.dtype), requires_grad=False)
        kind = type(self._layers[layer]), self._layer_types[layer]
        if kind not in self._fit:
            self._refuse_unfit(layer)
            self._fit.add(kind)
        positions = torch.arange(PROBE_TOKENS, device=self._device)[None]
        hidden = torch.zeros((1, 1, 1), dtype=self._probe_pool.k.dtype, device=self._device)
        rotation = self._rotations(hidden, positions, self._layer_types[layer])
        run = partial(self._run_plainly, layer, positions=positions, rotation=rotation)
        fused = fuse(self._layers[layer], layer, run, rotation, self._probe_pool, kept)
        if fused is not None:
            self._fused[layer] = fused
        else:
            self._replaced[layer] = Replaced(self._layers[layer], kept)

    def _refuse_unfit(self, layer: int) -> None:
        def run(hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            rotation = self._rotations(hidden, positions, self._layer_types[layer])
            return self._run_plainly(layer, hidden, positions, rotation, mask)

        config = self._model.config
        fitness.refuse_unfit(type(self._model).__name__, config, layer, run, self._probe_pool, config.hidden_size)

    def _names_by_part(self) -> dict[Part, list[str]]:
        names: dict[Part, list[str]] = {"entry": sorted(self._ends.entry_names), "exit": sorted(self._ends.exit_names)}
        for name in self._described:
            layer = architecture.layer_of(name)
            if layer is not None:
                names.setdefault(layer, []).append(name)
        return names

    def _assign(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            module, leaf = self._described[name].owner, name.rpartition(".")[2]
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
                continue
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            if self._ends.tied and name in self._ends.entry_names:
                self._ends.output.weight = module._parameters[leaf]

    def _free_projection(self) -> None:
        """The head's matrix as it was stored goes where nothing needs it."""
        name = self._ends.projection
        if self._ends.has_copy and name is not None and not (self._ends.tied and "entry" in self.held):
            self._assign({name: self._described[name].without_memory()})
            self._freed.add(name)


class _Tensor:
    """What a parameter will be like once it is loaded."""

    def __init__(self, value: torch.Tensor, owner: nn.Module) -> None:
        self.owner = owner
        """Whose it is, also while another module stands in its place."""
        self.shape, self.dtype = tuple(value.shape), value.dtype
        self.bytes = value.numel() * value.element_size()

    def without_memory(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

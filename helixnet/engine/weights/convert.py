"""From a checkpoint's tensor names to the module's parameters: transformers' own renamings and conversions."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch

from helixnet.core.errors import CorruptCheckpoint
from helixnet.engine.weights import architecture
from helixnet.engine.weights.source import WeightSource


def read_parameters(source: WeightSource, model: Any, wanted: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The `wanted` parameters of the skeleton `model`, one at a time, as the module calls and shapes them."""
    if source.native_names:
        available = source.shapes()
        yield from source.read(sorted(name for name in wanted if name in available))
        return
    for target, group in plan(source, model).items():
        if not group.converter and target in wanted:
            yield from ((target, tensor) for _, tensor in source.read(group.names))
        elif group.converter and group.outputs & set(wanted):
            for name, tensor in group.convert(source, model):
                if name in wanted:
                    yield name, tensor


class Group:
    """Checkpoint tensors that become one parameter, or several that are made together (split or fused weights)."""

    def __init__(self, target: str, converter: Any | None) -> None:
        self.target = target
        self.converter = copy.deepcopy(converter) if converter is not None else None
        self.names: list[str] = []
        self.patterns: list[str] = []
        self.outputs: set[str] = {target}

    def add(self, name: str, pattern: str | None) -> None:
        """One more checkpoint tensor of this group, matched by the converter's source `pattern`."""
        self.names.append(name)
        if self.converter is not None and pattern is not None:
            self.patterns.append(pattern)
            first = self.converter.target_patterns[0]
            self.outputs |= {self.target.replace(first, other) for other in self.converter.target_patterns}

    def convert(self, source: WeightSource, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the group's tensors and run transformers' conversion on them."""
        assert self.converter is not None
        patterns = dict(zip(self.names, self.patterns, strict=True))
        for name, tensor in source.read(self.names):
            self.converter.add_tensor(self.target, name, patterns[name], tensor)
        try:
            made = self.converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptCheckpoint(f"the tensors of {self.target} do not fit together ({error})") from error
        for name, tensor in made.items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor


def plan(source: WeightSource, model: Any) -> dict[str, Group]:
    """Target parameter -> the checkpoint tensors it is made of. Tensors the module has no use for are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(source.shapes(), key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            converter = by_pattern[pattern] if pattern is not None else None
            groups.setdefault(target, Group(target, converter)).add(name, pattern)
    return groups


def decoder_names(source: WeightSource, model: Any) -> Iterator[tuple[str, str]]:
    """The decoder's tensors as they are stored, and as a checkpoint of the decoder alone would call them.

    Also those that the module has no use for, such as scales of matrices that came quantized; but not those of the
    rest of a larger model.
    """
    names = list(source.shapes())
    if source.native_names:
        yield from zip(names, names, strict=True)
        return
    groups = plan(source, model)
    known = {name for group in groups.values() for name in group.names}
    # The embedding is one tensor in all families that can be loaded; what stands before it stands before all.
    embedding = model.get_input_embeddings().weight
    target = next(name for name, value in model.named_parameters() if value is embedding)
    if target not in groups:
        raise CorruptCheckpoint(f"the checkpoint has no {target}")
    before, after = _beginnings(groups[target].names[0], target)
    for name in names:
        if name in known or (name.startswith(before) and architecture.layer_of(name) is not None):
            yield name, after + name.removeprefix(before)


def stored_sizes(source: WeightSource, model: Any) -> tuple[int, int, int]:
    """Bytes of (the largest layer, embedding, the rest) of a checkpoint whose matrices came quantized."""
    stored, layers, ends = source.stored_bytes(), dict.fromkeys(range(model.config.num_hidden_layers), 0), [0, 0]
    for name, called in decoder_names(source, model):
        layer = architecture.layer_of(called)
        if layer is not None:
            layers[layer] += stored[name]
        else:
            ends["embed" not in called] += stored[name]
    empty = [layer for layer, size in layers.items() if not size]
    if empty:
        raise CorruptCheckpoint(f"the checkpoint has nothing of layer {empty[0]}")
    embedding, head = ends
    return max(layers.values()), embedding, head + (embedding if architecture.is_tied(model) else 0)


def missing_parameters(source: WeightSource, model: Any) -> list[str]:
    """Parameters of `model` the checkpoint does not provide; a tied head needs none of its own."""
    made = {name for group in plan(source, model).values() for name in group.outputs}
    every = model.state_dict(keep_vars=True)
    embedding = model.get_input_embeddings().weight
    tied = {name for name, value in every.items() if value is embedding} if architecture.is_tied(model) else set()
    if tied & made:
        made |= tied
    return sorted(set(every) - made)


def _beginnings(stored: str, target: str) -> tuple[str, str]:
    """Where two names of one tensor differ."""
    while stored and target and stored[-1] == target[-1]:
        stored, target = stored[:-1], target[:-1]
    return stored, target


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 10 comes after expert 9: fused experts are stacked in this order."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"(\d+)", name)]

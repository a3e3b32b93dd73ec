"""Tensors of a GGUF file, dequantized one by one, under the names of the transformers module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helixnet.core.errors import CorruptCheckpoint
from helixnet.engine.weights.prepared import GgufIndex, GgufTensor

PLAIN_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""GGML types that hold values rather than quantized blocks."""


class GgufSource:
    """Reads by the index made when the model was prepared: the file's header is not parsed again."""

    native_names = True

    def __init__(self, path: Path, index: GgufIndex) -> None:
        self._path = path
        self._index = index
        self._parts: dict[str, list[GgufTensor]] = {}
        for tensor in index.tensors:
            self._parts.setdefault(tensor.target, []).append(tensor)
        self._data = np.memmap(path, mode="r", dtype=np.uint8)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._index.shapes

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processor = TENSOR_PROCESSORS.get(self._index.architecture, TensorProcessor)(config=self._index.config)
        for name in names:
            tensor = self._assemble(name, processor)
            if tuple(tensor.shape) != self._index.shapes[name]:
                raise CorruptCheckpoint(
                    f"{name} in {self._path} has shape {tuple(tensor.shape)}, not {self._index.shapes[name]}"
                )
            yield name, tensor

    def _assemble(self, name: str, processor: Any) -> torch.Tensor:
        """One parameter. Experts come in several GGUF tensors, which transformers' processor puts together itself."""
        collected: dict[str, Any] = {"tensors": {}}
        targets = {tensor.name.removesuffix(".weight"): name for tensor in self._parts[name]}
        for part in self._parts[name]:
            result = processor.process(
                weights=self._dequantize(part),
                name=part.name,
                tensor_key_mapping=targets | {part.name: name},
                parsed_parameters=collected,
            )
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights))
        if name not in collected["tensors"]:
            raise CorruptCheckpoint(f"{self._path} does not hold all of {name}")
        whole: torch.Tensor = collected["tensors"][name]
        return whole

    def _dequantize(self, part: GgufTensor) -> np.ndarray:
        from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

        raw = self._data[part.offset : part.offset + part.bytes]
        if raw.size != part.bytes:
            raise CorruptCheckpoint(f"{self._path} ends before {part.name}; it is cut short")
        # The map is read-only and torch wants to own its memory: this copy is what reads the file.
        data = torch.from_numpy(np.array(raw))
        if part.type in PLAIN_TYPES:
            values = data.view(PLAIN_TYPES[part.type]).to(torch.float32)
        elif part.type in GGML_BLOCK:
            values = dequantize(data.reshape(part.stored_shape), part.type)
        else:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize as dequantize_slowly

            kind = GGMLQuantizationType(part.type)
            return dequantize_slowly(data.numpy().reshape(part.stored_shape), kind)
        return values.reshape(part.shape).numpy()

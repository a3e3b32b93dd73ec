"""Tensors of a GGUF file, dequantized one by one, under the names of the transformers module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helixnet.core.errors import CorruptCheckpoint
from helixnet.engine.quantized import Quantized
from helixnet.engine.weights.keeping import GGUF_INT4
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

    def stored_bytes(self) -> Mapping[str, int]:
        return {name: sum(part.bytes for part in parts) for name, parts in self._parts.items()}

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

    def kept(self, name: str) -> Quantized | None:
        parts = self._parts[name]
        if len(parts) != 1 or parts[0].type not in GGUF_INT4:
            return None
        from helixnet.engine.weights.gguf_blocks import as_int4

        (part,) = parts
        rows = self._row_order(part)
        if rows is None:
            return None
        outputs, inputs = part.shape
        return as_int4(self._raw(part).reshape(outputs, -1), part.type, inputs, rows)

    def _row_order(self, part: GgufTensor) -> torch.Tensor | None:
        """Which stored row becomes which, in the order of the module's; None if more than that is done to the tensor.

        Llama's queries and keys are stored in another order than transformers has them.
        """
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processor = TENSOR_PROCESSORS.get(self._index.architecture, TensorProcessor)(config=self._index.config)
        numbers = np.arange(part.shape[0], dtype=np.float32)[:, None]
        key = {part.name.removesuffix(".weight"): part.target, part.name: part.target}
        result = processor.process(
            weights=numbers, name=part.name, tensor_key_mapping=key, parsed_parameters={"tensors": {}}
        )
        order = np.asarray(result.weights)
        if order.shape != numbers.shape or not np.array_equal(np.sort(order, axis=0), numbers):
            return None
        return torch.from_numpy(order[:, 0].astype(np.int64))

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

    def _raw(self, part: GgufTensor) -> torch.Tensor:
        """Its bytes, flat."""
        raw = self._data[part.offset : part.offset + part.bytes]
        if raw.size != part.bytes:
            raise CorruptCheckpoint(f"{self._path} ends before {part.name}; it is cut short")
        # The map is read-only and torch wants to own its memory: this copy is what reads the file.
        return torch.from_numpy(np.array(raw))

    def _dequantize(self, part: GgufTensor) -> np.ndarray:
        from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

        data = self._raw(part)
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

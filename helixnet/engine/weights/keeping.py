"""In which form the matrices of layers are kept in memory: as numbers of the served dtype, or in 8 or 4 bits.

That is part of a model's identity: what a peer computes depends on it. Embedding, head, norms and experts stay as they
are. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from helixnet.core.errors import UsageError

DENSE, INT8, INT4 = "", "int8", "int4"
STORED = "stored"
"""As a GGUF file has them, where that is 4 bits with a scale and an offset for each `GROUP`."""
QUANTIZATIONS = (INT8, INT4, STORED)
QUANTIZE_HELP = "keep matrices in fewer bits: int8, int4, or stored (the 4 bits that a GGUF file has them in)"
ADAPTER_HELP = "folder of a LoRA adapter (PEFT, safetensors) to merge into the weights"
GROUP = 32
"""Numbers of a row that share scale and offset in 4 bits: as in GGUF files, and the fewest that torch computes with."""
ROWS_UNIT = 16
"""torch's product in 4 bits takes matrices of a multiple of so many outputs."""
QUANTIZED_DTYPE = "bfloat16"
"""What torch's products with such matrices are fast in."""
GGUF_INT4 = {2: "Q4_0", 3: "Q4_1", 12: "Q4_K"}
"""GGML types that are 4 bits, scale and offset."""


def is_ours(quantization: str) -> bool:
    """Whether it is we who keep matrices so; else the checkpoint came quantized, and vLLM has to know how."""
    return quantization in QUANTIZATIONS


def form_of(quantization: str, shape: tuple[int, ...], gguf_type: int | None = None) -> str:
    """How a layer's matrix [outputs, inputs] is kept: DENSE, INT8 or INT4."""
    if quantization == INT8:
        return INT8
    divides = shape[0] % ROWS_UNIT == 0 and shape[1] % GROUP == 0
    wanted = quantization == INT4 or (quantization == STORED and gguf_type in GGUF_INT4)
    return INT4 if wanted and divides else DENSE


def form_bytes(form: str, shape: tuple[int, ...], width: int) -> int:
    """Memory of a tensor in this form; `width` bytes a number if it is dense."""
    count = 1
    for side in shape:
        count *= side
    if form == INT8:
        return count + 2 * shape[0]
    if form == INT4:
        return count // 2 + count // GROUP * 4
    return count * width


def check(quantization: str, dtype: str) -> None:
    """Raises UsageError for what cannot be."""
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"weights are kept as {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    if dtype != QUANTIZED_DTYPE:
        raise UsageError(f"weights kept as {quantization} are served in {QUANTIZED_DTYPE}, not in {dtype}")


def forms(linears: Mapping[str, tuple[int, ...]], quantization: str, types: Mapping[str, int]) -> dict[str, str]:
    """The form of each of a model's layer matrices, by name; `types` are those of a GGUF file."""
    return {name: form_of(quantization, shape, types.get(name)) for name, shape in linears.items()}

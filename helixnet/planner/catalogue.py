"""Devices by their makers' published figures, for plans about machines that nobody has measured yet.

The figures were entered by hand and not yet compared with the sheets one by one: correct them where you know better.
A real swarm never reads this: peers measure themselves. What is derived from it is called `catalogue` wherever it is
shown. Rates follow a roofline (a layer takes as long as reading its weights or doing its arithmetic, whichever is
longer) with a stated share of what the sheet promises.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from helixnet.core.errors import UsageError
from helixnet.core.model import DTYPE_BYTES, Manifest
from helixnet.core.swarm.capability import Capability, RatePoint

FLOPS_SHARE = 0.5
"""Of a sheet's FLOP/s, what matrix products of a decoder layer reach."""
BANDWIDTH_SHARE = 0.7
"""Of a sheet's bytes/s, what reading the weights of a layer reaches."""
MEMORY_SHARE = 0.9
"""Of a device's memory, what weights and KV may have; the rest is for activations, kernels and the screen."""
LAYER_S = 50e-6
"""What a layer takes however little there is to do: about ten kernels are started."""
DECODE_BATCHES = (1, 4, 16, 64)
PREFILL_TOKENS = (32, 128, 512, 2048)
GB = 10**9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as its data sheet has it."""

    name: str
    """As a person would name it."""
    tflops: float
    """Dense bf16 (fp16 before Ampere) products with fp32 sums, 10^12 FLOP/s."""
    memory_gb: float
    bandwidth_gb: float
    """GB/s."""


GPUS: dict[str, Gpu] = {
    # NVIDIA GeForce: GA10x, Ada and Blackwell architecture papers; memory of the usual version.
    "rtx3060": Gpu("GeForce RTX 3060", 25.6, 12, 360),
    "rtx3060ti": Gpu("GeForce RTX 3060 Ti", 32.4, 8, 448),
    "rtx3070": Gpu("GeForce RTX 3070", 40.6, 8, 448),
    "rtx3080": Gpu("GeForce RTX 3080", 59.5, 10, 760),
    "rtx3080ti": Gpu("GeForce RTX 3080 Ti", 68.2, 12, 912),
    "rtx3090": Gpu("GeForce RTX 3090", 71.0, 24, 936),
    "rtx3090ti": Gpu("GeForce RTX 3090 Ti", 80.0, 24, 1008),
    "rtx4060": Gpu("GeForce RTX 4060", 30.2, 8, 272),
    "rtx4060ti": Gpu("GeForce RTX 4060 Ti", 44.1, 16, 288),
    "rtx4070": Gpu("GeForce RTX 4070", 58.3, 12, 504),
    "rtx4070ti": Gpu("GeForce RTX 4070 Ti", 80.2, 12, 504),
    "rtx4080": Gpu("GeForce RTX 4080", 97.5, 16, 717),
    "rtx4090": Gpu("GeForce RTX 4090", 165.2, 24, 1008),
    "rtx5060": Gpu("GeForce RTX 5060", 38.4, 8, 448),
    "rtx5060ti": Gpu("GeForce RTX 5060 Ti", 47.4, 16, 448),
    "rtx5070": Gpu("GeForce RTX 5070", 61.7, 12, 672),
    "rtx5070ti": Gpu("GeForce RTX 5070 Ti", 87.9, 16, 896),
    "rtx5080": Gpu("GeForce RTX 5080", 112.6, 16, 960),
    "rtx5090": Gpu("GeForce RTX 5090", 209.5, 32, 1792),
    # NVIDIA for workstations and data centres: product data sheets, figures without sparsity.
    "a6000": Gpu("RTX A6000", 154.8, 48, 768),
    "rtx6000ada": Gpu("RTX 6000 Ada", 364.2, 48, 960),
    "t4": Gpu("T4", 65.0, 16, 320),
    "v100": Gpu("V100 16 GB", 125.0, 16, 900),
    "v100-32gb": Gpu("V100 32 GB", 125.0, 32, 900),
    "a10": Gpu("A10", 125.0, 24, 600),
    "a10g": Gpu("A10G", 70.0, 24, 600),
    "l4": Gpu("L4", 121.0, 24, 300),
    "l40": Gpu("L40", 181.0, 48, 864),
    "l40s": Gpu("L40S", 362.0, 48, 864),
    "a100": Gpu("A100 80 GB", 312.0, 80, 2039),
    "a100-40gb": Gpu("A100 40 GB", 312.0, 40, 1555),
    "h100": Gpu("H100 SXM", 989.0, 80, 3350),
    "h100-pcie": Gpu("H100 PCIe", 756.0, 80, 2000),
    "h200": Gpu("H200", 989.0, 141, 4800),
    # AMD: product data sheets.
    "rx7900xtx": Gpu("Radeon RX 7900 XTX", 122.8, 24, 960),
    "mi210": Gpu("Instinct MI210", 181.0, 64, 1638),
    "mi250x": Gpu("Instinct MI250X", 383.0, 128, 3277),
    "mi300x": Gpu("Instinct MI300X", 1307.0, 192, 5300),
    # Apple states bandwidth and cores; FLOP/s are cores x 256 x clock. Memory is a common size: better say yours.
    "m1": Gpu("Apple M1", 2.6, 16, 68),
    "m1-max": Gpu("Apple M1 Max", 10.4, 64, 400),
    "m1-ultra": Gpu("Apple M1 Ultra", 20.8, 128, 800),
    "m2": Gpu("Apple M2", 3.6, 24, 100),
    "m2-max": Gpu("Apple M2 Max", 13.6, 96, 400),
    "m2-ultra": Gpu("Apple M2 Ultra", 27.2, 192, 800),
    "m3-max": Gpu("Apple M3 Max", 14.1, 128, 400),
    "m3-ultra": Gpu("Apple M3 Ultra", 28.2, 256, 819),
    "m4": Gpu("Apple M4", 4.3, 32, 120),
    "m4-pro": Gpu("Apple M4 Pro", 8.6, 64, 273),
    "m4-max": Gpu("Apple M4 Max", 17.2, 128, 546),
}


def find_gpu(text: str) -> Gpu:
    """The catalogue's entry for `RTX 4090`, `rtx-4090` or `rtx4090`.

    Raises:
        UsageError: it has none.
    """
    known = {_plain(key): key for key in GPUS}
    asked = _plain(text)
    if asked in known:
        return GPUS[known[asked]]
    near = difflib.get_close_matches(asked, known, n=1)
    hint = f"Did you mean {known[near[0]]}?" if near else f"It has {', '.join(GPUS)}."
    raise UsageError(
        f"The catalogue has no GPU {text!r}. {hint} For any other device give memory_gb, tflops and bandwidth_gb."
    )


def _plain(text: str) -> str:
    return re.sub(r"nvidia|geforce|apple|[^a-z0-9]", "", text.lower())


def roofline(gpu: Gpu, manifest: Manifest, memory_bytes: int | None = None) -> Capability:
    """What a device with these figures should do with a layer of this model."""
    weight_bytes = DTYPE_BYTES[manifest.dtype]
    flops = gpu.tflops * 1e12 * FLOPS_SHARE * 2 / weight_bytes  # float32 goes at half the rate of bfloat16
    bandwidth = gpu.bandwidth_gb * GB * BANDWIDTH_SHARE
    flop_per_token = 2 * manifest.layer_bytes / weight_bytes

    def seconds(tokens: int) -> float:
        return LAYER_S + max(manifest.layer_bytes / bandwidth, tokens * flop_per_token / flops)

    return Capability(
        device=gpu.name,
        matmul_flops=flops,
        memory_bandwidth=bandwidth,
        decode=tuple(RatePoint(batch, seconds(batch)) for batch in DECODE_BATCHES),
        prefill=tuple(RatePoint(tokens, seconds(tokens)) for tokens in PREFILL_TOKENS),
        memory_bytes=int(gpu.memory_gb * GB * MEMORY_SHARE) if memory_bytes is None else memory_bytes,
    )

"""Which device to compute on, what to call it, and how much of its memory to take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from helixnet.core.errors import UsageError

FREE_MEMORY_SHARE = 0.8
"""Of the memory free now, what a peer takes if the user gives no budget."""


def pick_device(wish: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:n` or `mps`. Raises UsageError if it is not there."""
    kind, _, number = wish.partition(":")
    if wish == "auto":
        return "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wish == "cpu":
        return "cpu"
    if wish == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("no Apple GPU can be used here; try --device cpu")
        return "mps"
    if kind == "cuda" and (not number or number.isdigit()):
        count = torch.cuda.device_count()
        index = int(number or 0)
        if index >= count:
            seen = f"torch sees {count} of them" if count else "torch sees none"
            raise UsageError(f"there is no CUDA device {index} here ({seen}); try --device auto")
        return f"cuda:{index}"
    raise UsageError(f"--device is auto, cpu, cuda, cuda:N or mps, not {wish!r}")


def describe_device(device: str, threads: int) -> str:
    """As a person would name it: `AMD EPYC, 1 thread`, `NVIDIA GeForce RTX 4090`."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(torch.device(device)))
    if device == "mps":
        return "Apple GPU"
    return f"{_cpu_name()}, {threads} thread{'s' if threads != 1 else ''}"


def driver_version(device: str) -> str:
    """What stands between torch and the device, as far as it has a version of its own."""
    if not device.startswith("cuda"):
        return ""
    nvidia = Path("/proc/driver/nvidia/version")
    lines = nvidia.read_text().splitlines() if nvidia.is_file() else []
    return f"{lines[0] if lines else ''} CUDA {torch.version.cuda} ROCm {torch.version.hip}"


def default_memory_bytes(device: str) -> int:
    """A budget for weights and KV: `FREE_MEMORY_SHARE` of what is free on the device now."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free * FREE_MEMORY_SHARE)
    if device == "mps":
        return int(torch.mps.recommended_max_memory() * FREE_MEMORY_SHARE)
    return int(_free_ram_bytes() * FREE_MEMORY_SHARE)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))
    elif device == "mps":
        torch.mps.synchronize()


def _free_ram_bytes() -> int:
    """Memory available without swapping, bounded by the container's limit."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES")
    available = pages * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024 or available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine() or "CPU"

"""The checks of `helixnet doctor`; each says what it saw, and what to do if that is not enough."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from helixnet.core.errors import HelixError
from helixnet.daemon.config import Settings, parse_memory
from helixnet.daemon.wording import amount, seconds, short_id, size
from helixnet.net.address import Address, parse_address, parse_bootstrap, pin_port

if TYPE_CHECKING:
    from helixnet.net.host import Libp2pHost

PYTHON_MIN = (3, 11)
PEER_PACKAGES = ("torch", "transformers", "hivemind", "gguf", "safetensors")
INSTALL = "Install them: pip install 'helixnet-swarm[peer]' (or run scripts/setup in a checkout)."
DISK_FAIL_BYTES = 500e6
DISK_WARN_BYTES = 5e9
MEMORY_WARN_BYTES = 1e9
YEARS = (2025, 2100)
"""A clock outside cannot be right; records of the directory are dated."""
MONOTONIC_S = 0.02
DIAL_S = 5.0
FILES_MIN = 1024


class Finding(msgspec.Struct, frozen=True):
    """What one check found."""

    check: str
    outcome: str
    """ok, warn or fail."""
    says: str
    fix: str = ""


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Every check in turn; none of them raises."""
    quick: tuple[Callable[[], Finding], ...] = (_python, _packages, _disk, _clock, _files)
    for check in quick:
        yield check()
    yield _listening(settings)
    yield await asyncio.to_thread(_device, settings)
    yield _local_swarm()
    async for finding in _network(settings):
        yield finding


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON_MIN:
        return Finding("Python", "fail", version, "Install Python 3.11 or newer.")
    return Finding("Python", "ok", version)


def _packages() -> Finding:
    missing = [name for name in PEER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", "fail", f"{', '.join(missing)} missing", INSTALL)
    return Finding("packages", "ok", f"{', '.join(PEER_PACKAGES)} are installed")


def _disk() -> Finding:
    from helixnet.engine.weights.prepared import cache_root

    folder = cache_root()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    says = f"{size(free, 'B')} free for models in {folder}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "fail", f"{existing} cannot be written to", "Set HELIXNET_CACHE to a folder of yours.")
    if free < DISK_FAIL_BYTES:
        return Finding("disk", "fail", says, "Free some space, or set HELIXNET_CACHE to a folder on another disk.")
    if free < DISK_WARN_BYTES:
        return Finding("disk", "warn", says, "Enough for the small default model; larger ones need more.")
    return Finding("disk", "ok", says)


def _clock() -> Finding:
    year = time.localtime().tm_year
    began = time.monotonic()
    time.sleep(MONOTONIC_S)
    passed = time.monotonic() - began
    if not YEARS[0] <= year < YEARS[1]:
        return Finding("clock", "fail", f"it says {year}", "Set the date, best by NTP: timedatectl set-ntp true.")
    if not MONOTONIC_S / 2 <= passed <= 100 * MONOTONIC_S:
        return Finding("clock", "warn", f"{seconds(MONOTONIC_S)} took {seconds(passed)}", "Is the machine overloaded?")
    return Finding("clock", "ok", time.strftime("it is %Y-%m-%d %H:%M:%S %Z"))


def _files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_MIN:
        return Finding("open files", "warn", f"{soft} at once", f"Raise the limit: ulimit -n {FILES_MIN}.")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"{amount(soft)} at once")


def _listening(settings: Settings) -> Finding:
    try:
        ports = [pin_port(parse_address(text)) for text in settings.listen_addresses]
    except HelixError as error:
        return Finding("listening", "fail", str(error), "Give `helixnet peer` another address with --listen.")
    return Finding("listening", "ok", f"{', '.join(address.without_peer for address in ports)} can be opened")


def _device(settings: Settings) -> Finding:
    """What would compute, and the memory that a peer would lend."""
    try:
        from helixnet.engine.device import default_memory_bytes, describe_device, pick_device

        device = pick_device(settings.device)
        name = describe_device(device, os.cpu_count() or 1)
        free = default_memory_bytes(device)
    except ImportError as error:
        return Finding("device", "fail", f"{error.name} is not installed", INSTALL)
    except (HelixError, RuntimeError) as error:
        return Finding(
            "device", "fail", str(error), "See which devices there are with nvidia-smi, or use --device cpu."
        )
    budget = parse_memory(settings.memory) if settings.memory else free
    says = f"{device}: {name}; a peer would lend {size(budget, 'B')}"
    if settings.memory and budget > free:
        return Finding("device", "warn", f"{says}, of {size(free, 'B')} to spare", "Lower --memory.")
    problem = _too_small(settings, budget)
    if problem:
        return Finding("device", "fail", f"{says}; {problem}", "Raise --memory or choose a smaller model.")
    if budget < MEMORY_WARN_BYTES:
        return Finding("device", "warn", says, "That is room for a few layers of small models only.")
    return Finding("device", "ok", says)


def _too_small(settings: Settings, budget: int) -> str:
    """Why the budget is too small for the model, if one was named and is here already."""
    from helixnet.engine.weights.catalog import list_prepared

    for model in list_prepared() if settings.model else ():
        if settings.model in (model.manifest.name, model.folder.name) and budget < model.manifest.layer_bytes:
            return f"one layer of {model.manifest.name} takes {size(model.manifest.layer_bytes, 'B')}"
    return ""


def _local_swarm() -> Finding:
    from helixnet_client.local import find_local_swarm

    swarm = find_local_swarm()
    if swarm is None:
        return Finding("local swarm", "ok", "none runs here (`helixnet up` starts one)")
    return Finding("local swarm", "ok", f"process {swarm.pid} serves {swarm.model} on the network {swarm.network}")


# --- the network -----------------------------------------------------------------------------------


async def _network(settings: Settings) -> AsyncIterator[Finding]:
    """Whether our libp2p daemon starts, and reaches the bootstrap peers."""
    from helixnet.net.host import HostConfig, Libp2pHost

    with tempfile.TemporaryDirectory(prefix="helixnet-doctor-") as scratch:
        began = time.monotonic()
        try:
            host = await Libp2pHost.start(HostConfig(identity_path=Path(scratch) / "key"))
        except HelixError as error:
            yield Finding(
                "libp2p daemon", "fail", str(error), "Reinstall hivemind, which brings it; then run this again."
            )
            return
        try:
            yield Finding("libp2p daemon", "ok", f"started in {seconds(time.monotonic() - began)}")
            for text in settings.join:
                yield await _bootstrap(host, text)
        finally:
            await host.close()


async def _bootstrap(host: Libp2pHost, text: str) -> Finding:
    try:
        address = parse_bootstrap([text])[0]
    except HelixError as error:
        return Finding("bootstrap", "fail", str(error), "Ask whoever runs the swarm for the full address.")
    if address.transport == "tcp":
        problem = await asyncio.to_thread(_dial, address)
        if problem:
            advice = "Check the address, that the bootstrap peer runs, and the firewalls on both sides."
            return Finding("bootstrap", "fail", f"{address.host} port {address.port}: {problem}", advice)
    began = time.monotonic()
    assert address.peer is not None, "parse_bootstrap saw to it"
    try:
        await host.connect(address.peer, [address.text])
    except HelixError:
        says = f"something listens at {address.host} port {address.port}, but it is not …{short_id(address.peer)}"
        return Finding("bootstrap", "fail", says, "The peer's id at the end of the address is wrong or out of date.")
    return Finding("bootstrap", "ok", f"…{short_id(address.peer)} answers in {seconds(time.monotonic() - began)}")


def _dial(address: Address) -> str:
    """Open a TCP connection; the failure in words, empty if it worked."""
    try:
        socket.create_connection((address.host, address.port), DIAL_S).close()
    except TimeoutError:
        return f"no answer within {DIAL_S:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""

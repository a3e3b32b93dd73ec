"""One peer's process: joins, measures, follows plans, serves, drains."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from helixnet.core.errors import EngineGone, ManifestMismatch, MemoryTooSmall
from helixnet.core.machine import Event, Outcome
from helixnet.core.model import Manifest
from helixnet.core.peer import Peer, PeerFacts
from helixnet.core.presets import PRESETS
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.core.wire.codec import Lane
from helixnet.daemon.compute import EngineThread
from helixnet.daemon.config import Settings, home, parse_memory
from helixnet.daemon.links import LinkKeeper
from helixnet.daemon.planning import solve_in_worker
from helixnet.engine.base import Engine, Progress
from helixnet.net.base import Directory, Host
from helixnet.net.driver import ComputeEffect, Driver, DriverConfig, Ports
from helixnet.net.members import read_members

if TYPE_CHECKING:
    from helixnet.engine.choose import Choice
    from helixnet.engine.weights.prepared import PreparedModel

OnEvent = Callable[[Event], None]
STOP_CHECK_S = 0.1
KV_TOKENS_MIN = 256


class PeerProcess:
    """Everything of one running peer. Start with `run`, end with `ask_to_stop`."""

    def __init__(self, settings: Settings, on_event: OnEvent) -> None:
        self.settings = settings
        self.peer: Peer | None = None
        self._on_event = on_event
        self._stop = asyncio.Event()
        self._gone: asyncio.Future[None]
        """Fails when the engine's process ends."""
        self._compute = LateCompute()

    def ask_to_stop(self) -> None:
        """Drain and end; asked a second time, end at once."""
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()

    async def run(self) -> None:
        """Serve until asked to stop.

        Raises:
            HelixError: anything that keeps this peer from serving, in a sentence.
        """
        self._gone = asyncio.get_running_loop().create_future()
        model = await asyncio.to_thread(_prepare, self.settings)
        budget = await asyncio.to_thread(_memory_budget, self.settings, model.manifest)
        warm = asyncio.create_task(asyncio.to_thread(_import_engine))
        host, directory = await _start_network(self.settings)
        try:
            await check_swarm(directory, self.settings.network, model.manifest, host.peer_id)
            await self._serve(model, budget, host, directory, warm)
        finally:
            await directory.close()
            await host.close()
            if self._compute.engine is not None:
                await asyncio.to_thread(self._compute.engine.close)

    async def _serve(
        self, model: PreparedModel, budget: int, host: Host, directory: Directory, warm: asyncio.Task[None]
    ) -> None:
        preset = PRESETS[self.settings.preset]
        facts = PeerFacts(
            peer=host.peer_id,
            name=self.settings.peer_name,
            network=self.settings.network,
            manifest=model.manifest,
            memory_bytes=budget,
        )
        peer = self.peer = Peer(facts, preset.peer, time.monotonic())
        peer.addresses = host.addresses()
        links = LinkKeeper(peer, host)
        files = ModelFiles(model, host)
        ports = Ports(
            host=host,
            directory=directory,
            compute=self._compute,
            solve=solve_in_worker,
            on_event=self._on_event,
            extra=lambda sender, message, body: links.take(sender, message, body) or files.take(sender, message),
        )
        driver = Driver(peer, ports, DriverConfig(read_s=preset.read_s))
        self._emit("peer.joined", peer=host.peer_id, addresses=list(host.addresses()), model=model.manifest.name)
        await driver.read_directory()
        running = [asyncio.create_task(driver.run()), asyncio.create_task(links.run())]
        running.append(asyncio.create_task(self._get_ready(model, budget, driver, warm)))
        try:
            await self._until_stopped([*running, self._gone])
            await self._drain(driver)
        except EngineGone:
            # Nothing can be ended in good order; but the others need not find out by waiting.
            driver.apply([*driver.peer.leave(time.monotonic()), *driver.peer.stop()])
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _get_ready(self, model: PreparedModel, budget: int, driver: Driver, warm: asyncio.Task[None]) -> None:
        """Measure the device, make the engine; only then can this peer be planned."""
        await warm
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(lambda: self._emit("peer.measuring", done=done, total=total))

        choice, capability, engine = await asyncio.to_thread(_make_engine, model, self.settings, budget, progress)
        self._compute.engine = EngineThread(engine, self._on_event, self._engine_gone)
        self._emit("peer.measured", capability=capability, instead_of=choice.instead_of)
        driver.apply(driver.peer.measured(capability, time.monotonic()))

    def _engine_gone(self, error: EngineGone) -> None:
        if not self._gone.done():
            self._gone.set_exception(error)

    async def _until_stopped(self, running: list[asyncio.Future[None]]) -> None:
        """Wait for the stop signal; if a part of the peer fails first, fail with its error."""
        stop = asyncio.create_task(self._stop.wait())
        parts: set[asyncio.Future[Any]] = set(running)
        try:
            while not stop.done():
                done, _ = await asyncio.wait({stop, *parts}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & parts:
                    parts.discard(task)
                    _raise_first(task)
        finally:
            stop.cancel()

    async def _drain(self, driver: Driver) -> None:
        peer = driver.peer
        self._emit("peer.leaving", sessions=len(peer.stage.sessions))
        driver.apply(peer.leave(time.monotonic()))
        while not peer.may_stop(time.monotonic()):  # noqa: ASYNC110 - the machine is asked, it does not call
            await asyncio.sleep(STOP_CHECK_S)
        driver.apply(peer.stop())
        self._emit("peer.left", tokens=peer.stage.meter.total)

    def _emit(self, kind: str, **data: object) -> None:
        self._on_event(Event(kind, data))


class LateCompute:
    """The compute port while the engine is still being made: plans only come to peers that have one."""

    def __init__(self) -> None:
        self.engine: EngineThread | None = None

    def submit(self, effect: ComputeEffect, done: Callable[[Outcome], None]) -> None:
        """See `helixnet.net.driver.Compute`."""
        assert self.engine is not None, "a peer without an engine is never planned"
        self.engine.submit(effect, done)


class ModelFiles:
    """Gives clients the files that describe the model, so that they need none of their own."""

    def __init__(self, model: PreparedModel, host: Host) -> None:
        self._folder = model.folder
        self._host = host

    def take(self, sender: PeerId, message: wire.Message) -> bool:
        """Answer GetModelPart; True if it was one."""
        if not isinstance(message, wire.GetModelPart):
            return False
        if message.part in wire.MODEL_PARTS:
            path = Path(self._folder) / f"{message.part}.json"
            self._host.post(sender, wire.ModelPart(part=message.part), path.read_bytes(), Lane.BULK)
        return True


def _raise_first(task: asyncio.Future[Any]) -> None:
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error


# --- parts that block and so run in threads, and that load torch and so are imported late -----------


def _prepare(settings: Settings) -> PreparedModel:
    from helixnet.engine.weights.catalog import prepare

    return prepare(settings.model, dtype=settings.dtype, quantize=settings.quantize, adapter=settings.adapter)


def _import_engine() -> None:
    import helixnet.engine.torch_engine  # noqa: F401 - takes seconds; done while the network starts


def _memory_budget(settings: Settings, manifest: Manifest) -> int:
    """Bytes for weights and KV. Raises MemoryTooSmall if not even one layer fits."""
    from helixnet.engine.device import default_memory_bytes, pick_device

    device = pick_device(settings.device)
    budget = parse_memory(settings.memory) if settings.memory else default_memory_bytes(device)
    # One layer and KV for a short chat: less than that cannot serve anybody.
    least = manifest.layer_bytes + KV_TOKENS_MIN * manifest.kv_bytes
    if budget < least:
        raise MemoryTooSmall(
            f"A memory budget of {budget / 1e6:.0f} MB is too small for one layer of {manifest.name}, which takes "
            f"{least / 1e6:.0f} MB with its KV. Raise --memory or choose a smaller model."
        )
    return budget


def _make_engine(
    model: PreparedModel, settings: Settings, budget: int, progress: Progress
) -> tuple[Choice, Capability, Engine]:
    """Measure the device (or read what was measured before) and make the engine that serves on it."""
    from helixnet.engine.choose import Wish, choose
    from helixnet.engine.device import pick_device

    device = pick_device(settings.device)
    wish = Wish(settings.engine, device, settings.threads, settings.vllm_python)
    choice = choose(model, wish, budget, progress)
    engine = choice.kind.make(model, device, budget, choice.capability.threads)
    # Plans count weights as they are stored; where they take more, so much less is lent.
    lent = int(budget / engine.weight_factor)
    return choice, msgspec.structs.replace(choice.capability, memory_bytes=lent), engine


async def _start_network(settings: Settings) -> tuple[Host, Directory]:
    from helixnet.net.directory import DhtDirectory
    from helixnet.net.host import HostConfig, Libp2pHost

    config = HostConfig(
        identity_path=Path(settings.identity) if settings.identity else home() / "identity.key",
        listen=settings.listen_addresses,
        announce=settings.announce,
        bootstrap=settings.join,
        profile="public" if settings.public else "local",
    )
    host = await Libp2pHost.start(config)
    try:
        return host, await DhtDirectory.start(host)
    except BaseException:
        await host.close()
        raise


async def check_swarm(directory: Directory, network: str, manifest: Manifest, me: PeerId) -> None:
    """Refuse to join under a model name that this network serves with other weights."""
    for record in await read_members(directory, network):
        if record.model == manifest.name and record.manifest_hash != manifest.hash and record.peer != me:
            raise ManifestMismatch(
                f"The network {network!r} serves other weights under the name {manifest.name} (manifest "
                f"{record.manifest_hash[:12]}, here {manifest.hash[:12]}). Use the same model files and --dtype as its "
                "peers, or another --network."
            )


def run_until_signal(process: PeerProcess) -> None:
    """Run the peer in a fresh uvloop; Ctrl-C and SIGTERM drain it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, process.ask_to_stop)
        await process.run()

    import uvloop

    uvloop.run(main())

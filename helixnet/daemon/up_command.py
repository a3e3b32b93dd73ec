"""`helixnet up`: a whole swarm on this machine, in one command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helixnet.core.errors import DeadlineExceeded, HelixError, NetworkError, SwarmTooSmall
from helixnet.daemon import up_processes as processes
from helixnet.daemon.arguments import add_command, add_config_argument, add_engine_arguments, settings_from
from helixnet.daemon.up_processes import BOOTSTRAP, Child

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from helixnet.core.model import Manifest
    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.config import Settings
    from helixnet.daemon.status_report import StatusReport
    from helixnet.daemon.up_view import StartView
    from helixnet_client import AsyncClient

EXAMPLE = """helixnet up --peers 3
  helixnet generate "What is the capital of France?"     (in another terminal)

Each peer is a process with an identity of its own, on 127.0.0.1 only, and holds a part of the model."""
READY_S = 300.0
"""Longer than a first start on a slow machine, weights already here."""
POLL_S = 0.5
PROBLEM_S = 10.0
"""Peers are all there and still no plan is possible: then it will not be."""


def add_up_parser(commands: Commands) -> None:
    """Add the `up` command."""
    parser = add_command(commands, "up", "start a swarm of several peers on this machine, until Ctrl-C", EXAMPLE)
    parser.add_argument("--peers", type=int, metavar="N", help="how many peers (default: 3)")
    parser.add_argument(
        "--model", metavar="M", help="folder, GGUF file, hub id or name (default: smollm2-135m-instruct)"
    )
    parser.add_argument(
        "--memory", metavar="SIZES", help="one budget for each peer: 400MB,350MB,300MB (default: by the model's size)"
    )
    parser.add_argument("--network", metavar="NAME", help="the network's name (default: main)")
    parser.add_argument("--preset", metavar="P", help="timing: lan, wan or home (default: lan)")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each peer (default: cores / peers)")
    add_engine_arguments(parser)
    parser.add_argument(
        "--base-port", type=int, metavar="P", help="bootstrap peer on port P, peers on P+1 ... (default: free ones)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when ready; progress goes to stderr")
    add_config_argument(parser)
    parser.set_defaults(func=run_up)


def run_up(arguments: argparse.Namespace) -> int:
    """Start, wait until the plan is active, then until Ctrl-C; leaves no process behind.

    Raises:
        HelixError: whatever keeps the swarm from serving; everything is stopped by then.
    """
    from rich.console import Console

    from helixnet.daemon import up_plan
    from helixnet.daemon.local_swarm import only_one
    from helixnet.daemon.models_command import pull

    began = time.monotonic()
    memory, arguments.memory = arguments.memory, None
    settings = settings_from(arguments)
    # Bad input stops here, before anything is fetched or started.
    up_plan.check_peers(arguments.peers if arguments.peers is not None else up_plan.PEERS_DEFAULT)
    asked = up_plan.budgets_from(memory, arguments.peers) if memory else None
    console = Console(highlight=False, stderr=arguments.json)
    with only_one() as folder:
        model = pull(
            settings.model, console, dtype=settings.dtype, quantize=settings.quantize, adapter=settings.adapter
        )
        sizes = asked or up_plan.budgets(model.manifest, arguments.peers or up_plan.PEERS_DEFAULT)
        swarm = LocalSwarm(settings, sizes, folder, arguments.base_port or 0)
        asyncio.run(_run(swarm, model.manifest, began, console, as_json=arguments.json))
    console.print("everything is stopped")
    return 0


class LocalSwarm:
    """The processes of one swarm, from start to stop."""

    def __init__(self, settings: Settings, budgets: Sequence[int], folder: Path, base_port: int) -> None:
        self.settings = settings
        self.budgets = budgets
        self.folder = folder
        self.base_port = base_port
        self.children: list[Child] = []
        self.join: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """What the peers are called."""
        return [f"peer-{index}" for index in range(1, len(self.budgets) + 1)]

    async def start_bootstrap(self) -> None:
        """Start the entry point and wait until it can be dialled.

        Its identity and its port are settled beforehand, so nobody waits for it to say them.

        Raises:
            HelixError: it does not start.
        """
        from helixnet.net.address import parse_address, pin_port
        from helixnet.net.identity import Identity

        key = self.folder / "bootstrap.key"
        address = pin_port(parse_address(self._address(0)))
        self.join = (f"{address.text}/p2p/{Identity.load_or_create(key).peer_id}",)
        arguments = ["--listen", address.text, "--identity", str(key)]
        child = await processes.start(BOOTSTRAP, "helixnet_bootstrap.app", arguments, self.folder)
        self.children.append(child)
        await processes.until_listening(child, address.host, address.port)

    async def start_peers(self) -> None:
        """Start all peers at once."""
        from helixnet.daemon.up_plan import threads_each

        threads = self.settings.threads or threads_each(_cores(), self.budgets)
        for index, (name, budget) in enumerate(zip(self.names, self.budgets, strict=True), 1):
            arguments = [
                *("peer", "--config", os.devnull, "--name", name, "--network", self.settings.network),
                *("--memory", f"{budget}B", "--threads", str(threads), "--device", self.settings.device),
                *("--preset", self.settings.preset, "--listen", self._address(index)),
                *("--identity", str(self.folder / f"{name}.key")),
                *(part for address in self.join for part in ("--join", address)),
                *(("--model", self.settings.model) if self.settings.model else ()),
                *(("--dtype", self.settings.dtype) if self.settings.dtype else ()),
                *(("--quantize", self.settings.quantize) if self.settings.quantize else ()),
                *(("--adapter", self.settings.adapter) if self.settings.adapter else ()),
                *("--engine", self.settings.engine),
                *(("--vllm-python", self.settings.vllm_python) if self.settings.vllm_python else ()),
            ]
            self.children.append(await processes.start(name, "helixnet.daemon.cli", arguments, self.folder))

    def check(self) -> None:
        """Raise ChildFailed if one of the processes has ended."""
        for child in self.children:
            if child.ended.done():
                raise child.failure()

    def _address(self, index: int) -> str:
        return f"/ip4/127.0.0.1/tcp/{self.base_port + index if self.base_port else 0}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def _run(swarm: LocalSwarm, manifest: Manifest, began: float, console: Console, *, as_json: bool) -> None:
    from helixnet.daemon.local_swarm import announced
    from helixnet.daemon.up_view import StartView, ready_json, ready_page

    stop, hurry = _signals()
    try:
        with StartView(console, swarm.names, manifest, began) as view:
            starting = asyncio.create_task(_start(swarm, manifest, view))
            if not await _first(starting, stop):
                return
        status = starting.result()
        took_s = time.monotonic() - began
        with announced(swarm.join, swarm.settings.network, status.model):
            if as_json:
                print(json.dumps(ready_json(status, swarm.join, swarm.children, took_s)), flush=True)
            else:
                console.print(ready_page(status, swarm.folder, took_s))
            await _serve(swarm, stop, console)
    finally:
        with console.status("stopping") if console.is_terminal else contextlib.nullcontext():
            await processes.stop_all(swarm.children, hurry)


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second SIGINT, SIGTERM or SIGHUP."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    return stop, hurry


async def _first(starting: asyncio.Task[StatusReport], stop: asyncio.Event) -> bool:
    """Whether the start ended before somebody asked to stop; raises what the start raised."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


async def _start(swarm: LocalSwarm, manifest: Manifest, view: StartView) -> StatusReport:
    """Start everything and wait until a plan is active.

    Raises:
        HelixError: a process ended, no plan is possible, or it took too long.
    """
    await swarm.start_bootstrap()
    view.bootstrap_is_up()
    await swarm.start_peers()
    try:
        async with asyncio.timeout(READY_S):
            return await _until_active(swarm, view)
    except TimeoutError:
        raise DeadlineExceeded(
            f"The swarm was not ready within {READY_S:.0f} s; the logs in {swarm.folder} say more."
        ) from None


async def _until_active(swarm: LocalSwarm, view: StartView) -> StatusReport:
    from helixnet_client import AsyncClient

    client = AsyncClient(swarm.join, network=swarm.settings.network)
    looking = asyncio.create_task(_open(client))
    try:
        while not looking.done():
            swarm.check()
            await asyncio.wait({looking}, timeout=POLL_S)
        looking.result()
        return await _follow(client, swarm, view)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await client.close()


async def _open(client: AsyncClient) -> None:
    """Open the client as soon as there is a peer to ask."""
    while True:
        try:
            await client.open()
            return
        except NetworkError:
            await asyncio.sleep(POLL_S)


async def _follow(client: AsyncClient, swarm: LocalSwarm, view: StartView) -> StatusReport:
    from helixnet.daemon.status_command import fresh_report

    hopeless_since: float | None = None
    while True:
        swarm.check()
        await asyncio.sleep(POLL_S)
        try:
            status = await fresh_report(client)
        except HelixError:
            continue
        view.show(status)
        all_measured = sum(row.state == "active" for row in status.peers) == len(swarm.budgets)
        if status.serving and all_measured:
            return status
        if status.plan is not None or not all_measured:
            hopeless_since = None
        elif status.problem:  # only the coordinator knows it: other peers' views come without
            hopeless_since = hopeless_since or time.monotonic()
            if time.monotonic() - hopeless_since > PROBLEM_S:
                raise SwarmTooSmall(status.problem)


async def _serve(swarm: LocalSwarm, stop: asyncio.Event, console: Console) -> None:
    """Until somebody asks to stop; says so when a process ends by itself.

    Raises:
        ChildFailed: the last peer has ended.
    """
    stopping = asyncio.create_task(stop.wait())
    running = {child.ended: child for child in swarm.children}
    try:
        while not stop.is_set():
            done, _ = await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
            for ended in [task for task in running if task in done]:
                child = running.pop(ended)
                if not any(other.name != BOOTSTRAP for other in running.values()):
                    raise child.failure()
                console.print(f"{child.failure()}", markup=False)
    finally:
        stopping.cancel()

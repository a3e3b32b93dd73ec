"""Real processes for the stories that only they can tell: a bootstrap peer and peers, each with its own home."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from helixnet.core.errors import NetworkError
from helixnet.core.route.request import RequestConfig
from helixnet.core.types import Span
from helixnet.core.wire.messages import View
from helixnet_client import AsyncClient

START_S = 120.0
STOP_S = 30.0


class RealSwarm:
    """Starts and ends processes by pid; nothing it started outlives `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.join: tuple[str, ...] = ()
        self.processes: dict[str, Process] = {}

    async def start_bootstrap(self) -> None:
        """Start the entry point and learn its address."""
        process = await self._start(
            "bootstrap", "-m", "helixnet_bootstrap.app", "--listen", "/ip4/127.0.0.1/tcp/0", "--json"
        )
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        self.join = tuple(json.loads(line)["addresses"])

    async def start_peer(self, name: str, memory: str, *more: str) -> None:
        """Start a peer; it joins, measures and serves by itself."""
        await self._start(name, *self.peer_command(name, memory, *more))

    def peer_command(self, name: str, memory: str, *more: str) -> tuple[str, ...]:
        """The arguments of one peer's process."""
        joins = [part for address in self.join for part in ("--join", address)]
        key = str(self.folder / f"{name}.key")
        peer = ("-m", "helixnet", "peer", "--name", name, "--memory", memory, "--identity", key, "--threads", "1")
        return (*peer, "--network", "test", *joins, *more)

    async def _start(self, name: str, *arguments: str) -> Process:
        environment = {**os.environ, "HELIXNET_HOME": str(self.folder / name)}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=PIPE if name == "bootstrap" else log, stderr=log, env=environment
            )
        self.processes[name] = process
        return process

    async def end(self, name: str, number: signal.Signals) -> int:
        """Send a signal to one process and wait for its end; returns its exit code."""
        process = self.processes.pop(name)
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(STOP_S):
            return await process.wait()

    async def close(self) -> None:
        """End what is left."""
        for name in [n for n in self.processes if n != "bootstrap"] + ["bootstrap"]:
            if name in self.processes:
                try:
                    await self.end(name, signal.SIGTERM if name == "bootstrap" else signal.SIGKILL)
                except TimeoutError:
                    await self.end(name, signal.SIGKILL)

    @asynccontextmanager
    async def client(self, config: RequestConfig | None = None) -> AsyncIterator[AsyncClient]:
        """A client of this swarm. It looks again where peers that start all at once take longer than it would wait."""
        client = AsyncClient(self.join, network="test", config=config)
        async with asyncio.timeout(START_S):
            while True:
                with suppress(NetworkError):
                    await client.open()
                    break
        try:
            yield client
        finally:
            await client.close()

    def logs(self) -> str:
        """The end of every log, for a failing test."""
        parts = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log"))
        ]
        return "\n".join(parts)


async def until(client: AsyncClient, condition: Callable[[View], bool], limit_s: float = 180.0) -> View:
    """Follow the swarm's views until one fulfils the condition."""
    async with asyncio.timeout(limit_s):
        async for view in client.views():
            if condition(view):
                return view
    raise AssertionError("views ended")


def serving(peers: int) -> Callable[[View], bool]:
    """Whether a plan over so many peers is active and all of them have loaded what it gives them."""

    def holds(view: View) -> bool:
        if view.plan is None or not view.active or len(view.plan.placement.assignments) != peers:
            return False
        held = {row.record.peer: row.record.held for row in view.members if row.state == "active"}
        return all(any(s.holds(a.span) for s in held.get(a.peer, ())) for a in view.plan.placement.assignments)

    return holds


def spans_of(view: View) -> dict[str, Span]:
    """Planned span by the peer's name."""
    names = {row.record.peer: row.record.name for row in view.members}
    assert view.plan is not None
    return {names[a.peer]: a.span for a in view.plan.placement.assignments}

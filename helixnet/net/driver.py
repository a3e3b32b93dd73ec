"""Runs one peer's machine on asyncio: feeds it messages and time, carries its effects out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from helixnet.core.errors import HelixError, RemoteProtocolError
from helixnet.core.machine import (
    DropLayers,
    Effect,
    Emit,
    Event,
    Gone,
    KvEffect,
    LoadSpan,
    Outcome,
    Publish,
    RunBatch,
    Send,
    Solve,
    Solved,
)
from helixnet.core.peer import Peer
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.net import base
from helixnet.net.members import read_members

TICK_S_MAX = 0.25
TICK_S_MIN = 0.005
PUBLISH_TASKS_MAX = 16

ComputeEffect = RunBatch | KvEffect | LoadSpan | DropLayers
Extra = Callable[[PeerId, wire.Message, memoryview], bool]
"""Messages outside the machine (link probes, model files); True if it took the message."""


class Compute(Protocol):
    """Runs engine effects in order on a thread of its own."""

    def submit(self, effect: ComputeEffect, done: Callable[[Outcome], None]) -> None:
        """Queue an effect; `done` is called in the event loop if the effect has an outcome."""


class DriverConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How often the driver looks around."""

    read_s: float = 2.0
    """Pause between two readings of the directory."""
    call_s: float = 8.0
    """Longest a directory call may take."""


class Ports(msgspec.Struct, frozen=True, eq=False):
    """What the driver carries effects out with."""

    host: base.Host
    directory: base.Directory
    compute: Compute
    solve: Callable[[Solve], Awaitable[Solved]]
    on_event: Callable[[Event], None]
    extra: Extra


class Driver:
    """Owns the peer machine while it runs. Everything happens in one event loop; the clock is monotonic."""

    def __init__(self, peer: Peer, ports: Ports, config: DriverConfig) -> None:
        self.peer = peer
        self.ports = ports
        self._config = config
        self._local: deque[tuple[PeerId, wire.Message | Outcome, memoryview]] = deque()
        self._draining_local = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Drive until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._inbox(), name="inbox")
            self._group.create_task(self._ticks(), name="ticks")
            self._group.create_task(self._directory(), name="directory")

    def apply(self, effects: list[Effect]) -> None:
        """Carry effects out, and whatever follows from them locally."""
        for effect in effects:
            self._apply_one(effect)
        if self._draining_local:
            return
        self._draining_local = True
        try:
            while self._local:
                sender, message, body = self._local.popleft()
                for effect in self.peer.receive(sender, message, time.monotonic(), body):
                    self._apply_one(effect)
        finally:
            self._draining_local = False

    def deliver(self, sender: PeerId, message: wire.Message | Outcome, body: memoryview = memoryview(b"")) -> None:  # noqa: B008 - empty and read-only
        """Hand the machine a message; a sender that breaks the protocol loses its channel."""
        try:
            self.apply(self.peer.receive(sender, message, time.monotonic(), body))
        except RemoteProtocolError as error:
            self.ports.on_event(Event("peer.broke_protocol", {"peer": sender, "why": str(error)}))
            self.ports.host.drop(sender, f"it broke the protocol: {error}")

    # --- loops -------------------------------------------------------------------------------------

    async def _inbox(self) -> None:
        while True:
            item = await self.ports.host.receive()
            if isinstance(item, base.Gone):
                self.deliver(item.peer, Gone(item.reason))
            elif isinstance(item.message, wire.Announce):
                self.ports.host.learn(item.sender, item.message.record.addresses)
                self.deliver(item.sender, item.message)
            elif isinstance(item.message, wire.Yielded):
                self.ports.host.learn(item.message.coordinator, item.message.addresses)
                self.deliver(item.sender, item.message)
            elif not self.ports.extra(item.sender, item.message, item.body):
                self.deliver(item.sender, item.message, item.body)

    async def _ticks(self) -> None:
        while True:
            now = time.monotonic()
            self.apply(self.peer.tick(now))
            await asyncio.sleep(min(TICK_S_MAX, max(TICK_S_MIN, self.peer.deadline() - time.monotonic())))

    async def _directory(self) -> None:
        while True:
            await self.read_directory()
            await asyncio.sleep(self._config.read_s)

    async def read_directory(self) -> None:
        """Read what the machine wants to know now, and tell it; what is malformed is left out."""
        for key in self.peer.keys_to_read(self._config.read_s, time.monotonic()):
            try:
                async with asyncio.timeout(self._config.call_s):
                    records = await read_members(
                        self.ports.directory, self.peer.facts.network, self._record_refused, key
                    )
            except (TimeoutError, HelixError) as error:
                self.ports.on_event(Event("directory.unreachable", {"why": str(error) or "no answer in time"}))
                return
            for record in records:
                if record.peer != self.peer.me:
                    self.ports.host.learn(record.peer, record.addresses)
            self.apply(self.peer.listed(records, time.monotonic(), key))

    def _record_refused(self, owner: PeerId, why: str) -> None:
        self.ports.on_event(Event("record.refused", {"peer": owner, "why": why}))

    # --- effects -----------------------------------------------------------------------------------

    def _apply_one(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Emit():
                self.ports.on_event(effect.event)
            case Publish():
                self._spawn(self._publish(effect))
            case Solve():
                self._spawn(self._solve(effect))
            case _:
                self.ports.compute.submit(effect, self._came_of)

    def _send(self, effect: Send) -> None:
        if effect.to == self.peer.me:
            self._local.append((effect.to, effect.message, memoryview(effect.body)))
            return
        if isinstance(effect.message, wire.Lease | wire.PlanOffer):
            member = self.peer.membership.get(effect.to)
            if member is not None:
                self.ports.host.learn(effect.to, member.record.addresses)
        self.ports.host.post(effect.to, effect.message, effect.body, effect.lane)

    def _came_of(self, outcome: Outcome) -> None:
        self.deliver(self.peer.me, outcome)

    def _spawn(self, work: Awaitable[None]) -> None:
        if len(self._tasks) >= PUBLISH_TASKS_MAX or self._group is None:
            if asyncio.iscoroutine(work):
                work.close()
            return
        task = self._group.create_task(_await(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, effect: Publish) -> None:
        try:
            async with asyncio.timeout(self._config.call_s):
                stored = await self.ports.directory.publish(effect.key, effect.value, effect.lifetime_s)
        except (TimeoutError, HelixError, ValueError) as error:
            self.ports.on_event(Event("directory.unreachable", {"why": str(error) or "no answer in time"}))
            return
        if not stored:
            self.ports.on_event(Event("directory.refused", {"key": effect.key}))

    async def _solve(self, effect: Solve) -> None:
        self.deliver(self.peer.me, await self.ports.solve(effect))


async def _await(work: Awaitable[None]) -> None:
    await work

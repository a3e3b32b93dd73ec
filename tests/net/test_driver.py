"""The driver with real bytes in memory: two drivers answer a client, and a stranger's garbage harms nobody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from helixnet.core.errors import DeadlineExceeded
from helixnet.core.machine import (
    BatchDone,
    DropLayers,
    Dropped,
    Event,
    EvictKv,
    ExtendKv,
    Loaded,
    LoadSpan,
    OpenKv,
    Outcome,
    ReleaseKv,
    RunBatch,
    SealKv,
    Solve,
    Solved,
)
from helixnet.core.peer import Peer, PeerConfig, PeerFacts
from helixnet.core.plan.coordinator import CoordinatorConfig
from helixnet.core.route.request import RequestConfig, RequestSpec
from helixnet.core.swarm.election import LeaseConfig
from helixnet.core.types import PeerId, SessionId
from helixnet.core.wire import messages as wire
from helixnet.net.base import Gone
from helixnet.net.driver import ComputeEffect, Driver, DriverConfig, Ports
from helixnet.net.memory import MemoryNetwork
from helixnet_client.swarm import Swarm
from helixnet_client.transports import Connection
from tests.virtual_swarm import MANIFEST, ToyEngine, capability, toy_output, toy_plan

QUICK = PeerConfig(
    heartbeat_s=0.1,
    view_pause_s=0.05,
    view_renew_s=0.2,
    publish_s=0.1,
    # Longer than it takes to find each other (`read_s`), so that one claims and the other agrees.
    lease=LeaseConfig(settle_s=0.2, claim_stagger_s=0.3),
    coordinator=CoordinatorConfig(quiet_s=0.1),
)
PROMPT = tuple(range(1, 30))


class ToyCompute:
    """The toy engine behind the compute port; outcomes come in a later turn of the loop."""

    def __init__(self) -> None:
        self.engine = ToyEngine()

    def submit(self, effect: ComputeEffect, done: Callable[[Outcome], None]) -> None:
        outcome = self._outcome(effect)
        if outcome is not None:
            asyncio.get_running_loop().call_soon(done, outcome)

    def _outcome(self, effect: ComputeEffect) -> Outcome | None:
        engine = self.engine
        match effect:
            case RunBatch():
                return BatchDone(tuple(engine.run(work) for work in effect.batch), 0.001)
            case OpenKv() | ExtendKv() | SealKv() | EvictKv() | ReleaseKv():
                engine.make_room(effect)
            case LoadSpan():
                engine.loaded |= set(effect.span.layers())
                return Loaded(engine.held())
            case DropLayers():
                engine.loaded &= set(effect.keep.layers()) if effect.keep else set()
                return Dropped(engine.held())
        return None


class UnreachableDirectory:
    """A directory whose peers do not answer."""

    async def publish(self, key: str, value: bytes, lifetime_s: float) -> bool:
        raise DeadlineExceeded("nobody answered in time")

    async def read(self, key: str) -> dict[PeerId, bytes]:
        raise DeadlineExceeded("nobody answered in time")

    async def close(self) -> None:
        return None


async def solve(effect: Solve) -> Solved:
    answer = toy_plan(effect.snapshot)
    return Solved(None, effect.current, answer) if isinstance(answer, str) else Solved(answer, effect.current)


@asynccontextmanager
async def driven(network: MemoryNetwork, name: str, layers: int) -> AsyncIterator[list[Event]]:
    """A peer that runs until the block ends."""
    me, memory = PeerId(name), layers * MANIFEST.layer_bytes * 4 // 3
    host = network.host(name)
    events: list[Event] = []
    now = asyncio.get_running_loop().time()
    peer = Peer(PeerFacts(peer=me, name=name, network="n", manifest=MANIFEST, memory_bytes=memory), QUICK, now)
    peer.addresses = host.addresses()
    ports = Ports(
        host=host,
        directory=network.directory(name),
        compute=ToyCompute(),
        solve=solve,
        on_event=events.append,
        extra=lambda *_: False,
    )
    driver = Driver(peer, ports, DriverConfig(read_s=0.1))
    driver.apply(peer.measured(capability(memory), now))
    running = asyncio.create_task(driver.run())
    try:
        yield events
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.close()


@asynccontextmanager
async def a_swarm() -> AsyncIterator[tuple[MemoryNetwork, Swarm, list[list[Event]]]]:
    """Two peers that hold three layers each, and a client whose view shows their plan active."""
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        events = [await stack.enter_async_context(driven(network, name, 3)) for name in "ab"]
        connection = Connection(network.host("client"), network.directory("client"), lambda: None)
        swarm = Swarm(connection, "n", None, RequestConfig())
        await swarm.open()
        stack.push_async_callback(swarm.close)
        async with asyncio.timeout(20):
            while not (swarm.view and swarm.view.active and not isinstance(swarm.followed.pick(frozenset()), str)):
                await swarm.next_view(20)
        yield network, swarm, events


def asking(count: int) -> RequestSpec:
    return RequestSpec(manifest_hash=MANIFEST.hash, context_tokens=512, prompt=PROMPT, tokens_max=count)


async def test_two_drivers_answer_a_client() -> None:
    async with a_swarm() as (_, swarm, _):
        requests = await asyncio.gather(*(swarm.run(asking(12), lambda *_: True) for _ in range(4)))
        for request in requests:
            assert request.tokens == toy_output(PROMPT, 12)
            assert len(request.pipelines) == 1


async def test_a_client_that_has_enough_cancels_and_nothing_stays_open() -> None:
    async with a_swarm() as (_, swarm, _):
        request = await swarm.run(asking(200), lambda *_: False)
        assert request.finish == "cancelled" and 1 <= len(request.tokens) < 200
        async with asyncio.timeout(20):
            while any(row.record.sessions for row in (await swarm.fresh_view()).members):
                pass


async def test_a_stranger_that_breaks_the_protocol_loses_its_channel_and_the_swarm_goes_on() -> None:
    async with a_swarm() as (network, swarm, events):
        stranger = network.host("stranger")
        for peer in (PeerId("a"), PeerId("b")):
            steps = wire.Steps(items=(wire.StepItem(SessionId("s"), 0, 3, True, False),))
            stranger.post(peer, steps, random.Random(1).randbytes(10))
        async with asyncio.timeout(20):
            lost = {(await stranger.receive()) for _ in range(2)}
        assert {item.peer for item in lost if isinstance(item, Gone)} == {"a", "b"}
        assert all(any(event.kind == "peer.broke_protocol" for event in seen) for seen in events)
        request = await swarm.run(asking(5), lambda *_: True)
        assert request.tokens == toy_output(PROMPT, 5)
        await stranger.close()


async def test_a_client_outlives_a_directory_that_cannot_be_reached() -> None:
    async with a_swarm() as (_, swarm, _):
        swarm.directory = UnreachableDirectory()
        await swarm._ask_somebody()  # what following the swarm does when its peer falls silent
        request = await swarm.run(asking(5), lambda *_: True)
        assert request.tokens == toy_output(PROMPT, 5)

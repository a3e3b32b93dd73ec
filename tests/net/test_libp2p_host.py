"""Real daemons on loopback. Each test starts its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("hivemind", reason="the peer's extra is not installed")

from helixnet.core.errors import AddressInUse, BootstrapUnreachable, PeerGone, UsageError
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Lane
from helixnet.core.wire.messages import Ping, Pong, ProbeData
from helixnet.net.base import Gone, Received
from helixnet.net.directory import DhtDirectory
from helixnet.net.envelope import seal
from helixnet.net.host import PROTOCOL, HostConfig, Libp2pHost
from helixnet.net.identity import Identity
from helixnet.net.watchdog import WatchdogTimes

pytestmark = pytest.mark.slow

WAIT_S = 15.0
Start = Callable[..., Awaitable[Libp2pHost]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    hosts: list[Libp2pHost] = []

    async def start_one(name: str, bootstrap: tuple[str, ...] = (), **settings: object) -> Libp2pHost:
        config = HostConfig(identity_path=tmp_path / name, bootstrap=bootstrap, **settings)  # type: ignore[arg-type]
        hosts.append(await Libp2pHost.start(config))
        return hosts[-1]

    yield start_one
    await asyncio.gather(*(host.close() for host in hosts))


async def next_of(host: Libp2pHost) -> Received | Gone:
    return await asyncio.wait_for(host.receive(), WAIT_S)


async def message_of(host: Libp2pHost) -> Received:
    item = await next_of(host)
    assert isinstance(item, Received), item
    return item


async def gone_of(host: Libp2pHost) -> Gone:
    while True:
        item = await next_of(host)
        if isinstance(item, Gone):
            return item


def daemon_of(host: Libp2pHost) -> int:
    return int(subprocess.check_output(["pgrep", "-P", str(host.daemon_guardian_pid)]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.02)


async def restarted(host: Libp2pHost) -> None:
    await until(lambda: host.restarts > 0)


def is_running(pid: int | str) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_messages_go_both_ways_and_answers_reach_a_client_that_nobody_can_dial(start: Start) -> None:
    peer = await start("peer")
    client = await start("client", peer.addresses())
    body = bytes(range(256)) * 8192
    client.post(peer.peer_id, ProbeData(nonce=1, sequence=0), body, Lane.PREFILL)
    got = await message_of(peer)
    assert (got.sender, bytes(got.body)) == (client.peer_id, body)
    peer.post(got.sender, Pong(nonce=2))  # never learned an address of the client
    assert (await message_of(client)).message == Pong(nonce=2)


async def test_two_peers_that_open_at_the_same_time_keep_their_order(start: Start) -> None:
    a = await start("a")
    b = await start("b", a.addresses())
    a.learn(b.peer_id, b.addresses())
    for nonce in range(200):
        a.post(b.peer_id, Ping(nonce=nonce))
        b.post(a.peer_id, Ping(nonce=nonce))
    for host in (a, b):
        assert [(await message_of(host)).message for _ in range(200)] == [Ping(nonce=n) for n in range(200)]


async def test_an_unreachable_peer_is_gone_and_connect_says_why(start: Start) -> None:
    a = await start("a")
    nobody = Identity.generate().peer_id
    a.learn(nobody, ["/ip4/127.0.0.1/tcp/1", "nonsense"])
    a.post(nobody, Ping(nonce=1))
    assert (await gone_of(a)).peer == nobody
    with pytest.raises(PeerGone, match=r"cannot be reached at /ip4/127\.0\.0\.1/tcp/1"):
        await a.connect(nobody, ["/ip4/127.0.0.1/tcp/1"])


async def test_a_peer_that_is_killed_is_gone_within_two_seconds_and_leaves_no_daemon(
    start: Start, tmp_path: Path
) -> None:
    a = await start("a")
    code = (
        "import asyncio, pathlib\n"
        "from helixnet.net.host import HostConfig, Libp2pHost\n"
        "from helixnet.core.wire.messages import Ping\n"
        "async def main():\n"
        f"    config = HostConfig(pathlib.Path({str(tmp_path / 'k')!r}), bootstrap={a.addresses()!r})\n"
        "    host = await Libp2pHost.start(config)\n"
        f"    host.post({a.peer_id!r}, Ping(nonce=host.daemon_guardian_pid))\n"
        "    await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    got = await message_of(a)
    assert isinstance(got.message, Ping)
    guardian = got.message.nonce
    started = time.monotonic()
    process.kill()
    assert (await gone_of(a)).peer == got.sender
    assert time.monotonic() - started < 2
    await process.wait()
    await until(lambda: not is_running(guardian))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_hung_daemon_is_restarted_with_its_port_and_the_host_works_again(
    start: Start, how: signal.Signals
) -> None:
    a = await start("a")
    b = await start("b", a.addresses(), watchdog=WatchdogTimes(period_s=0.2, misses_max=1))
    calls: list[float] = []

    async def on_restart() -> None:
        calls.append(time.monotonic())

    b.on_restart(on_restart)
    b.post(a.peer_id, Ping(nonce=1))
    await message_of(a)
    before = b.addresses()
    os.kill(daemon_of(b), how)
    await restarted(b)
    assert (await gone_of(b)).peer == a.peer_id
    assert (await gone_of(a)).peer == b.peer_id
    assert b.addresses() == before
    assert len(calls) == 1
    a.learn(b.peer_id, b.addresses())
    a.post(b.peer_id, Ping(nonce=2))
    assert (await message_of(b)).message == Ping(nonce=2)


async def test_bytes_that_break_the_protocol_cost_the_channel(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    a = await start("a")
    b = await start("b", a.addresses())
    stream = await b._control.open_stream(a.peer_id, PROTOCOL, WAIT_S)
    await stream.write((b"\xff" * 100,))
    gone = await gone_of(a)
    assert gone.peer == b.peer_id
    assert "broke the protocol" in gone.reason
    assert await asyncio.wait_for(stream.read(), WAIT_S) == b""
    stream.abort()
    assert [record.exc_info for record in caplog.records if record.levelno >= logging.WARNING] == [None]


async def test_a_port_in_use_is_refused_with_a_sentence(start: Start) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port} is in use"):
            await start("a", listen=(f"/ip4/127.0.0.1/tcp/{port}",))
    a = await start("a")
    with pytest.raises(AddressInUse):  # the daemon alone would share the port and take half of the connections
        await start("b", listen=(a.addresses()[0].partition("/p2p/")[0],))


async def test_an_unreachable_bootstrap_peer_is_named_quickly(start: Start) -> None:
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
    started = time.monotonic()
    with pytest.raises(BootstrapUnreachable, match=r"/ip4/127\.0\.0\.1/tcp/9/p2p/12D3KooW"):
        await start("a", (address,))
    assert time.monotonic() - started < 10


async def test_another_peer_at_the_bootstrap_address_is_not_taken_for_it(start: Start) -> None:
    a = await start("a")
    with pytest.raises(BootstrapUnreachable):
        await start("b", (a.addresses()[0].replace(a.peer_id, Identity.generate().peer_id),))


async def test_malformed_addresses_are_refused_before_anything_starts(start: Start) -> None:
    with pytest.raises(UsageError):
        await start("a", ("localhost:1234",))
    with pytest.raises(UsageError):
        await start("a", listen=("/ip4/127.0.0.1",))
    with pytest.raises(UsageError, match="needs the port"):
        await start("a", announce=("/ip4/127.0.0.1/tcp/0",))


async def test_announced_addresses_are_what_others_are_told(start: Start) -> None:
    a = await start("a", announce=("/ip4/127.0.0.1/tcp/4001",))
    assert a.addresses() == (f"/ip4/127.0.0.1/tcp/4001/p2p/{a.peer_id}",)


async def test_failed_dials_leave_no_sockets_open(start: Start) -> None:
    a = await start("a")
    nobody = Identity.generate().peer_id

    async def dial() -> None:
        a.post(nobody, Ping(nonce=1))
        await gone_of(a)

    await dial()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await dial()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


async def test_the_directory_works_alone_with_others_and_after_a_dead_daemon(start: Start) -> None:
    a = await start("a")
    alone = await DhtDirectory.start(a)
    assert await alone.publish("key", b"one", 60)
    assert await alone.read("key") == {a.peer_id: b"one"}
    b = await start("b", a.addresses(), watchdog=WatchdogTimes(period_s=0.2))
    other = await DhtDirectory.start(b)
    assert await other.publish("key", b"two", 60)
    both = {a.peer_id: b"one", b.peer_id: b"two"}
    assert await alone.read("key") == await other.read("key") == both
    assert await other.publish("key", b"three", 61)
    assert (await alone.read("key"))[b.peer_id] == b"three"
    os.kill(daemon_of(b), signal.SIGKILL)
    await restarted(b)
    assert await other.publish("key", b"four", 62)
    assert await alone.read("key") == {a.peer_id: b"one", b.peer_id: b"four"}
    assert await alone.read("other") == {}
    await other.close()
    await alone.close()


async def test_the_directory_refuses_what_another_peer_writes_in_ones_name(start: Start) -> None:
    a = await start("a")
    b = await start("b", a.addresses())
    mine, thief = await DhtDirectory.start(a), await DhtDirectory.start(b)
    assert await mine.publish("key", b"mine", 30)
    expiry = time.time() + 100
    forged = seal(b.identity, "key", expiry, b"stolen")
    # Straight to the owner, past the thief's own validator.
    stored = await thief._node.protocol.call_store(
        thief._bindings.peer_id.from_base58(a.peer_id),
        [next(iter(mine._storage.data))],
        [thief._node.protocol.serializer.dumps(forged)],
        [expiry],
        subkeys=[str(a.peer_id)],
    )
    assert stored == [False]
    assert await thief.read("key") == await mine.read("key") == {PeerId(a.peer_id): b"mine"}
    await thief.close()
    await mine.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_whole_life_leaves_no_warning_no_task_and_no_process_behind(tmp_path: Path, loop: str) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from helixnet.net.host import HostConfig, Libp2pHost\n"
        "from helixnet.net.directory import DhtDirectory\n"
        "from helixnet.core.wire.messages import Ping\n"
        "async def main():\n"
        f"    at = pathlib.Path({str(tmp_path)!r})\n"
        "    a = await Libp2pHost.start(HostConfig(at / 'a'))\n"
        "    b = await Libp2pHost.start(HostConfig(at / 'b', bootstrap=a.addresses()))\n"
        "    da, db = await DhtDirectory.start(a), await DhtDirectory.start(b)\n"
        "    await db.publish('k', b'v', 60)\n"
        "    b.post(a.peer_id, Ping(nonce=1))\n"
        "    await a.receive()\n"
        "    print(a.daemon_guardian_pid, b.daemon_guardian_pid)\n"
        "    for part in (db, b, da, a):\n"
        "        await part.close()\n"
        + ("asyncio.run(main())\n" if loop == "asyncio" else "import uvloop; uvloop.run(main())\n")
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert not any(map(is_running, done.stdout.split()))

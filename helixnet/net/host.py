"""The real host: our channels over streams of a libp2p daemon that this process starts, watches and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from helixnet.core.errors import (
    AddressInUse,
    BootstrapUnreachable,
    DeadlineExceeded,
    HelixError,
    NetworkError,
    PeerGone,
    UsageError,
)
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Buffer, Lane
from helixnet.core.wire.messages import Message
from helixnet.net.address import Address, parse_address, parse_bootstrap, pin_port
from helixnet.net.base import Gone, Received, Traffic
from helixnet.net.bindings import Bindings, load_bindings
from helixnet.net.control import Control, close_server
from helixnet.net.identity import Identity
from helixnet.net.pipe import AsyncioStream, ByteStream
from helixnet.net.process import DaemonOptions, DaemonProcess
from helixnet.net.streams import Channels
from helixnet.net.watchdog import WatchdogTimes, watch

PROTOCOL = "/helixnet/1"
DIAL_S = 5.0
LISTEN_ATTEMPTS = 3
"""A free port may be taken between our look and the daemon's."""
KNOWN_PEERS_MAX = 4_096
ADDRESSES_PER_PEER_MAX = 8
CALLBACK_S = 15.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How a peer takes part in the network."""

    identity_path: Path
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    """Addresses to tell others instead of those found out, with ports."""
    bootstrap: tuple[str, ...] = ()
    """Full addresses of peers to join by; empty for the first peer of a swarm."""
    profile: Literal["local", "public"] = "local"
    watchdog: WatchdogTimes = field(default_factory=WatchdogTimes)


class Libp2pHost:
    """A `Host` over libp2p; made by `start`."""

    def __init__(self, identity: Identity, bootstrap: tuple[Address, ...], options: DaemonOptions) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.bootstrap = tuple(address for address in bootstrap if address.peer != identity.peer_id)
        self.restarts = 0
        self._options = options
        self._channels = Channels(self.peer_id, self._open_stream)
        self._known: OrderedDict[PeerId, tuple[str, ...]] = OrderedDict()
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._addresses: tuple[str, ...] = ()
        self._watching: asyncio.Task[None] | None = None
        self._bindings: Bindings
        self._process: DaemonProcess
        self._control: Control
        self._server: asyncio.Server | None = None
        self._started = False

    @classmethod
    async def start(cls, config: HostConfig) -> Libp2pHost:
        """Start a daemon, listen, and connect to the bootstrap peers.

        Raises:
            UsageError: an address is malformed, or the identity file is damaged.
            AddressInUse: an address to listen on is taken.
            BootstrapUnreachable: there are bootstrap peers and none answered.
            NetworkError: the daemon does not start.
        """
        bootstrap = parse_bootstrap(config.bootstrap)
        listen = tuple(parse_address(text) for text in config.listen)
        announce = tuple(parse_address(text).without_peer for text in config.announce)
        if any(parse_address(text).port == 0 for text in announce):
            raise UsageError("an announced address needs the port under which others reach it, not 0")
        identity = Identity.load_or_create(config.identity_path)
        relays = tuple(address.text for address in bootstrap)
        options = DaemonOptions(config.identity_path, (), announce, relays, config.profile == "public")
        host = cls(identity, bootstrap, options)
        try:
            await host._begin(listen)
        except BaseException:
            await host.close()
            raise
        host._watching = asyncio.create_task(watch(host._ping, host._daemon_ended, host._restart, config.watchdog))
        return host

    # --- Host ------------------------------------------------------------------------------------------------------

    def addresses(self) -> tuple[str, ...]:
        """See `Host`."""
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self._addresses)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See `Host`."""
        self.learn(peer, addresses)
        try:
            await self._control.connect(peer, self._known.get(peer, ()), DIAL_S)
        except PeerGone as error:
            raise PeerGone(f"{peer} cannot be reached at {', '.join(addresses) or 'any address'}: {error}") from None

    def post(self, to: PeerId, message: Message, body: Buffer = b"", lane: Lane = Lane.TOKEN) -> None:
        """See `Host`."""
        self._channels.post(to, message, body, lane)

    async def receive(self) -> Received | Gone:
        """See `Host`."""
        return await self._channels.receive()

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See `Host`. Addresses come from strangers: malformed ones are left out."""
        found = []
        for text in addresses[:ADDRESSES_PER_PEER_MAX]:
            with contextlib.suppress(UsageError):
                found.append(parse_address(text).without_peer)
        if found and peer != self.peer_id:
            self._known[peer] = tuple(found)
            self._known.move_to_end(peer)
            if len(self._known) > KNOWN_PEERS_MAX:
                self._known.popitem(last=False)

    def drop(self, peer: PeerId, reason: str) -> None:
        """See `Host`."""
        self._channels.drop(peer, reason)

    def traffic(self) -> dict[PeerId, Traffic]:
        """See `Host`."""
        return self._channels.traffic()

    async def close(self) -> None:
        """See `Host`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self._channels.close()
        await self._stop_daemon()

    # --- beyond Host -----------------------------------------------------------------------------------------------

    def on_restart(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Have `callback` awaited after each restart of the daemon: it has forgotten all it knew of other peers."""
        self._callbacks.append(callback)

    @property
    def control_socket(self) -> str:
        """Path of the running daemon's control socket; another one after each restart."""
        return self._process.control_socket

    @property
    def daemon_guardian_pid(self) -> int:
        """Process id of the guardian whose only child is the daemon (for tests and `doctor`)."""
        return self._process.guardian_pid

    async def rejoin(self) -> None:
        """Connect to the bootstrap peers that are not connected.

        Raises:
            BootstrapUnreachable: there are some, and none is connected afterwards.
        """
        if not self.bootstrap:
            return
        connected = await self._control.peers()
        waiting = [address for address in self.bootstrap if address.peer not in connected]
        failures = [text for text in await asyncio.gather(*map(self._try_bootstrap, waiting)) if text]
        if len(failures) == len(self.bootstrap):
            raise BootstrapUnreachable(
                "none of the bootstrap peers answered; check the addresses, this machine's network, and that one of "
                f"them runs: {'; '.join(failures)}"
            )

    async def _try_bootstrap(self, address: Address) -> str:
        """Connect; the failure in words, empty if it worked."""
        assert address.peer is not None
        try:
            await self._control.connect(address.peer, (address.without_peer,), DIAL_S)
        except (PeerGone, DeadlineExceeded) as error:
            return f"{address.text} ({error})"
        return ""

    # --- the daemon ------------------------------------------------------------------------------------------------

    async def _begin(self, listen: tuple[Address, ...]) -> None:
        loading = asyncio.create_task(asyncio.to_thread(load_bindings))
        try:
            for attempt in range(LISTEN_ATTEMPTS):
                self._options = replace(self._options, listen=tuple(pin_port(a).without_peer for a in listen))
                try:
                    self._process = await DaemonProcess.start(self._options)
                    break
                except AddressInUse:
                    if attempt == LISTEN_ATTEMPTS - 1 or all(address.port for address in listen):
                        raise
            self._started = True
        finally:
            self._bindings = await loading
        await self._attach()
        await self.rejoin()

    async def _attach(self) -> None:
        """Speak to the daemon that was just started."""
        self._control = Control(self._bindings, self._process.control_socket)
        await self._identify()
        self._server = await self._control.serve(PROTOCOL, self._process.stream_socket, self._accept)

    async def _stop_daemon(self) -> None:
        if self._server is not None:
            await close_server(self._server)
            self._server = None
        if self._started:
            await self._process.stop()

    def _daemon_ended(self) -> asyncio.Task[int]:
        return self._process.ended

    async def _ping(self) -> None:
        """Raise a HelixError if the daemon does not answer; also find lost bootstrap peers again."""
        await self._identify()
        with contextlib.suppress(BootstrapUnreachable):
            await self.rejoin()

    async def _identify(self) -> None:
        peer, addresses = await self._control.identify()
        if peer != self.peer_id:
            raise NetworkError(f"the libp2p daemon is {peer} and not {self.peer_id}; was the identity file replaced?")
        self._addresses = addresses

    async def _restart(self) -> None:
        self._channels.break_all("this host's libp2p daemon was restarted")
        await self._stop_daemon()
        self._process = await DaemonProcess.start(self._options)
        await self._attach()
        with contextlib.suppress(BootstrapUnreachable):
            await self.rejoin()
        for callback in self._callbacks:
            try:
                async with asyncio.timeout(CALLBACK_S):
                    await callback()
            except (HelixError, TimeoutError) as error:
                log.warning("after the restart of the libp2p daemon: %s", str(error) or "no answer in time")
        self.restarts += 1

    # --- streams ---------------------------------------------------------------------------------------------------

    def _accept(self, peer: PeerId, stream: AsyncioStream) -> None:
        self._channels.accept(peer, stream)

    async def _open_stream(self, peer: PeerId) -> ByteStream:
        control, addresses = self._control, self._known.get(peer, ())
        if addresses:  # the daemon may know better ones: a failure here is not the end
            with contextlib.suppress(PeerGone, DeadlineExceeded):
                await control.connect(peer, addresses, DIAL_S)
        return await control.open_stream(peer, PROTOCOL, DIAL_S)

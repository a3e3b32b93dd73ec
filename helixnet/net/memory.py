"""The network in memory: hosts and directories with the real interfaces, real bytes and one event loop.

Messages go through the same channels, codec and message encoding as over libp2p; only the streams are memory pipes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from helixnet.core.errors import PeerGone
from helixnet.core.swarm.records import RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Buffer, Lane
from helixnet.core.wire.messages import Message
from helixnet.net.base import Gone, Received, Traffic, check_record
from helixnet.net.pipe import ByteStream, MemoryStream, memory_pipe
from helixnet.net.streams import Channels


class MemoryNetwork:
    """Hosts that reach each other until they are cut or killed."""

    def __init__(self) -> None:
        self._hosts: dict[PeerId, MemoryHost] = {}
        self._cuts: set[frozenset[PeerId]] = set()
        self._streams: list[tuple[frozenset[PeerId], MemoryStream]] = []
        self._records: dict[str, dict[PeerId, tuple[bytes, float]]] = {}

    def host(self, peer: str) -> MemoryHost:
        """A new host, or one that starts again under the id of a dead one."""
        assert PeerId(peer) not in self._hosts, f"{peer} is running already"
        made = self._hosts[PeerId(peer)] = MemoryHost(self, PeerId(peer))
        return made

    def directory(self, peer: str) -> MemoryDirectory:
        """The directory as `peer` uses it."""
        return MemoryDirectory(self._records, PeerId(peer))

    def cut(self, a: PeerId, b: PeerId) -> None:
        """Break what is open between the two and let nothing be opened until `heal`; both are told `Gone`."""
        self._cuts.add(frozenset((a, b)))
        self._break(lambda pair: pair == frozenset((a, b)))

    def heal(self, a: PeerId, b: PeerId) -> None:
        """Undo `cut`."""
        self._cuts.discard(frozenset((a, b)))

    def kill(self, peer: PeerId) -> None:
        """End a host as SIGKILL would: nothing is flushed, everyone it talked to is told `Gone`."""
        del self._hosts[peer]
        self._break(lambda pair: peer in pair)

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Whether `a` can open a stream to `b` now."""
        return a in self._hosts and b in self._hosts and frozenset((a, b)) not in self._cuts

    def open(self, a: PeerId, b: PeerId) -> ByteStream:
        """A stream from `a` to `b`.

        Raises:
            PeerGone: not reachable.
        """
        if not self.reachable(a, b):
            raise PeerGone(f"{b} cannot be reached")
        near, far = memory_pipe()
        self._streams = [entry for entry in self._streams if not entry[1].broken]
        self._streams.append((frozenset((a, b)), near))
        self._hosts[b].accept(a, far)
        return near

    def leave(self, host: MemoryHost) -> None:
        """Forget a host that closed."""
        if self._hosts.get(host.peer_id) is host:
            del self._hosts[host.peer_id]

    def _break(self, concerned: Callable[[frozenset[PeerId]], bool]) -> None:
        for pair, stream in self._streams:
            if concerned(pair):
                stream.abort()


class MemoryHost:
    """A `Host` of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer: PeerId) -> None:
        self.peer_id = peer
        self._network = network
        self._channels = Channels(peer, self._open_stream)

    async def _open_stream(self, to: PeerId) -> ByteStream:
        await asyncio.sleep(0)  # opening is never instant: let others run, as over a real network
        return self._network.open(self.peer_id, to)

    def accept(self, peer: PeerId, stream: ByteStream) -> None:
        """Take a stream that `peer` opened."""
        self._channels.accept(peer, stream)

    def addresses(self) -> tuple[str, ...]:
        """See `Host`. Only this network understands them."""
        return (f"/memory/{self.peer_id}",)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See `Host`."""
        await asyncio.sleep(0)
        if not self._network.reachable(self.peer_id, peer):
            raise PeerGone(f"{peer} cannot be reached at {', '.join(addresses) or 'any address'}")

    def post(self, to: PeerId, message: Message, body: Buffer = b"", lane: Lane = Lane.TOKEN) -> None:
        """See `Host`."""
        self._channels.post(to, message, body, lane)

    async def receive(self) -> Received | Gone:
        """See `Host`."""
        return await self._channels.receive()

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See `Host`; peers of one network need no addresses."""

    def drop(self, peer: PeerId, reason: str) -> None:
        """See `Host`."""
        self._channels.drop(peer, reason)

    def traffic(self) -> dict[PeerId, Traffic]:
        """See `Host`."""
        return self._channels.traffic()

    async def close(self) -> None:
        """See `Host`."""
        await self._channels.close()
        self._network.leave(self)


class MemoryDirectory:
    """A `Directory` over a dictionary that all peers of a `MemoryNetwork` share."""

    def __init__(self, records: dict[str, dict[PeerId, tuple[bytes, float]]], peer: PeerId) -> None:
        self._records = records
        self._peer = peer

    async def publish(self, key: str, value: bytes, lifetime_s: float) -> bool:
        """See `Directory`."""
        check_record(value, lifetime_s)
        values = self._alive(key)
        if self._peer not in values and len(values) >= RECORDS_PER_KEY_MAX:
            return False
        values[self._peer] = (bytes(value), asyncio.get_running_loop().time() + lifetime_s)
        return True

    async def read(self, key: str) -> dict[PeerId, bytes]:
        """See `Directory`."""
        return {peer: value for peer, (value, _) in sorted(self._alive(key).items())}

    async def close(self) -> None:
        """See `Directory`."""

    def _alive(self, key: str) -> dict[PeerId, tuple[bytes, float]]:
        now = asyncio.get_running_loop().time()
        alive = {peer: entry for peer, entry in self._records.get(key, {}).items() if entry[1] > now}
        self._records[key] = alive
        return alive

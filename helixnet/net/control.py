"""The libp2p daemon's control socket: varint-framed protobufs, then (for a stream) the raw bytes of the stream.

hivemind has a client for it, too, but that one leaves a socket open after every failed or cancelled dial and has no
deadlines; a swarm dials dead peers all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import base58

from helixnet.core.errors import DeadlineExceeded, NetworkError, PeerGone
from helixnet.core.types import PeerId
from helixnet.net.bindings import Bindings
from helixnet.net.pipe import READ_BYTES, AsyncioStream

CALL_S = 3.0
"""What only the daemon itself has to answer."""
REPLY_BYTES_MAX = 4 << 20

Accept = Callable[[PeerId, AsyncioStream], None]


class Control:
    """Calls to one running daemon; each has a deadline."""

    def __init__(self, bindings: Bindings, socket_path: str) -> None:
        self._bindings = bindings
        self._pb = bindings.messages
        self.socket_path = socket_path

    async def identify(self) -> tuple[PeerId, tuple[str, ...]]:
        """The daemon's peer id and the addresses it can be dialled at (without `/p2p/ID`)."""
        reply = await self._call(self._pb.Request(type=self._pb.Request.IDENTIFY), CALL_S)
        addresses = tuple(str(self._bindings.multiaddr(raw)) for raw in reply.identify.addrs)
        return PeerId(base58.b58encode(reply.identify.id).decode()), addresses

    async def peers(self) -> frozenset[PeerId]:
        """Peers the daemon is connected to."""
        reply = await self._call(self._pb.Request(type=self._pb.Request.LIST_PEERS), CALL_S)
        return frozenset(PeerId(base58.b58encode(peer.id).decode()) for peer in reply.peers)

    async def connect(self, peer: PeerId, addresses: Sequence[str], deadline_s: float) -> None:
        """Connect, or do nothing if connected.

        Raises:
            PeerGone: no address answers as that peer.
            DeadlineExceeded: no answer in time.
        """
        raw = [self._bindings.multiaddr(address).to_bytes() for address in addresses]
        request = self._pb.ConnectRequest(peer=base58.b58decode(peer), addrs=raw, timeout=max(1, int(deadline_s)))
        await self._call(self._pb.Request(type=self._pb.Request.CONNECT, connect=request), deadline_s)

    async def open_stream(self, peer: PeerId, protocol: str, deadline_s: float) -> AsyncioStream:
        """A new stream to `peer`.

        Raises:
            PeerGone: it cannot be reached or does not speak `protocol`.
            DeadlineExceeded: no answer in time.
        """
        timeout = max(1, int(deadline_s))
        request = self._pb.StreamOpenRequest(peer=base58.b58decode(peer), proto=[protocol], timeout=timeout)
        reader, writer = await self._dial(deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                _send(writer, self._pb.Request(type=self._pb.Request.STREAM_OPEN, streamOpen=request))
                self._check(await _receive(reader, self._pb.Response()))
        except BaseException as error:
            writer.transport.abort()
            raise _translated(error, deadline_s) from None
        return AsyncioStream(reader, writer)

    async def serve(self, protocol: str, socket_path: str, accept: Accept) -> asyncio.Server:
        """Have the daemon hand us every stream that others open for `protocol`, until the server is closed."""

        async def incoming(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(CALL_S):
                    info = await _receive(reader, self._pb.StreamInfo())
            except Exception:  # nothing but our own daemon has access to the socket; it ended half way
                writer.transport.abort()
                return
            accept(PeerId(base58.b58encode(info.peer).decode()), AsyncioStream(reader, writer))

        server = await asyncio.start_unix_server(incoming, socket_path, limit=READ_BYTES)
        address = self._bindings.multiaddr(f"/unix{socket_path}").to_bytes()
        handler = self._pb.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
        await self._call(self._pb.Request(type=self._pb.Request.STREAM_HANDLER, streamHandler=handler), CALL_S)
        return server

    async def _call(self, request: Any, deadline_s: float) -> Any:
        reader, writer = await self._dial(deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                _send(writer, request)
                return self._check(await _receive(reader, self._pb.Response()))
        except Exception as error:
            raise _translated(error, deadline_s) from None
        finally:
            writer.transport.abort()

    async def _dial(self, deadline_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.open_unix_connection(self.socket_path, limit=READ_BYTES)
        except (OSError, TimeoutError) as error:
            raise _translated(error, deadline_s) from None

    def _check(self, reply: Any) -> Any:
        if reply.type == self._pb.Response.ERROR:
            raise PeerGone(reply.error.msg.strip().replace("\n", " ") or "the libp2p daemon refused")
        return reply


def _translated(error: BaseException, deadline_s: float) -> BaseException:
    """The same failure in our words."""
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"no answer within {deadline_s:.0f} s")
    if isinstance(error, (OSError, asyncio.IncompleteReadError)):
        return PeerGone(f"the libp2p daemon does not answer ({type(error).__name__})")
    return error


def _send(writer: asyncio.StreamWriter, message: Any) -> None:
    data = message.SerializeToString()
    size, prefix = len(data), bytearray()
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    writer.write(bytes(prefix) + data)


async def _receive(reader: asyncio.StreamReader, into: Any) -> Any:
    size = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        size |= (byte & 0x7F) << shift
        shift += 7
        if size > REPLY_BYTES_MAX or shift > 35:
            raise NetworkError("the libp2p daemon does not speak the protocol of hivemind 1.1; reinstall hivemind")
        if byte < 0x80:
            break
    into.ParseFromString(await reader.readexactly(size))
    return into


async def close_server(server: asyncio.Server) -> None:
    """Close a server made by `serve`."""
    server.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CALL_S):
            await server.wait_closed()

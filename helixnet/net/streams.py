"""Channels: messages to and from every peer over streams that are opened when needed and kept until they break."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from helixnet.core.errors import NetworkError, RemoteProtocolError
from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Buffer, Frame, FrameDecoder, Lane, encode_frame, frame_bytes
from helixnet.core.wire.coding import decode_message, encode_message
from helixnet.core.wire.messages import Message
from helixnet.net.base import Gone, Received, Traffic
from helixnet.net.inbox import Inbox
from helixnet.net.pipe import ByteStream, memory_pipe
from helixnet.net.sendqueue import SendQueue

OPEN_S = 8.0
WRITE_STALL_S = 20.0
"""A peer that takes nothing for this long is gone."""
FLUSH_S = 1.0
LINKS_MAX = 1_024
STREAMS_PER_PEER_MAX = 8
"""Four when both sides open both at once; a peer that lost its end may leave old ones behind for a moment."""
ASSEMBLY_BYTES_MAX = 512 << 20
"""Unfinished frames of all peers together."""
TRAFFIC_PEERS_MAX = 4_096

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Sender:
    """What waits for one peer, and the stream it goes out on: kept until it breaks."""

    queue: SendQueue
    stream: ByteStream | None = None
    writer: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class _Link:
    """What we have with one peer.

    Tokens have a stream of their own. On one stream they could overtake only what is still in our queue, and wait
    for what lies in the buffers below: half a second on a full link of 10 Mbit/s.
    """

    peer: PeerId
    traffic: Traffic
    tokens: _Sender
    heavy: _Sender
    """Prefill and bulk."""
    streams: list[ByteStream] = field(default_factory=list)
    """Everything open, by whichever side; all are read."""
    spoken: bool = False
    """Whether anything was sent or came since the last Gone: otherwise another one says nothing new."""

    def sender(self, lane: Lane) -> _Sender:
        return self.tokens if lane is Lane.TOKEN else self.heavy

    @property
    def is_idle(self) -> bool:
        return not (self.streams or self.tokens.queue.frames or self.heavy.queue.frames)


class Channels:
    """Carries messages over whatever `open_stream` opens and `accept` brings in.

    Needs a running event loop. Tasks are owned here and end with `close`.
    """

    def __init__(
        self,
        me: PeerId,
        open_stream: Callable[[PeerId], Awaitable[ByteStream]],
        make_queue: Callable[[], SendQueue] = SendQueue,
        inbox: Inbox | None = None,
    ) -> None:
        self._me = me
        self._open_stream = open_stream
        self._make_queue = make_queue
        self._inbox = inbox or Inbox()
        self._links: dict[PeerId, _Link] = {}
        self._traffic: dict[PeerId, Traffic] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._assembling = 0
        self._closing = False

    def post(self, to: PeerId, message: Message, body: Buffer = b"", lane: Lane = Lane.TOKEN) -> None:
        """See `Host.post`.

        Raises:
            ValueError: the message or its body is larger than the lane allows.
        """
        if self._closing:
            return
        header = encode_message(message)
        chunks = encode_frame(lane, header, body)
        size = frame_bytes(len(header), memoryview(body).nbytes)
        link = self._link(to)
        link.spoken = True
        sender = link.sender(lane)
        if not sender.queue.push(lane, chunks, size):
            self._fail(link, f"too much is waiting for it ({sender.queue.frames} frames, {sender.queue.bytes} bytes)")
            return
        link.traffic.sent.add(lane, size)
        if sender.writer is None:
            sender.writer = self._start(self._write(link, sender))

    async def receive(self) -> Received | Gone:
        """See `Host.receive`."""
        return await self._inbox.get()

    def accept(self, peer: PeerId, stream: ByteStream) -> None:
        """Take a stream that `peer` opened to us; it is closed at once if there are too many."""
        known = self._links.get(peer)
        if self._closing or (len(known.streams) >= STREAMS_PER_PEER_MAX if known else len(self._links) >= LINKS_MAX):
            stream.abort()
        else:
            self._add(self._link(peer), stream)

    def break_all(self, reason: str) -> None:
        """Close every channel, as if each peer had gone."""
        for link in list(self._links.values()):
            self._fail(link, reason)

    def drop(self, peer: PeerId, reason: str) -> None:
        """See `Host.drop`."""
        link = self._links.get(peer)
        if link is not None:
            link.spoken = True
            self._fail(link, reason)

    def traffic(self) -> dict[PeerId, Traffic]:
        """See `Host.traffic`."""
        return self._traffic

    async def close(self) -> None:
        """Send what is queued and wait until it was read, both within FLUSH_S; then end every task."""
        self._closing = True
        self._inbox.close()
        senders = [sender for link in self._links.values() for sender in (link.tokens, link.heavy)]
        writers = [sender.writer for sender in senders if sender.writer is not None]
        if writers:
            await asyncio.wait(writers, timeout=FLUSH_S / 2)
        for link in self._links.values():
            for stream in link.streams:
                stream.finish()
        if self._tasks:  # the other side answers the end of our half with the end of its own
            await asyncio.wait(self._tasks, timeout=FLUSH_S / 2)
        for link in list(self._links.values()):
            self._fail(link, "this host is closing")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _link(self, peer: PeerId) -> _Link:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = _Link(
                peer, self._counters(peer), _Sender(self._make_queue()), _Sender(self._make_queue())
            )
        return link

    def _counters(self, peer: PeerId) -> Traffic:
        if peer not in self._traffic and len(self._traffic) >= TRAFFIC_PEERS_MAX:
            del self._traffic[next(known for known in self._traffic if known not in self._links)]
        return self._traffic.setdefault(peer, Traffic())

    def _add(self, link: _Link, stream: ByteStream) -> None:
        link.streams.append(stream)
        self._start(self._read(link, stream))

    # --- sending ---------------------------------------------------------------------------------------------------

    async def _write(self, link: _Link, sender: _Sender) -> None:
        """Send until the queue is empty."""
        loop = asyncio.get_running_loop()
        try:
            stream = sender.stream or await self._open(link, sender)
            while chunk := sender.queue.take():
                started = loop.time()
                async with asyncio.timeout(WRITE_STALL_S):
                    await stream.write(chunk)
                link.traffic.blocked_s += loop.time() - started
        except TimeoutError:
            self._fail(link, f"took nothing for {WRITE_STALL_S:.0f} s")
        except (NetworkError, OSError) as error:
            self._fail(link, _reason(error))
        finally:
            if sender.writer is asyncio.current_task():
                sender.writer = None
            self._forget_if_idle(link)

    async def _open(self, link: _Link, sender: _Sender) -> ByteStream:
        """The stream to send on: a new one, or else (a client cannot be dialled) one that the peer has opened.

        Raises:
            NetworkError, OSError: there is none.
        """
        if link.peer == self._me:  # libp2p does not dial itself; a pipeline of one peer does
            near, far = memory_pipe()
            sender.stream = near
            self._add(link, far)
            self._add(link, near)
            return near
        try:
            async with asyncio.timeout(OPEN_S):
                stream = await self._open_stream(link.peer)
            self._add(link, stream)
        except TimeoutError:
            if not link.streams:
                raise NetworkError(f"did not answer within {OPEN_S:.0f} s") from None
        except (NetworkError, OSError):
            if not link.streams:
                raise
        sender.stream = sender.stream or link.streams[-1]
        return sender.stream

    # --- receiving -------------------------------------------------------------------------------------------------

    async def _read(self, link: _Link, stream: ByteStream) -> None:
        decoder = FrameDecoder()
        try:
            while data := await stream.read():
                held = decoder.buffered_bytes
                frames = decoder.feed(data)
                self._assembling += decoder.buffered_bytes - held
                if self._assembling > ASSEMBLY_BYTES_MAX:
                    raise RemoteProtocolError("too many unfinished frames are under way; the latest sender loses")
                for frame in frames:
                    await self._deliver(link, stream, frame)
            self._stream_ended(link, stream, "closed the channel")
        except RemoteProtocolError as error:
            log.warning("closing the channel to %s, which broke the protocol: %s", link.peer, error)
            if stream in link.streams:
                link.spoken = True
                self._fail(link, f"broke the protocol: {error}")
        except OSError as error:
            self._stream_ended(link, stream, _reason(error))
        finally:
            self._assembling -= decoder.buffered_bytes
            stream.abort()

    async def _deliver(self, link: _Link, stream: ByteStream, frame: Frame) -> None:
        size = frame_bytes(len(frame.header), frame.body.nbytes)
        message = decode_message(frame.header)
        sender = link.sender(frame.lane)
        if sender.stream is None and stream in link.streams:
            sender.stream = stream  # answers go back the way the question came
        link.traffic.received.add(frame.lane, size)
        link.spoken = True
        await self._inbox.put(Received(link.peer, message, frame.body), size)

    # --- ending ----------------------------------------------------------------------------------------------------

    def _stream_ended(self, link: _Link, stream: ByteStream, reason: str) -> None:
        """The other side ended one stream. Other streams may belong to a newer conversation: they stay."""
        if stream not in link.streams:
            return
        link.streams.remove(stream)
        for sender in (link.tokens, link.heavy):
            if sender.stream is stream:  # what was sent last may not have arrived, and the rest must not follow it
                _stop(sender)
        self._say_gone(link, reason)

    def _fail(self, link: _Link, reason: str) -> None:
        """Close everything with this peer and drop what waits for it."""
        _stop(link.tokens)
        _stop(link.heavy)
        streams, link.streams = link.streams, []
        for stream in streams:
            stream.abort()
        self._say_gone(link, reason)

    def _say_gone(self, link: _Link, reason: str) -> None:
        if link.spoken:
            link.spoken = False
            self._inbox.put_gone(Gone(link.peer, reason))
        self._forget_if_idle(link)

    def _forget_if_idle(self, link: _Link) -> None:
        if link.is_idle and self._links.get(link.peer) is link:
            del self._links[link.peer]


def _stop(sender: _Sender) -> None:
    """Drop what waits and forget the stream."""
    sender.queue.clear()
    sender.stream = None
    writer, sender.writer = sender.writer, None
    if writer is not None and writer is not asyncio.current_task():
        writer.cancel()


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__

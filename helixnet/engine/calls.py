"""What is said between a peer and the process its engine runs in: one message at a time, msgpack, length before it."""

from __future__ import annotations

import socket
import struct

import msgspec

from helixnet.core.stage.pages import Paging
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import BlockId, SessionId, Span

MESSAGE_BYTES_MAX = 1 << 30
_LENGTH = struct.Struct("!I")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The engine that a child is to make, given on its command line."""

    engine: str
    """vllm, or torch."""
    model: str
    """Folder of the prepared model."""
    device: str
    memory_bytes: int
    version: str
    """The peer's own; both must be of one release."""


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Base: msgspec puts the class name into the bytes."""


class Load(_Message, frozen=True):
    """See `Engine.load`; any number of Progress, then Held."""

    span: Span


class Drop(_Message, frozen=True):
    """See `Engine.drop`; answered by Held."""

    keep: Span | None


class Open(_Message, frozen=True):
    """See `Engine.open`; this and what follows is answered by Ok."""

    session: SessionId
    layers: Span
    tokens: int
    begun: tuple[BlockId, ...]


class Extend(_Message, frozen=True):
    """See `Engine.extend`."""

    session: SessionId
    tokens: int


class Seal(_Message, frozen=True):
    """See `Engine.seal`."""

    session: SessionId
    blocks: tuple[tuple[int, BlockId], ...]


class Evict(_Message, frozen=True):
    """See `Engine.evict`."""

    blocks: tuple[BlockId, ...]


class Release(_Message, frozen=True):
    """See `Engine.release`."""

    session: SessionId


class Fill(_Message, frozen=True):
    """See `Engine.fill`."""

    session: SessionId
    tokens: int


class Run(_Message, frozen=True):
    """See `Engine.run`; answered by Ran."""

    batch: tuple[Work, ...]


class Ready(_Message, frozen=True):
    """The child's first word: the engine is made."""

    paging: Paging
    takes: tuple[str, ...]
    weight_factor: float
    name: str
    """With its version, as a person would say it."""


class Ok(_Message, frozen=True):
    """It is done."""


class Held(_Message, frozen=True):
    """It is done; these layers are held now."""

    held: tuple[Span, ...]


class Ran(_Message, frozen=True):
    """What came of a batch, in its order."""

    results: tuple[Done, ...]


class Progress(_Message, frozen=True):
    """Of a load; more comes."""

    done: int
    total: int


class Failed(_Message, frozen=True):
    """It was refused, or failed: `error` is a class of `helixnet.core.errors`."""

    error: str
    message: str


Call = Load | Drop | Open | Extend | Seal | Evict | Release | Fill | Run
Answer = Ready | Ok | Held | Ran | Progress | Failed

_encoder = msgspec.msgpack.Encoder()
_calls: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Channel:
    """One end of a socket between two processes of ours."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Call | Answer) -> None:
        """Raises OSError if the other side is gone or does not take it in time."""
        data = _encoder.encode(message)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def call(self) -> Call:
        """The next call. Raises EOFError or OSError if the other side is gone, msgspec.MsgspecError for nonsense."""
        return _calls.decode(self._next(None))

    def answer(self, timeout_s: float) -> Answer:
        """The next answer. Raises as `call` does, and TimeoutError if there was none for so long."""
        return _answers.decode(self._next(timeout_s))

    def close(self) -> None:
        """The other side learns of it."""
        self._socket.close()

    def _next(self, timeout_s: float | None) -> bytearray:
        self._socket.settimeout(timeout_s)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MESSAGE_BYTES_MAX:
            raise EOFError(f"a message of {length} bytes was announced")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, read = memoryview(data), 0
        while read < count:
            got = self._socket.recv_into(view[read:])
            if got == 0:
                raise EOFError("the other side closed the channel")
            read += got
        return data

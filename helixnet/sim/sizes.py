"""How many bytes a message takes on a link, without encoding those that come by the million."""

from __future__ import annotations

from helixnet.core.wire import messages as wire
from helixnet.core.wire.codec import frame_bytes
from helixnet.core.wire.messages import Message, encode_message

STEP_BYTES, SAMPLED_BYTES, TOKEN_BYTES = 28, 24, 60
"""Of an item of Steps or Sampled with a session id of 16 characters, and of a whole Token."""
FRAME_BYTES = 24
"""Chunk and header lengths and the message's name."""
SERVING = {
    wire.Steps,
    wire.Sampled,
    wire.Token,
    wire.Open,
    wire.Opened,
    wire.Reserve,
    wire.Reserved,
    wire.Refused,
    wire.Release,
    wire.Cancel,
    wire.Broken,
}
"""Messages that serve requests; all others run the swarm."""


class Sizes:
    """`rows` says how many real bytes stand behind each byte of an activation's body."""

    def __init__(self, rows: float) -> None:
        self._rows = rows
        self._last: tuple[Message | None, int] = (None, 0)

    def of(self, message: Message, body: bytes | memoryview) -> int:
        """Bytes on the link, framing included."""
        if isinstance(message, wire.Steps):
            return FRAME_BYTES + STEP_BYTES * len(message.items) + int(self._rows * len(body))
        if isinstance(message, wire.Sampled):
            return FRAME_BYTES + SAMPLED_BYTES * len(message.items)
        if isinstance(message, wire.Token):
            return TOKEN_BYTES
        if self._last[0] is not message:  # a broadcast is one message to many
            self._last = message, frame_bytes(len(encode_message(message)), len(body))
        return self._last[1]

    def serves(self, message: Message) -> bool:
        """Whether the message serves a request."""
        return type(message) in SERVING

"""How many bytes a message takes on a link, without encoding those that come by the million."""

from __future__ import annotations

from collections.abc import Iterator

from helixnet.core.plan.plan import Plan
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.core.wire.codec import frame_bytes
from helixnet.core.wire.coding import encode_message
from helixnet.core.wire.messages import Message

STEP_BYTES, SAMPLED_BYTES, TOKEN_BYTES = 28, 24, 60
"""Of an item of Steps or Sampled with a session id of 16 characters, and of a whole Token."""
FRAME_BYTES = 24
"""Chunk and header lengths and the message's name."""
ID_BYTES = 52
"""Of a real peer id, in base58; simulated ones are short."""
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
            self._last = message, frame_bytes(len(encode_message(message)) + id_bytes(message), len(body))
        return self._last[1]

    def serves(self, message: Message) -> bool:
        """Whether the message serves a request."""
        return type(message) in SERVING


def id_bytes(message: Message) -> int:
    """By how much the message would be longer if its ids were real."""
    return sum(max(0, ID_BYTES - len(peer)) for peer in _ids(message))


def record_id_bytes(record: PeerRecord) -> int:
    """The same of a record in the directory."""
    return sum(max(0, ID_BYTES - len(peer)) for peer in _ids_of_record(record))


def _ids(message: Message) -> Iterator[PeerId]:
    match message:
        case wire.Announce():
            yield from _ids_of_record(message.record)
        case wire.Beat():
            yield from (observed.source for observed in message.observed if observed.source is not None)
        case wire.Lease() | wire.Yielded():
            yield message.coordinator
        case wire.PlanOffer():
            yield from _ids_of_plan(message.plan)
        case wire.View():
            yield from message.gone
            for row in message.members:
                yield from _ids_of_record(row.record)
            if message.plan is not None:
                yield from _ids_of_plan(message.plan)


def _ids_of_record(record: PeerRecord) -> Iterator[PeerId]:
    yield record.peer
    if record.coordinator is not None:
        yield record.coordinator
    for link in record.links:
        yield link.target
    for observed in record.observed:
        if observed.source is not None:
            yield observed.source


def _ids_of_plan(plan: Plan) -> Iterator[PeerId]:
    yield plan.coordinator
    for assignment in plan.placement.assignments:
        yield assignment.peer
    for flow in plan.placement.flows:
        for end in (flow.source, flow.target):
            if end is not None:
                yield end

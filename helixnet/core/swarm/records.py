"""What a peer says of itself: in the DHT (signed, expiring, bounded) and to the coordinator."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId, Span
from helixnet.core.wire.activation import PACKINGS, RAW

ADDRESSES_MAX = 8
LINKS_MAX = 24
SPANS_MAX = 4
OBSERVED_MAX = 32
RECORD_BYTES_MAX = 3800
"""With the signed envelope around it a record stays under the DHT's 4 KB."""
RECORDS_PER_KEY_MAX = 256
"""The directory keeps no more under one key."""
STATES = ("joining", "active", "draining")
LINK_CHANGE = 1.25
"""A link whose round trip or bandwidth changed by less is the same."""


class LinkMeasure(msgspec.Struct, frozen=True, array_like=True):
    """A link from the record's owner to `target`."""

    target: PeerId
    round_trip_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        for value in (self.round_trip_s, self.bandwidth):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError("a link measure must be finite and not negative")


class Observed(msgspec.Struct, frozen=True, array_like=True):
    """Tokens/s the owner ran lately that came from `source` (None: from clients)."""

    source: PeerId | None
    tokens_per_s: float


class PeerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One peer's word about itself. Durations, never times: clocks of strangers are not compared.

    Raises:
        ValueError: a list is longer than its bound.
    """

    peer: PeerId
    name: str
    addresses: tuple[str, ...]
    model: str
    manifest_hash: str
    state: str = "joining"
    """joining, active or draining."""
    capability: Capability | None = None
    held: tuple[Span, ...] = ()
    takes: tuple[str, ...] = (RAW,)
    """Packings of activations that it reads and writes."""
    plan: tuple[int, int] = (0, 0)
    """(term, epoch) of the plan it follows."""
    plan_active: bool = False
    """Whether it knows that plan to be active."""
    plan_whole: bool = False
    """Whether it has all of that plan, not only its own part."""
    term: int = 0
    """Highest term it has seen."""
    coordinator: PeerId | None = None
    """Whose lease it follows: where a newcomer reports to."""
    uptime_s: float = 0.0
    sessions: int = 0
    kv_free: float = 1.0
    """Share of its KV pages that are free."""
    tokens_per_s: float = 0.0
    links: tuple[LinkMeasure, ...] = ()
    observed: tuple[Observed, ...] = ()

    def __post_init__(self) -> None:
        bounds = ((self.addresses, ADDRESSES_MAX), (self.links, LINKS_MAX), (self.held, SPANS_MAX))
        if any(len(values) > most for values, most in (*bounds, (self.observed, OBSERVED_MAX))):
            raise ValueError("a record lists more addresses, links, spans or observed flows than allowed")
        if len(self.takes) > len(PACKINGS):
            raise ValueError("a record lists more packings than there are")
        if self.state not in STATES:
            raise ValueError(f"a record's state is joining, active or draining, not {self.state!r}")
        if len(self.name) > 64 or len(self.model) > 200 or len(self.manifest_hash) > 64:
            raise ValueError("a record's name, model or manifest hash is too long")


def essentials(record: PeerRecord) -> PeerRecord:
    """What the directory keeps of a record: enough to find and to use its owner; the coordinator hears the rest."""
    return msgspec.structs.replace(
        record, capability=None, links=(), observed=(), sessions=0, kv_free=1.0, tokens_per_s=0.0
    )


def links_differ(old: tuple[LinkMeasure, ...], new: tuple[LinkMeasure, ...]) -> bool:
    """Whether links were measured that matter to a planner: others, or quite different ones."""
    if old is new:
        return False
    if len(old) != len(new):
        return True
    # Asked at every heartbeat of every peer; most links were not measured again.
    return any(a is not b and (a.target != b.target or _differ(a, b)) for a, b in zip(old, new, strict=True))


def _differ(a: LinkMeasure, b: LinkMeasure) -> bool:
    pairs = (a.bandwidth, b.bandwidth), (a.round_trip_s, b.round_trip_s)
    return any(max(pair) > LINK_CHANGE * min(pair) for pair in pairs)


class PlanPointer(msgspec.Struct, frozen=True, kw_only=True):
    """What the DHT says of the active plan; the plan itself travels between peers."""

    term: int
    epoch: int
    plan_hash: str
    coordinator: PeerId
    addresses: tuple[str, ...]


def coordinator_named(pointers: Iterable[PlanPointer]) -> PeerId | None:
    """Who coordinates by the newest of these pointers; None without any."""
    newest = max(pointers, key=lambda pointer: (pointer.term, pointer.epoch), default=None)
    return newest.coordinator if newest is not None else None


_record_decoder = msgspec.msgpack.Decoder(PeerRecord)
_pointer_decoder = msgspec.msgpack.Decoder(PlanPointer)


def encode_record(record: PeerRecord) -> bytes:
    """The record as bytes, at most RECORD_BYTES_MAX: slow links and observed flows are left out first."""
    data = msgspec.msgpack.encode(record)
    while len(data) > RECORD_BYTES_MAX and (record.links or record.observed):
        record = msgspec.structs.replace(
            record, links=record.links[: len(record.links) // 2], observed=record.observed[: len(record.observed) // 2]
        )
        data = msgspec.msgpack.encode(record)
    return data


def decode_record(owner: PeerId, data: bytes) -> PeerRecord:
    """The record that `owner` signed.

    Raises:
        RemoteProtocolError: too large, malformed, or about another peer than its owner.
    """
    if len(data) > RECORD_BYTES_MAX:
        raise RemoteProtocolError(f"a record of {len(data)} bytes is larger than {RECORD_BYTES_MAX}")
    try:
        record = _record_decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"malformed record: {error}") from None
    if record.peer != owner:
        raise RemoteProtocolError("a peer's record is about another peer")
    return record


def encode_pointer(pointer: PlanPointer) -> bytes:
    """The pointer as bytes."""
    return msgspec.msgpack.encode(pointer)


def decode_pointer(owner: PeerId, data: bytes) -> PlanPointer:
    """The pointer that `owner` signed.

    Raises:
        RemoteProtocolError: malformed, or about another coordinator than its owner.
    """
    try:
        pointer = _pointer_decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"malformed plan pointer: {error}") from None
    if pointer.coordinator != owner or len(pointer.addresses) > ADDRESSES_MAX:
        raise RemoteProtocolError("a plan pointer is not its owner's")
    return pointer

"""The seam between whoever talks and whatever carries it: a host for messages, a directory for records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from helixnet.core.types import PeerId
from helixnet.core.wire.codec import Buffer, Lane
from helixnet.core.wire.messages import Message

RECORD_LIFETIME_MAX_S = 120.0
"""A record of a dead peer is forgotten after this long."""
RECORD_VALUE_BYTES_MAX = 3_900
"""With its envelope and hivemind's encoding a value stays under 4 KB."""


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """A message and the raw bytes that came with it (writable, the receiver's own)."""

    sender: PeerId
    message: Message
    body: memoryview


@dataclass(frozen=True, slots=True)
class Gone:
    """What was under way to or from `peer` may be lost; a later `post` starts anew."""

    peer: PeerId
    reason: str


@dataclass(slots=True)
class Flow:
    """Counted in one direction since the host started: frames and bytes (framing included) by lane."""

    frames: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    bytes: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))

    def add(self, lane: Lane, size: int) -> None:
        """Count one frame."""
        self.frames[lane] += 1
        self.bytes[lane] += size


@dataclass(slots=True)
class Traffic:
    """What went to and came from one peer."""

    sent: Flow = field(default_factory=Flow)
    received: Flow = field(default_factory=Flow)
    blocked_s: float = 0.0
    """How long the writer waited for the stream to take more: near the time passed if the link is full."""


class Host(Protocol):
    """Sends and receives messages as one peer."""

    peer_id: PeerId

    def addresses(self) -> tuple[str, ...]:
        """Full multiaddrs by which others can dial this host, `/p2p/ID` included."""

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connect now, so that `peer` is known to be reachable.

        Raises:
            PeerGone: none of the addresses answered.
            DeadlineExceeded: no answer in time.
        """

    def post(self, to: PeerId, message: Message, body: Buffer = b"", lane: Lane = Lane.TOKEN) -> None:
        """Queue a message; never blocks. Messages to one peer keep their order within a lane.

        Leave `body` alone afterwards: it is not copied. If the queue overflows, no channel can be opened, or the
        channel breaks, one `Gone` arrives in the inbox and what was queued for that peer is dropped.
        """

    async def receive(self) -> Received | Gone:
        """The next of the inbox. While nobody takes from it, nothing is read from the streams."""

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember by which addresses to dial `peer`."""

    def drop(self, peer: PeerId, reason: str) -> None:
        """Close every channel with a peer that broke the protocol; `Gone` arrives in the inbox. It may begin anew."""

    def traffic(self) -> dict[PeerId, Traffic]:
        """Counters by peer; live objects, to be read only."""

    async def close(self) -> None:
        """Send what is queued (within a second), then close everything."""


class Directory(Protocol):
    """Signed, expiring records: under each key at most one value of each peer."""

    async def publish(self, key: str, value: bytes, lifetime_s: float) -> bool:
        """Whether this peer's value under `key` was stored for `lifetime_s`.

        Raises:
            ValueError: value or lifetime is out of bounds.
        """

    async def read(self, key: str) -> dict[PeerId, bytes]:
        """The values under `key` that have not expired, by the peer that signed them; at most
        `records.RECORDS_PER_KEY_MAX`.
        """

    async def close(self) -> None:
        """Stop taking part."""


def check_record(value: bytes, lifetime_s: float) -> None:
    """Raise ValueError if a record is out of bounds."""
    if len(value) > RECORD_VALUE_BYTES_MAX or not 0 < lifetime_s <= RECORD_LIFETIME_MAX_S:
        raise ValueError(
            f"a record of {len(value)} bytes for {lifetime_s} s is out of bounds "
            f"(up to {RECORD_VALUE_BYTES_MAX} bytes, up to {RECORD_LIFETIME_MAX_S:.0f} s)"
        )

"""What a protocol participant is: an object that is told messages and the time, and answers with effects.

A machine never awaits, sends, sleeps, logs or reads a clock. The driver (asyncio for real, an event heap
in the simulator) carries its effects out and brings what comes of them back through `receive`.
"""

from __future__ import annotations

import math
from typing import Protocol

import msgspec

from helixnet.core.plan.plan import Placement
from helixnet.core.plan.snapshot import Snapshot
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import BlockId, PeerId, SessionId, Span
from helixnet.core.wire.codec import Lane
from helixnet.core.wire.messages import Message

NEVER = math.inf


class _Value(msgspec.Struct, frozen=True, eq=False):
    """Base of effects and outcomes; they carry payloads and are compared by identity."""


# --- effects ---------------------------------------------------------------------------------------


class Send(_Value, frozen=True):
    """Deliver `message` (and raw `body`) to `to`; if it cannot be, the driver brings `Gone` back."""

    to: PeerId
    message: Message
    body: bytes | memoryview = b""
    lane: Lane = Lane.TOKEN


class Publish(_Value, frozen=True):
    """Keep `value` in the directory under `key`, signed as ours, for `lifetime_s`."""

    key: str
    value: bytes
    lifetime_s: float


class RunBatch(_Value, frozen=True):
    """Run these through the engine; `BatchDone` comes back."""

    batch: tuple[Work, ...]


class OpenKv(_Value, frozen=True):
    """Make the engine's room for so many tokens of a session whose pages were counted; it begins after `begun`."""

    session: SessionId
    layers: Span
    tokens: int
    begun: tuple[BlockId, ...] = ()


class ExtendKv(_Value, frozen=True):
    """Make the engine's room of a session one for `tokens` tokens."""

    session: SessionId
    tokens: int


class SealKv(_Value, frozen=True):
    """Whole blocks of a session, by their places in it, may be shared from now on, also when it has ended."""

    session: SessionId
    blocks: tuple[tuple[int, BlockId], ...]


class EvictKv(_Value, frozen=True):
    """Free blocks that no session uses."""

    blocks: tuple[BlockId, ...]


class ReleaseKv(_Value, frozen=True):
    """Free the engine's room of a session, but for its shared blocks."""

    session: SessionId


class LoadSpan(_Value, frozen=True):
    """Load the missing layers of a span; `Loaded` comes back."""

    span: Span


class DropLayers(_Value, frozen=True):
    """Forget all layers outside `keep`; `Dropped` comes back."""

    keep: Span | None


class Solve(_Value, frozen=True):
    """Ask the planner; `Solved` comes back. `current` is evaluated on the same snapshot for comparison."""

    snapshot: Snapshot
    current: Placement | None
    seed: int
    repair: bool = False
    """Somebody came or went: a quick answer with few moves is wanted more than the best there is."""


class Emit(_Value, frozen=True):
    """Something happened that people, counters or traces want to know."""

    event: Event


KvEffect = OpenKv | ExtendKv | SealKv | EvictKv | ReleaseKv
Effect = Send | Publish | RunBatch | KvEffect | LoadSpan | DropLayers | Solve | Emit


# --- what the driver brings back -------------------------------------------------------------------


class Gone(_Value, frozen=True):
    """The channel to the sender broke, or it cannot be reached."""

    reason: str


class BatchDone(_Value, frozen=True):
    """What came of a RunBatch, in its order."""

    results: tuple[Done, ...]
    seconds: float


class Loaded(_Value, frozen=True):
    """A LoadSpan ended; `problem` is empty if it went well."""

    held: tuple[Span, ...]
    problem: str = ""


class Dropped(_Value, frozen=True):
    """A DropLayers ended."""

    held: tuple[Span, ...]


class Solved(_Value, frozen=True):
    """The planner's answer: a placement, or why there is none. `current` is the old one's worth today."""

    placement: Placement | None
    current: Placement | None
    problem: str = ""
    seconds: float = 0.0


Outcome = Gone | BatchDone | Loaded | Dropped | Solved


# --- events ----------------------------------------------------------------------------------------


class Event(_Value, frozen=True):
    """One thing that happened: `kind` is a stable name, `data` what goes with it (no prompts, no keys)."""

    kind: str
    data: dict[str, object] = {}


class Machine(Protocol):
    """A protocol participant. `now` is local and monotonic, in seconds."""

    def receive(self, sender: PeerId, message: Message | Outcome, now: float) -> list[Effect]:
        """Take a message or an outcome in; `sender` is our own id for outcomes of our own effects."""
        ...

    def tick(self, now: float) -> list[Effect]:
        """Let time pass; called at `deadline()` or later."""
        ...

    def deadline(self) -> float:
        """When `tick` wants to be called next; NEVER if nothing is pending."""
        ...

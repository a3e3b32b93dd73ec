"""The seam between deciding and computing: torch or vLLM behind it for real, a latency model in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from helixnet.core.model import Manifest
from helixnet.core.stage.pages import Paging
from helixnet.core.stage.work import Done, Work
from helixnet.core.types import BlockId, SessionId, Span

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Engine(Protocol):
    """Holds layers and runs ragged batches through them. One thread calls it; only `load` may run beside, on another.

    Everything is refused with a `HelixError`, never with a bare exception from a library.
    """

    @property
    def manifest(self) -> Manifest:
        """The model this engine was made for."""
        ...

    @property
    def paging(self) -> Paging:
        """How it divides its KV memory."""
        ...

    @property
    def takes(self) -> tuple[str, ...]:
        """Packings of activations that it reads and writes: see `helixnet.core.wire.activation`."""
        ...

    @property
    def weight_factor(self) -> float:
        """How many times as much memory loaded weights take as the checkpoint's own bytes; at least 1."""
        ...

    def held(self) -> tuple[Span, ...]:
        """The layers whose weights are loaded and verified, as maximal disjoint spans in order."""
        ...

    def load(self, span: Span, progress: Progress | None = None) -> None:
        """Load what is missing of `span`; what is already held stays and is not read again.

        Raises CorruptCheckpoint, UnsafeCheckpoint, MemoryTooSmall. After an error nothing has changed.
        """
        ...

    def drop(self, keep: Span | None) -> None:
        """Forget all layers outside `keep` (all, if None). Sessions that need them must have been released."""
        ...

    def open(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId] = ()) -> None:
        """Make KV room for `tokens` tokens of `session` in `layers`. Raises Busy, or UsageError.

        Its first tokens are those of the blocks `begun`, which were sealed by others: it goes on after them.
        """
        ...

    def extend(self, session: SessionId, tokens: int) -> None:
        """Make it room for `tokens` tokens. Raises Busy, or UsageError for an unknown session."""
        ...

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        """Give names to whole blocks of a session, by their places: others may begin with them.

        Blocks stay when their session is released. Raises UsageError if they are not whole, or the session is unknown.
        """
        ...

    def evict(self, blocks: Sequence[BlockId]) -> None:
        """Free sealed blocks that no session uses; unknown ones are ignored."""
        ...

    def fill(self, session: SessionId, tokens: int) -> None:
        """Give an open session made-up tokens, for measuring; what it then puts out means nothing."""
        ...

    def run(self, batch: Sequence[Work]) -> list[Done]:
        """Run every item through its layers; results in the order of the batch.

        An item that cannot be run (unknown session, position out of step, bad activation) gets a `Done`
        with `error`; the others are not disturbed.
        """
        ...

    def release(self, session: SessionId) -> None:
        """Free the session's KV but for sealed blocks; unknown sessions are ignored."""
        ...

    def close(self) -> None:
        """Free everything; nothing may be called after this."""
        ...

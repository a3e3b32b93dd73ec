"""What a stage asks of its engine, and what comes back: one ragged batch."""

from __future__ import annotations

import msgspec

from helixnet.core.sampling import History, Logprobs, Sampling
from helixnet.core.types import SessionId, Span
from helixnet.core.wire.activation import RAW, Activation


class Work(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One session's part of a batch: a prefill chunk or one decode step.

    Exactly one of `token_ids` (when `layers.start == 0`) and `activation` is given; both have one entry
    per token. Tokens take positions `position, position + 1, ...`; everything before `position` is
    already in this session's KV. With `sample`, the last token's logits are sampled after the last
    layer; without it a chunk on the last layer yields nothing (an unfinished prompt).
    """

    session: SessionId
    layers: Span
    position: int
    token_ids: tuple[int, ...] | None = None
    activation: Activation | None = None
    sample: Sampling | None = None
    history: History | None = None
    """What `sample` looks back on, if it does."""
    wanted: bool = False
    """Whether the last token is to be sampled at the exit; stages before it pass this on."""
    packing: str = RAW
    """How the activation that comes of it is to be packed."""
    drafts: tuple[int, ...] = ()
    """What the tokens after the first were guessed to be, one each; `sample` also tells how many are right."""
    decode: bool = False
    """A decode step, which may overtake prompts; the last chunk of a prompt may not, even with one token."""

    @property
    def tokens(self) -> int:
        """How many tokens this chunk has."""
        if self.token_ids is not None:
            return len(self.token_ids)
        assert self.activation is not None, "work has either token ids or an activation"
        return self.activation.tokens


class Done(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What came of one `Work`, in the order of the batch: an activation, a sampled token, neither, or an error."""

    session: SessionId
    activation: Activation | None = None
    token_id: int | None = None
    right: int = 0
    """So many drafts come before it."""
    logprobs: Logprobs | None = None
    """If they were asked for, with the token."""
    error: str | None = None

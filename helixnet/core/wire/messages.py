"""Every message of the protocol: one tagged union, msgpack on the wire (docs/protocol.md tells the stories)."""

from __future__ import annotations

import math

import msgspec

from helixnet.core.plan.plan import Plan
from helixnet.core.prefix import BLOCK_TOKENS, Chain
from helixnet.core.route.pipeline import Pipeline
from helixnet.core.sampling import Logprobs, Sampling
from helixnet.core.swarm.records import SPANS_MAX, STATES, Observed, PeerRecord
from helixnet.core.types import PeerId, SessionId, Span

PROMPT_TOKENS_MAX = 262_144
CHAIN_MAX = 2 * PROMPT_TOKENS_MAX // BLOCK_TOKENS
STEPS_MAX = 1_024
DRAFTS_MAX = 15
"""In one step of one session."""
BEAT_OBSERVED_MAX = 4
"""Flows that a heartbeat mentions: the largest."""
TEXT_CHARS_MAX = 2_000
MODEL_PARTS = ("manifest", "tokenizer", "chat")
"""Files that a client needs to turn text into tokens and back, and to check that they are the model's."""


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base: msgspec puts the class name into the bytes."""


class Goodbye(_Message, frozen=True):
    """The sender will not talk further, and why."""

    reason: str


# --- links -----------------------------------------------------------------------------------------


class Ping(_Message, frozen=True):
    """Asks whether the receiver is there."""

    nonce: int


class Pong(_Message, frozen=True):
    """Answers a ping."""

    nonce: int


class ProbeData(_Message, frozen=True):
    """Part of a bounded timed transfer; the bytes are the frame's body."""

    nonce: int
    sequence: int
    final: bool = False


class ProbeReport(_Message, frozen=True):
    """What the receiver of a timed transfer saw, from its first to its last part."""

    nonce: int
    received_bytes: int
    seconds: float


# --- membership, election, plans -------------------------------------------------------------------


class Announce(_Message, frozen=True):
    """A member's record for the coordinator: at first, when it asks, and when more changed than a Beat says."""

    record: PeerRecord


class Beat(_Message, frozen=True):
    """A member's heartbeat to the coordinator: what changes all the time. The fields are those of a record.

    Raises:
        ValueError: a list is longer than its bound, a state is unknown, or a number is none.
    """

    state: str
    term: int
    uptime_s: float
    held: tuple[Span, ...] = ()
    plan: tuple[int, int] = (0, 0)
    plan_active: bool = False
    plan_whole: bool = False
    sessions: int = 0
    kv_free: float = 1.0
    tokens_per_s: float = 0.0
    observed: tuple[Observed, ...] = ()

    def __post_init__(self) -> None:
        if len(self.held) > SPANS_MAX or len(self.observed) > BEAT_OBSERVED_MAX or self.state not in STATES:
            raise ValueError("a beat lists too many spans or flows, or has no known state")
        if not all(math.isfinite(value) for value in (self.uptime_s, self.kv_free, self.tokens_per_s)):
            raise ValueError("a beat's numbers must be finite")


class GetRecord(_Message, frozen=True):
    """Coordinator to a member: a Beat came, but your record is not known here. Announce yourself."""


class Leave(_Message, frozen=True):
    """The sender leaves on purpose and finishes only what it has."""


class Lease(_Message, frozen=True):
    """The coordinator's claim and its renewals. Compare by (term, stability, coordinator)."""

    term: int
    coordinator: PeerId
    stability: int
    duration_s: float
    addresses: tuple[str, ...] = ()


class Resign(_Message, frozen=True):
    """The coordinator gives its lease back before it ends."""

    term: int


class Yielded(_Message, frozen=True):
    """The sender coordinated and gave way to this coordinator: report there. Its lease tells whether that is so."""

    term: int
    coordinator: PeerId
    addresses: tuple[str, ...] = ()


class PlanOffer(_Message, frozen=True):
    """Load what this plan gives you and say when you are ready."""

    plan: Plan


class PlanReady(_Message, frozen=True):
    """The sender holds what the plan gives it; or why it cannot."""

    term: int
    epoch: int
    problem: str = ""


class PlanActive(_Message, frozen=True):
    """The plan carries its flow from now on; what it does not need may be dropped."""

    term: int
    epoch: int


# --- what clients see ------------------------------------------------------------------------------


class MemberView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One member as the answering peer sees it."""

    record: PeerRecord
    state: str
    """joining, active, suspect, draining or dead."""


class GetView(_Message, frozen=True):
    """Show me the swarm; with `subscribe`, also what changes from now on, for as long as that is asked again."""

    subscribe: bool = False
    since: int = 0
    """The `serial` of the receiver's newest view that the sender has; 0 for none."""
    plan: tuple[int, int] = (0, 0)
    """(term, epoch) of the plan that the sender has."""
    whole: bool = False
    """For people: with everybody's whole record, and all at once."""


class View(_Message, frozen=True):
    """The swarm as one peer sees it: best asked of the coordinator.

    With `since`, only what differs from that peer's view of that serial. Members' records are outlines: what routing
    takes. Only a view without a serial has them whole.
    """

    manifest_hash: str
    model: str
    layers: int
    context_tokens: int
    term: int
    coordinator: PeerId | None
    plan: Plan | None
    """None also if the receiver has it, or if the sender follows it without knowing all of it."""
    active: bool
    members: tuple[MemberView, ...]
    problem: str = ""
    """Why there is no plan that serves, in words; empty if all is well."""
    number: tuple[int, int] = (0, 0)
    """(term, epoch) of the plan that `active` is said of."""
    serial: int = 0
    since: int = 0
    gone: tuple[PeerId, ...] = ()
    """No longer members."""


class GetModelPart(_Message, frozen=True):
    """Send me a file that describes the model, one of MODEL_PARTS."""

    part: str


class ModelPart(_Message, frozen=True):
    """The file is the frame's body."""

    part: str


# --- requests --------------------------------------------------------------------------------------


class Open(_Message, frozen=True):
    """Client to entry: run this prompt through this pipeline.

    A resumed request is an Open whose prompt ends with the tokens made so far: sampling depends only on
    (settings, position, logits, history), so it goes on with the very same tokens.
    """

    session: SessionId
    pipeline: Pipeline
    manifest_hash: str
    prompt: tuple[int, ...]
    tokens_max: int
    """New tokens to make at most."""
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    made: int = 0
    """So many of the prompt's last tokens are of the answer."""
    cache_salt: str | None = ""
    """What the stages computed may stay there, for prompts that begin alike and come with the same salt; with an empty
    one, from the same client. None: nothing stays."""
    yields: bool = False
    """To all other requests, at every stage: it can wait."""
    drafts: int = 0
    """So many tokens may be guessed ahead in a step, to be checked on the way."""


class Opened(_Message, frozen=True):
    """Entry to client: every stage has made room."""

    session: SessionId
    cached: int = 0
    """Tokens of the prompt that no stage has to run again."""


class Reserve(_Message, frozen=True):
    """Entry to every stage: make KV room for the prompt, which is to grow to `tokens_max` tokens at most."""

    session: SessionId
    pipeline: Pipeline
    stage: int
    manifest_hash: str
    tokens_max: int
    prompt_tokens: int
    """Of these, how many come first and at once."""
    made: int = 0
    """So many of the prompt's last tokens are of the answer: who goes on is let in where newcomers no longer are."""
    owner: str = ""
    """A word for the client that tells it apart from others, and no more."""
    yields: bool = False
    sampling: Sampling | None = None
    """For the exit only; what follows, too, and only if sampling looks back."""
    prompt: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    chain: Chain = ()
    """Of the whole blocks of the prompt; empty if nothing may stay."""


class Reserved(_Message, frozen=True):
    """Stage to entry: room is made."""

    session: SessionId
    cached: int = 0
    """Of the prompt's first tokens it has so many, and keeps them for this session."""


class Refused(_Message, frozen=True):
    """Stage to entry, entry to client: not here, not now. Nothing is left half-opened.

    `code` is busy, too_long (more tokens than there is room for without anybody else), draining, not_held, manifest or
    bad_request.
    """

    session: SessionId
    peer: PeerId
    code: str
    reason: str = ""


class StepItem(msgspec.Struct, frozen=True, array_like=True):
    """One session's part of a Steps frame: `tokens` rows of the body, the first at `position`.

    `sample` asks the exit for the token after the last row; `decode` marks what may overtake prompts. `drafts` are
    guesses at what all rows but the first are of: the exit tells how many are right, and the token after those.
    """

    session: SessionId
    position: int
    tokens: int
    sample: bool
    decode: bool
    drafts: tuple[int, ...] = ()


class Steps(_Message, frozen=True):
    """Stage to next stage: activations of several sessions, concatenated in the body in this order."""

    items: tuple[StepItem, ...]
    packing: str = ""
    """Of all of them: see `helixnet.core.wire.activation`."""


class SampledItem(msgspec.Struct, frozen=True, array_like=True):
    """`token_id` was sampled from the logits at `position`; it takes `position + 1`. `right` drafts came before it."""

    session: SessionId
    position: int
    token_id: int
    logprobs: Logprobs | None = None
    right: int = 0


class Sampled(_Message, frozen=True):
    """Exit to entry: closes the ring."""

    items: tuple[SampledItem, ...]


class Token(_Message, frozen=True):
    """Entry to client. `index` counts from 0 within this session; `finish` is empty, stop or length."""

    session: SessionId
    index: int
    token_id: int
    finish: str = ""
    logprobs: Logprobs | None = None


class Broken(_Message, frozen=True):
    """A pipeline cannot go on; `suspects` may be to blame. Stage to entry, entry to client.

    `code` is PREEMPTED where nothing is wrong but that others needed its KV pages.
    """

    session: SessionId
    suspects: tuple[PeerId, ...] = ()
    reason: str = ""
    code: str = ""


PREEMPTED = "preempted"


class Cancel(_Message, frozen=True):
    """Client to entry: stop and free everything."""

    session: SessionId


class Release(_Message, frozen=True):
    """Entry to every stage: free what the session holds."""

    session: SessionId
    chain: Chain = ()
    """Of the whole blocks of prompt and answer beyond those of the reservation: they may stay."""


Message = (
    Goodbye
    | Ping
    | Pong
    | ProbeData
    | ProbeReport
    | Announce
    | Beat
    | GetRecord
    | Leave
    | Lease
    | Resign
    | Yielded
    | PlanOffer
    | PlanReady
    | PlanActive
    | GetView
    | View
    | GetModelPart
    | ModelPart
    | Open
    | Opened
    | Reserve
    | Reserved
    | Refused
    | Steps
    | Sampled
    | Token
    | Broken
    | Cancel
    | Release
)

"""One request's part at one stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from helixnet.core.prefix import HASH_BYTES, Chain
from helixnet.core.route.pipeline import Pipeline
from helixnet.core.sampling import History, Sampling
from helixnet.core.types import BlockId, PeerId, SessionId, Span
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import RAW


@dataclass(slots=True)
class StageSession:
    """State of a session here. `next_position` is where the next step must begin."""

    session: SessionId
    pipeline: Pipeline
    stage: int
    tokens_max: int
    prompt_left: int
    """Prompt tokens that have not run here yet."""
    sampling: Sampling | None
    history: History | None
    """For the exit, if sampling looks back."""
    active_at: float
    owner: str = ""
    """Whose it is: owners take turns with their prompts."""
    yields: bool = False
    """To all others, as long as there are any."""
    blocks: tuple[BlockId, ...] = ()
    """Names of its whole blocks, as far as they may be shared."""
    taken: int = 0
    """So many of them were here before it: it begins after as many as every stage has."""
    has_begun: bool = False
    sealed: int = 0
    """So many of them others may share."""
    next_position: int = 0
    drafted: int = 0
    """So many of the tokens before it were only guessed: the next step may begin with any of them."""
    came: int = 0
    """So many tokens came last that were not only guessed, or turned out to be right."""
    done_position: int = 0
    """Everything before it has run, and was not only guessed."""
    layers: Span = field(init=False)
    """The layers this stage runs for the session."""
    entry: PeerId = field(init=False)
    """The first stage's peer."""
    next_hop: PeerId | None = field(init=False)
    """The next stage's peer; None at the exit."""
    previous_hop: PeerId | None = field(init=False)
    """The stage before; None at the entry."""
    takes: str = field(init=False)
    """How what comes is packed ..."""
    sends: str = field(init=False)
    """... and what goes."""

    def __post_init__(self) -> None:
        pipeline, stage = self.pipeline, self.stage
        self.layers, self.entry = pipeline[stage].layers, pipeline[0].peer
        self.next_hop = pipeline[stage + 1].peer if stage + 1 < len(pipeline) else None
        self.previous_hop = pipeline[stage - 1].peer if stage else None
        self.takes, self.sends = pipeline[stage - 1].sends if stage else RAW, pipeline[stage].sends

    def advance(self, position: int, tokens: int, now: float, drafts: int) -> str:
        """So many tokens came for `position`, the last `drafts` of them guessed.

        Returns what is wrong with that, in words; empty if nothing is.
        """
        if not self.next_position - self.drafted <= position <= self.next_position:
            return f"position {position} came where {self.next_position} was due"
        if position + tokens > self.tokens_max:
            return f"more than the {self.tokens_max} tokens that were reserved came"
        sure, stop = self.next_position - self.drafted, position + tokens
        self.came = stop - drafts - sure
        self.next_position, self.drafted = stop, drafts
        self.active_at = now
        return ""


def history_of(message: wire.Reserve) -> History | None:
    """What the exit is told that came before, if it has to know."""
    if message.sampling is None or not message.sampling.looks_back:
        return None
    made_from = len(message.prompt) - message.made
    return History(message.prompt[:made_from], list(message.prompt[made_from:]), message.stop_ids)


def block_ids(pipeline: Pipeline, stage: int, chain: Chain) -> tuple[BlockId, ...]:
    """What a stage calls the blocks of a chain.

    What it computes depends on who computed what it was sent, and how that was packed. So the name has the way there in
    it: nobody's mistakes or lies reach sessions that do not pass by the same peers.
    """
    way = ";".join(f"{one.peer}{one.layers}" for one in pipeline[: stage + 1])
    way += "".join(f" {one.sends}" for one in pipeline[:stage] if one.sends)
    root = blake2b(way.encode(), digest_size=HASH_BYTES).digest()
    return tuple(BlockId(blake2b(one, key=root, digest_size=HASH_BYTES).digest()) for one in chain)

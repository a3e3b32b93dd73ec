"""One request as its client sees it: open a pipeline, take tokens in order, go on elsewhere when one breaks.

The machine keeps what the user has already been given, so a broken pipeline costs time and never a
token: it opens a new one with prompt plus tokens so far (full replay). The simulator runs this very code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec

from helixnet.core.errors import (
    Busy,
    CapacityError,
    DeadlineExceeded,
    HelixError,
    ManifestMismatch,
    NetworkError,
    PeerGone,
    PromptTooLong,
    RemoteProtocolError,
    SwarmTooSmall,
    UsageError,
)
from helixnet.core.machine import NEVER, Effect, Emit, Event, Gone, Outcome, Send
from helixnet.core.prefix import SALT_CHARS_MAX, Chain, chain_of
from helixnet.core.route.pipeline import WISHES, Pipeline, packed
from helixnet.core.sampling import STOP_IDS_MAX, Logprobs, Sampling
from helixnet.core.types import PeerId, SessionId
from helixnet.core.wire import messages as wire


class Routes(Protocol):
    """Where pipelines come from."""

    def pick(self, masked: frozenset[PeerId], chain: Chain = ()) -> Pipeline | str:
        """A pipeline around the masked peers, maybe one that ran much of this; if there is none now, a sentence why."""
        ...

    def takes(self, peer: PeerId) -> Collection[str]:
        """Packings of activations that a peer reads and writes."""
        ...

    def ran(self, pipeline: Pipeline, chain: Chain) -> None:
        """All blocks of a chain were run there."""
        ...

    def give_back(self, pipeline: Pipeline) -> None:
        """A pipeline that was picked with nobody masked had no room."""
        ...


class RequestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one request's patience."""

    open_s: float = 15.0
    """Entry must say Opened or Refused within this."""
    stall_s: float = 10.0
    """Longest silence from an entry once opened; it says Opened again every few seconds while it waits."""
    retry_s: float = 0.25
    """Pause before trying again when nobody can serve now; doubles up to `retry_s_max`."""
    retry_s_max: float = 2.0
    turn_s: float = 10.0
    """How long a request that full peers refuse waits for its turn before it goes around them. The plan's shares hold
    among those that are let in; whoever goes around the full leaves more to others than they can compute."""
    patience_s: float = 60.0
    """Give up when no token came for this long over all attempts ..."""
    unserved_s: float = 20.0
    """... or for this long if no pipeline was ever found."""
    too_long_s: float = 5.0
    """... or for this long if all ways have too little room for so many tokens, however empty: another plan may not."""
    attempts_max: int = 64
    """Pipelines that may break; refusals of full peers do not count, patience bounds them."""


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked. `prompt` are token ids; at most `tokens_max` new ones are made."""

    manifest_hash: str
    context_tokens: int
    prompt: tuple[int, ...]
    tokens_max: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    cache_salt: str | None = ""
    """What is computed may serve prompts that begin alike and have the same salt; with "" only this client's. None:
    nothing is kept."""
    yields: bool = False
    """It can wait: all other requests come first."""
    packing: str = "raw"
    """How activations are to travel, one of `pipeline.WISHES`."""
    drafts: int = 0
    """So many tokens are guessed ahead, where the text repeats itself."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("The prompt is empty: give at least one token.")
        if len(self.prompt) >= self.context_tokens:
            raise PromptTooLong(
                f"The prompt has {len(self.prompt)} tokens, but this model's context is {self.context_tokens} "
                "tokens, one of which must stay free for the answer. Shorten the prompt."
            )
        if self.tokens_max < 1:
            raise UsageError(f"At least one new token must be asked for, not {self.tokens_max}.")
        if len(self.stop_ids) > STOP_IDS_MAX:
            raise UsageError(f"At most {STOP_IDS_MAX} stop ids can be given, not {len(self.stop_ids)}.")
        if self.packing not in WISHES:
            raise UsageError(f"Activations are packed {', '.join(WISHES)}, not {self.packing!r}.")
        if not 0 <= self.drafts <= wire.DRAFTS_MAX:
            raise UsageError(f"From 0 to {wire.DRAFTS_MAX} tokens can be guessed ahead, not {self.drafts}.")
        if len(self.cache_salt or "") > SALT_CHARS_MAX:
            raise UsageError(f"A cache salt has at most {SALT_CHARS_MAX} characters, not {len(self.cache_salt or '')}.")

    @property
    def tokens_limit(self) -> int:
        """New tokens that fit: what was asked, cut to the context."""
        return min(self.tokens_max, self.context_tokens - len(self.prompt))


class Request:
    """The machine. Feed it messages about its sessions, `Gone` of its entry, and time.

    After each call look at `tokens` (grow only), `finish` and `error`; it is over when one of the last
    two is set. `session_ids` must give a fresh random id at each call.
    """

    def __init__(
        self, spec: RequestSpec, routes: Routes, session_ids: Callable[[], SessionId], config: RequestConfig, now: float
    ) -> None:
        self.spec = spec
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs | None] = []
        """Of each token, if they were asked for."""
        self.finish = ""
        self.error: HelixError | None = None
        self.cached = 0
        """Tokens of the prompt that did not have to be run for the first token."""
        self.session: SessionId | None = None
        self.entry: PeerId | None = None
        self.pipelines: list[Pipeline] = []
        """Every pipeline tried that did not refuse, in order: for the result and for people who want to know."""
        self._routes = routes
        self._new_session_id = session_ids
        self._config = config
        self._blocks: Chain = ()
        """The chain of the first of all tokens, as far as it was asked for."""
        self._masked: dict[PeerId, float] = {}
        self._too_small: set[PeerId] = set()
        """Who has no room for so many tokens, even alone."""
        self._too_long_at = NEVER
        """Since when nothing but that is in the way."""
        self._refused_at = NEVER
        """By full peers, for the first time since the last token."""
        self._was_routed = False
        self._preemptions = 0
        self._base = 0
        self._progress_at = now
        self._next_at = now
        self._pause_s = config.retry_s
        self._last_problem: HelixError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return bool(self.finish) or self.error is not None

    def deadline(self) -> float:
        """When `tick` wants to be called."""
        return NEVER if self.over else min(self._next_at, self._gives_up_at)

    @property
    def _gives_up_at(self) -> float:
        patience_s = self._config.patience_s if self._was_routed else self._config.unserved_s
        return min(self._progress_at + patience_s, self._too_long_at + self._config.too_long_s)

    def tick(self, now: float) -> list[Effect]:
        """Open, open again, or give up, as time demands."""
        if self.over:
            return []
        if now >= self._gives_up_at:
            return self._give_up(now)
        if now < self._next_at:
            return []
        if self.session is not None:
            silent = self.entry
            problem = DeadlineExceeded(f"The entry peer {_short(silent)} did not answer in time.")
            return self._retry((silent,) if silent else (), problem, now)
        return self._open(now)

    def receive(self, sender: PeerId, message: wire.Message | Outcome, now: float) -> list[Effect]:
        """Take a message in; what is not about the current session is ignored."""
        if self.over:
            return []
        if isinstance(message, Gone):
            if sender != self.entry or self.session is None:
                return []
            return self._retry((sender,), PeerGone(f"Lost the entry peer {_short(sender)}: {message.reason}"), now)
        if sender != self.entry or getattr(message, "session", None) != self.session:
            return []
        match message:
            case wire.Opened():
                self._too_long_at = NEVER
                self.cached = message.cached if not self.tokens else self.cached
                # Also comes again while a slow ring is alive: the entry vouches for it.
                self._progress_at, self._next_at = now, now + self._config.stall_s
            case wire.Token():
                return self._take(message, now)
            case wire.Refused():
                return self._refused(message, now)
            case wire.Broken():
                if message.code == wire.PREEMPTED:
                    return self._preempted(message, now)
                problem = PeerGone(message.reason or "The pipeline broke.")
                return self._retry(message.suspects, problem, now)
        return []

    def cancel(self) -> list[Effect]:
        """Stop: the swarm frees everything; tokens so far stay."""
        if self.over:
            return []
        self.finish = "cancelled"
        return self._abandon()

    def plan_changed(self, now: float) -> None:
        """News of the swarm came: if the request is waiting for a pipeline, try at once."""
        for peer in self._too_small:
            del self._masked[peer]  # it may hold fewer layers now, and have more room
        self._too_small.clear()
        if not self.over and self.session is None:
            self._next_at = now

    def _open(self, now: float) -> list[Effect]:
        if len(self.pipelines) - self._preemptions >= self._config.attempts_max:
            return self._give_up(now)
        # Whoever was refused there does not insist.
        chain = self._chain() if self._refused_at == NEVER else ()
        pipeline = self._routes.pick(self._avoided(now), chain)
        if isinstance(pipeline, str):
            if self._is_too_long(now):
                self._too_long_at = min(self._too_long_at, now)
            return self._wait(self._last_problem or SwarmTooSmall(pipeline), now)
        pipeline = packed(pipeline, self.spec.packing, self._routes.takes)
        self.pipelines.append(pipeline)
        self._was_routed = True
        self.session, self.entry = self._new_session_id(), pipeline[0].peer
        self._base = len(self.tokens)
        self._next_at = now + self._config.open_s
        message = wire.Open(
            session=self.session,
            pipeline=pipeline,
            manifest_hash=self.spec.manifest_hash,
            prompt=(*self.spec.prompt, *self.tokens),
            tokens_max=self.spec.tokens_limit - len(self.tokens),
            sampling=self.spec.sampling,
            stop_ids=self.spec.stop_ids,
            made=len(self.tokens),
            cache_salt=self.spec.cache_salt,
            yields=self.spec.yields,
            drafts=self.spec.drafts,
        )
        opened = Event("request.opened", {"attempt": len(self.pipelines), "stages": len(pipeline)})
        return [Send(self.entry, message), Emit(opened)]

    def _chain(self) -> Chain:
        """Of all tokens that there are, if what is computed of them may be used again."""
        if self.spec.cache_salt is not None:
            self._blocks = chain_of(self.spec.cache_salt, (*self.spec.prompt, *self.tokens), self._blocks)
        return self._blocks

    def _avoided(self, now: float) -> frozenset[PeerId]:
        return frozenset(peer for peer, until in self._masked.items() if until > now)

    def _is_too_long(self, now: float) -> bool:
        """Whether nothing but its length is in the way. Who has given tokens already waits as long as others."""
        return bool(self._too_small) and not self.tokens and self._avoided(now) == self._too_small

    def _take(self, message: wire.Token, now: float) -> list[Effect]:
        expected = len(self.tokens) - self._base
        if message.index < expected:
            return []
        if message.index > expected:
            gap = RemoteProtocolError(f"Token {message.index} came where {expected} was due.")
            return self._retry((), gap, now)
        self.tokens.append(message.token_id)
        if message.finish or not message.index:
            self._routes.ran(self.pipelines[-1], self._chain())
        self.logprobs.append(message.logprobs)
        self._progress_at, self._next_at = now, now + self._config.stall_s
        self._pause_s, self._refused_at = self._config.retry_s, NEVER
        if message.finish:
            self.finish = message.finish
            self.session = None
        return []

    def _refused(self, message: wire.Refused, now: float) -> list[Effect]:
        if message.code == "bad_request":
            self.error = UsageError(message.reason or "The swarm refused the request.")
            return self._abandon()
        if message.code == "manifest":
            self.error = ManifestMismatch(message.reason or "The peer serves other weights.")
            return self._abandon()
        pipeline = self.pipelines.pop()
        if message.code == "too_long":
            self._too_small.add(message.peer)
            return self._retry((message.peer,), self._too_long(message), now, masked_s=NEVER)
        self._too_long_at = NEVER
        problem = Busy(message.reason or f"Peer {_short(message.peer)} is {message.code}.")
        self._refused_at = min(self._refused_at, now)
        if message.code == "busy" and now < self._refused_at + self._config.turn_s and not self._avoided(now):
            self._routes.give_back(pipeline)
            return [*self._abandon(), *self._wait(problem, now)]
        return self._retry((message.peer,), problem, now, masked_s=self._pause_s)

    def _preempted(self, message: wire.Broken, now: float) -> list[Effect]:
        """Nothing is wrong but that there is little room: ask again after a pause, as who is refused does."""
        self._preemptions += 1
        told = Event("request.preempted", {"tokens": len(self.tokens)})
        return [*self._abandon(), Emit(told), *self._wait(Busy(message.reason or "The swarm is full."), now)]

    def _too_long(self, message: wire.Refused) -> CapacityError:
        return CapacityError(
            f"No way through the swarm has room for {len(self.spec.prompt)} prompt and {self.spec.tokens_limit} new "
            f"tokens (peer {_short(message.peer)}: {message.reason}). Ask for fewer, or shorten the prompt."
        )

    def _retry(
        self, suspects: Sequence[PeerId], problem: HelixError, now: float, masked_s: float = 10.0
    ) -> list[Effect]:
        for peer in suspects:
            self._masked[peer] = now + masked_s
        effects = self._abandon()
        self._last_problem = problem
        self._next_at = now
        lost = Event("request.retried", {"suspects": list(suspects), "why": str(problem), "tokens": len(self.tokens)})
        return [*effects, Emit(lost), *self._open(now)]

    def _abandon(self) -> list[Effect]:
        session, entry = self.session, self.entry
        self.session = None
        if session is None or entry is None:
            return []
        return [Send(entry, wire.Cancel(session=session))]

    def _wait(self, problem: HelixError, now: float) -> list[Effect]:
        self._last_problem = problem
        self._next_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._config.retry_s_max)
        return [Emit(Event("request.waiting", {"why": str(problem)}))]

    def _give_up(self, now: float) -> list[Effect]:
        if now >= self._too_long_at + self._config.too_long_s:
            self.error = self._last_problem
            return self._abandon()
        waited = now - self._progress_at
        problem = self._last_problem or NetworkError("No peer answered.")
        tried = f" over {len(self.pipelines)} attempts" if self.pipelines else ""
        advice = f" No token came for {waited:.0f} s{tried}; giving up."
        self.error = type(problem)(f"{problem}{advice}")
        return self._abandon()


def _short(peer: PeerId | None) -> str:
    return peer[-6:] if peer else "?"

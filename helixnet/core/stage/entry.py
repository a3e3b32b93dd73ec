"""The entry peer's part: opens every stage, feeds the prompt, closes the ring, streams to the client."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from helixnet.core.machine import NEVER, Effect, Send
from helixnet.core.prefix import BLOCK_TOKENS, Chain, blocks_before, chain_of
from helixnet.core.route.pipeline import check_pipeline
from helixnet.core.stage.batch import PREFILL_CHUNK_TOKENS
from helixnet.core.stage.drafts import ROWS_MAX, Drafter
from helixnet.core.stage.stage import StageMachine
from helixnet.core.stage.work import Work
from helixnet.core.types import PeerId, SessionId
from helixnet.core.wire import messages as wire


class EntryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the entry's patience."""

    reserve_s: float = 5.0
    """All stages must have answered a reservation within this."""
    ping_s: float = 2.0
    """Silence of the ring after which the stages are pinged; also the pause between pings."""
    pong_s: float = 6.0
    """A stage that answers no ping for this long is suspected."""
    stall_s: float = 120.0
    """Longest silence of the ring while all stages answer pings (a long prompt on a slow peer)."""
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS
    sessions_max: int = 256


@dataclass(slots=True)
class EntrySession:
    """A session this peer is the entry of."""

    client: PeerId
    open: wire.Open
    waiting: set[PeerId]
    """Stages that have not answered the reservation."""
    progress_at: float
    """When the ring last moved."""
    pinged_at: float
    chain: Chain
    """Of the whole blocks of the prompt."""
    cached: int
    """Tokens of the prompt that none of the stages that have answered needs to run."""
    heard_at: dict[PeerId, float] = field(default_factory=dict)
    """When each stage was last heard of."""
    made: list[int] = field(default_factory=list)
    """Tokens sent to the client."""
    drafter: Drafter | None = None
    """If drafts are wanted."""
    drafts: tuple[int, ...] = ()
    """Those of the step that goes round."""

    @property
    def position_due(self) -> int:
        """The position whose logits the next sample must come from."""
        return len(self.open.prompt) + len(self.made) - 1


class EntryMachine:
    """Works beside the stage machine of the same peer and queues tokens there."""

    def __init__(self, me: PeerId, stage: StageMachine, config: EntryConfig) -> None:
        self.me = me
        self.sessions: dict[SessionId, EntrySession] = {}
        self._stage = stage
        self._config = config
        self._due_at = NEVER
        """No session is due before; each may well be due later than when this was set."""

    # --- opening -----------------------------------------------------------------------------------

    def open(self, sender: PeerId, message: wire.Open, now: float) -> list[Effect]:
        """Ask every stage, ourselves too, to make room."""
        code, reason = self._objection(message)
        if code:
            return [Send(sender, wire.Refused(session=message.session, peer=self.me, code=code, reason=reason))]
        peers = [stage.peer for stage in message.pipeline]
        chain = _chain(sender, message, message.prompt)
        self.sessions[message.session] = EntrySession(
            client=sender,
            open=message,
            waiting=set(peers),
            progress_at=now,
            pinged_at=now,
            chain=chain,
            cached=blocks_before(len(message.prompt)) * BLOCK_TOKENS,
            heard_at=dict.fromkeys(peers, now),
            drafter=_drafter(message),
        )
        self._due_at = min(self._due_at, now + self._config.reserve_s)
        return [Send(peer, reserve) for peer, reserve in zip(peers, _reservations(sender, message, chain), strict=True)]

    def _objection(self, message: wire.Open) -> tuple[str, str]:
        manifest = self._stage.manifest
        if message.manifest_hash != manifest.hash:
            return "manifest", f"this swarm serves {manifest.name} with manifest {manifest.hash[:12]}"
        try:
            check_pipeline(message.pipeline, manifest.layers)
        except ValueError as error:
            return "bad_request", str(error)
        if message.pipeline[0].peer != self.me:
            return "bad_request", "the pipeline does not begin here"
        if len(message.prompt) + message.tokens_max > manifest.context_tokens:
            wanted = f"{len(message.prompt)} + {message.tokens_max} tokens"
            return "bad_request", f"{wanted} do not fit the context of {manifest.context_tokens}"
        if max(message.prompt) >= manifest.vocab_size:
            return "bad_request", f"a token id is not below the vocabulary size {manifest.vocab_size}"
        if message.session in self.sessions or len(self.sessions) >= self._config.sessions_max:
            return "busy", "too many sessions"
        return "", ""

    def reserved(self, sender: PeerId, message: wire.Reserved, now: float) -> list[Effect]:
        """One stage made room; when the last one has, the prompt goes in."""
        session = self._session(message.session, sender)
        if session is None:
            # The session ended meanwhile: what was reserved for it must not stay.
            return [Send(sender, wire.Release(session=message.session))]
        session.waiting.discard(sender)
        session.heard_at[sender] = now
        session.cached = min(session.cached, message.cached)
        if session.waiting:
            return []
        session.cached -= session.cached % BLOCK_TOKENS
        session.progress_at = now
        self._due_at = min(self._due_at, now + self._config.ping_s)
        effects: list[Effect] = [Send(session.client, wire.Opened(session=message.session, cached=session.cached))]
        prompt, chunk = session.open.prompt, self._config.prefill_chunk_tokens
        layers = session.open.pipeline[0].layers
        for start in range(session.cached, len(prompt), chunk):
            ids = prompt[start : start + chunk]
            last = start + len(ids) == len(prompt)
            work = Work(session=message.session, layers=layers, position=start, token_ids=ids, wanted=last)
            effects += self._stage.submit(work, now)
        return effects + self._stage.pump()

    def refused(self, sender: PeerId, message: wire.Refused) -> list[Effect]:
        """One stage has no room: tell the client, free the others."""
        session = self._session(message.session, sender)
        if session is None:
            return []
        return [Send(session.client, message), *self._end(message.session)]

    # --- running -----------------------------------------------------------------------------------

    def sampled(self, sender: PeerId, message: wire.Sampled, now: float) -> list[Effect]:
        """The ring closed for these sessions: pass the tokens on and go round again."""
        effects: list[Effect] = []
        for item in message.items:
            session = self.sessions.get(item.session)
            if session is None or session.open.pipeline[-1].peer != sender:
                continue
            if not 0 <= item.right <= len(session.drafts) or item.position != session.position_due + item.right:
                continue
            session.progress_at = session.heard_at[sender] = now
            effects += self._tokens(session, item)
            if item.session in self.sessions:
                effects += self._stage.submit(self._step(session), now)
        return effects + self._stage.pump()

    def _tokens(self, session: EntrySession, item: wire.SampledItem) -> list[Effect]:
        """Pass on the drafts that came true and the token after them, as far as the answer goes."""
        tokens = *session.drafts[: item.right], item.token_id
        if session.drafter is not None:
            session.drafter.judge(len(session.drafts), item.right)
            session.drafter.add(tokens)
        effects: list[Effect] = []
        for token_id in tokens:
            finish = ""
            if token_id in session.open.stop_ids:
                finish = "stop"
            elif len(session.made) + 1 >= session.open.tokens_max:
                finish = "length"
            token = wire.Token(
                session=item.session,
                index=len(session.made),
                token_id=token_id,
                finish=finish,
                logprobs=item.logprobs,
            )
            session.made.append(token_id)
            effects.append(Send(session.client, token))
            if finish:
                return [*effects, *self._end(item.session)]
        return effects

    def _step(self, session: EntrySession) -> Work:
        """The newest token goes round, with what may follow it."""
        if session.drafter is not None:
            left = session.open.tokens_max - len(session.made) - 1
            session.drafts = session.drafter.guess(min(left, ROWS_MAX // max(1, self._stage.decoding) - 1))
        return Work(
            session=session.open.session,
            layers=session.open.pipeline[0].layers,
            position=session.position_due,
            token_ids=(session.made[-1], *session.drafts),
            wanted=True,
            drafts=session.drafts,
            decode=True,
        )

    def pong(self, sender: PeerId, now: float) -> None:
        """A stage lives."""
        for session in self.sessions.values():
            if sender in session.heard_at:
                session.heard_at[sender] = now

    # --- ending ------------------------------------------------------------------------------------

    def cancel(self, sender: PeerId, message: wire.Cancel) -> list[Effect]:
        """The client wants no more."""
        session = self.sessions.get(message.session)
        return self._end(message.session) if session is not None and session.client == sender else []

    def broken(self, sender: PeerId, message: wire.Broken) -> list[Effect]:
        """A stage reports that the pipeline cannot go on."""
        session = self._session(message.session, sender)
        if session is None:
            return []
        return self._break(message.session, message.suspects, message.reason, message.code)

    def gone(self, peer: PeerId, reason: str) -> list[Effect]:
        """A client or a stage cannot be reached."""
        effects: list[Effect] = []
        for session_id, session in list(self.sessions.items()):
            if session.client == peer:
                effects += self._end(session_id)
            elif peer in session.heard_at:
                effects += self._break(session_id, (peer,), f"peer {peer[-6:]} is gone: {reason}")
        return effects

    def break_all(self, reason: str) -> list[Effect]:
        """End every session here, for instance because this peer leaves."""
        effects: list[Effect] = []
        for session_id in list(self.sessions):
            effects += self._break(session_id, (self.me,), reason)
        return effects

    def deadline(self) -> float:
        """Until when no ping, reservation or stall is due."""
        return self._due_at

    def _due(self, session: EntrySession) -> float:
        if session.waiting:
            return session.progress_at + self._config.reserve_s
        return max(session.progress_at, session.pinged_at) + self._config.ping_s

    def tick(self, now: float) -> list[Effect]:
        """Ping quiet rings, suspect the silent, end what has stalled."""
        if now < self._due_at:
            return []
        effects: list[Effect] = []
        for session_id, session in list(self.sessions.items()):
            if now >= self._due(session):
                effects += self._wake(session_id, session, now)
        self._due_at = min((self._due(session) for session in self.sessions.values()), default=NEVER)
        return effects

    def _wake(self, session_id: SessionId, session: EntrySession, now: float) -> list[Effect]:
        if session.waiting:
            return self._break(session_id, tuple(sorted(session.waiting)), "a stage did not answer the reservation")
        since = now - self._config.pong_s
        silent = tuple(p for p, heard in sorted(session.heard_at.items()) if p != self.me and heard < since)
        if silent and session.progress_at < since:
            return self._break(session_id, silent, "a stage fell silent")
        if now - session.progress_at >= self._config.stall_s:
            return self._break(session_id, (), f"no token for {self._config.stall_s:.0f} s")
        session.pinged_at = now
        others = [peer for peer in session.heard_at if peer != self.me]
        # The client hears Opened again: the entry vouches for a ring that is slow, not dead.
        alive = Send(session.client, wire.Opened(session=session_id, cached=session.cached))
        return [alive, *(Send(peer, wire.Ping(nonce=0)) for peer in others)]

    def _session(self, session_id: SessionId, sender: PeerId) -> EntrySession | None:
        session = self.sessions.get(session_id)
        return session if session is not None and sender in session.heard_at else None

    def _break(self, session_id: SessionId, suspects: tuple[PeerId, ...], reason: str, code: str = "") -> list[Effect]:
        client = self.sessions[session_id].client
        told = Send(client, wire.Broken(session=session_id, suspects=suspects, reason=reason, code=code))
        return [told, *self._end(session_id)]

    def _end(self, session_id: SessionId) -> list[Effect]:
        session = self.sessions.pop(session_id)
        whole = _chain(session.client, session.open, (*session.open.prompt, *session.made), session.chain)
        release = wire.Release(session=session_id, chain=whole[len(session.chain) :])
        return [Send(stage.peer, release) for stage in session.open.pipeline]


def _chain(client: PeerId, message: wire.Open, tokens: tuple[int, ...], known: Chain = ()) -> Chain:
    """Of the whole blocks of these tokens, if they may stay: for whoever has the same salt, or for this client."""
    if message.cache_salt is None:
        return ()
    return chain_of(f"salt {message.cache_salt}" if message.cache_salt else f"client {client}", tokens, known)


def _drafter(message: wire.Open) -> Drafter | None:
    """For a request that wants drafts. One that asks for log probabilities has none: they are told of one token."""
    if not message.drafts or message.sampling.logprobs is not None:
        return None
    return Drafter(message.prompt, message.drafts)


def _reservations(client: PeerId, message: wire.Open, chain: Chain) -> list[wire.Reserve]:
    """For each stage. Only the exit is told how to sample, and what came before only if that matters."""
    owner = blake2b(client.encode(), digest_size=8).hexdigest()
    reservations = [
        wire.Reserve(
            session=message.session,
            pipeline=message.pipeline,
            stage=stage,
            manifest_hash=message.manifest_hash,
            tokens_max=len(message.prompt) + message.tokens_max,
            prompt_tokens=len(message.prompt),
            made=message.made,
            owner=owner,
            yields=message.yields,
            chain=chain,
        )
        for stage in range(len(message.pipeline))
    ]
    at_exit = msgspec.structs.replace(reservations[-1], sampling=message.sampling)
    if message.sampling.looks_back:
        at_exit = msgspec.structs.replace(at_exit, prompt=message.prompt, stop_ids=message.stop_ids)
    return [*reservations[:-1], at_exit]

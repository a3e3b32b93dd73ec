"""The stage machine: reserves room, batches what arrives, hands on what comes out, frees what ends."""

from __future__ import annotations

from math import inf

import msgspec

from helixnet.core.errors import Busy, RemoteProtocolError
from helixnet.core.machine import (
    NEVER,
    BatchDone,
    DropLayers,
    Effect,
    Emit,
    Event,
    EvictKv,
    ExtendKv,
    LoadSpan,
    OpenKv,
    ReleaseKv,
    RunBatch,
    SealKv,
    Send,
)
from helixnet.core.model import Manifest
from helixnet.core.prefix import BLOCK_TOKENS, blocks_before
from helixnet.core.route.pipeline import check_pipeline
from helixnet.core.stage.batch import DECODE_BATCH_MAX, PREFILL_BUDGET_TOKENS, Batcher
from helixnet.core.stage.meter import Meter
from helixnet.core.stage.pages import PageLedger, Paging
from helixnet.core.stage.session import StageSession, block_ids, history_of
from helixnet.core.stage.work import Work
from helixnet.core.types import PeerId, SessionId, Span, runs
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import RAW, Activation, row_bytes
from helixnet.core.wire.codec import Lane

MOMENT_S = 1e-9
"""No batch takes less."""
BUSY_S = 5.0
"""How far back it goes how busy a stage has been: over some round trips of a token."""
SMOOTHING = 0.1
"""Weight of the newest batch in what a prompt token costs."""
BESIDE_ALONE, BESIDE_IN_PIPELINE = 0.75, 0.5
"""What a prompt may take beside decode steps, by what these take. Alone, a token waits for one piece, which may take
longer than was foretold; in a pipeline it may meet two, the one that runs when it comes and the one beside it."""


_Way = tuple[PeerId, bool, str]
"""Next hop, whether in the lane of decode steps, packing."""
_Onward = tuple[list[wire.StepItem], list[memoryview]]
"""What goes one way, and its rows."""


class StageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a stage."""

    idle_s: float = 120.0
    """A session that nothing was heard of for this long is released."""
    sessions_max: int = 256
    decode_batch_max: int = DECODE_BATCH_MAX
    prefill_budget_tokens: int = PREFILL_BUDGET_TOKENS
    backlog_s: float = 10.0
    """With prompts admitted that take longer than this, nobody else is: they wait where they hold no KV."""
    ahead_tokens: int = 64
    """So many tokens ahead of what it has, pages are taken for a session, where there are any."""
    full_share: float = 0.95
    """Of the pages: newcomers are not let in beyond. The rest is for those who are here, and those who go on."""
    yields_share: float = 0.7
    """The same for those who yield to all others."""


class StageMachine:
    """Runs the layers this peer holds for whoever opened a session here.

    `held` is what the engine has ready and `served` what new sessions may use of it (less, while a
    span drains).
    """

    def __init__(self, me: PeerId, manifest: Manifest, memory_bytes: int, config: StageConfig) -> None:
        self.me = me
        self.manifest = manifest
        self.memory_bytes = memory_bytes
        self.held: tuple[Span, ...] = ()
        self.served: tuple[Span, ...] = ()
        self.draining = False
        self.takes: tuple[str, ...] = (RAW,)
        """How activations may be packed that come or are to go."""
        self.ledger = PageLedger(manifest.kv_bytes)
        self.meter = Meter()
        self.sessions: dict[SessionId, StageSession] = {}
        self._config = config
        self._batcher = Batcher(config.decode_batch_max, config.prefill_budget_tokens)
        self._running: tuple[Work, ...] = ()
        self._idle_at = NEVER
        """No session has been idle for too long before; it only grows later while they are active."""
        self._in_line = 0
        """Prompt tokens of all sessions that have not run here yet."""
        self.decoding = 0
        """Sessions whose prompt has run here."""
        self._elsewhere = 0
        """Sessions that have other stages, too."""
        self._share = 0.0
        """Decode steps that would be in hand here if every session spent as long at each of its stages."""
        self._busy = 0.0
        """Share of its time lately in which the engine ran."""
        self._done_at = 0.0
        self._prompt_token_s = 0.0
        """What one costs lately, with the decode steps beside it ..."""
        self._token_s = 0.0
        """... and without."""
        self._decode_s = 0.0
        """What a batch takes lately that has no prompts in it."""

    # --- what it holds -----------------------------------------------------------------------------

    def set_engine(self, memory_bytes: int, paging: Paging, takes: tuple[str, ...]) -> None:
        """What the engine has for weights and KV, how it divides that, and what it takes; before anything is loaded."""
        self.memory_bytes, self.takes = memory_bytes, takes
        self.ledger = PageLedger(self.manifest.kv_bytes, paging)

    def set_held(self, held: tuple[Span, ...], served: tuple[Span, ...]) -> None:
        """The engine loaded or dropped layers: the rest of the memory is KV room."""
        self.held, self.served = held, served
        self._give_to_kv(held)

    def load(self, span: Span) -> list[Effect]:
        """Have these layers loaded, too: from now on, what they take is no longer KV room."""
        held = runs(layer for one in (*self.held, span) for layer in one.layers())
        effects: list[Effect] = []
        if self._weights(held) <= self.memory_bytes:  # otherwise the engine says so, and nothing has changed
            self._give_to_kv(held)
            while self.ledger.used > self.ledger.capacity and self.sessions:
                effects += self._preempt("layers that the plan moves here need its KV pages")
        return [*effects, *self._evicted(), LoadSpan(span)]

    def drop(self, keep: Span | None) -> list[Effect]:
        """Have all layers outside `keep` dropped, and what is cached of them."""
        self.ledger.forget(keep)
        return [*self._evicted(), DropLayers(keep)]

    def _give_to_kv(self, held: tuple[Span, ...]) -> None:
        """What the weights of these layers leave."""
        self.ledger.resize(self.memory_bytes - self._weights(held), sum(map(len, held)))

    def _weights(self, held: tuple[Span, ...]) -> int:
        return sum(self.manifest.span_bytes(span.start, span.stop) for span in held)

    def uses_outside(self, keep: Span | None) -> bool:
        """Whether a session here still runs layers outside `keep`."""
        return any(keep is None or not keep.holds(session.layers) for session in self.sessions.values())

    # --- machine -----------------------------------------------------------------------------------

    def deadline(self) -> float:
        """Until when no session has been idle for too long."""
        return self._idle_at

    def tick(self, now: float) -> list[Effect]:
        """Release idle sessions."""
        if now < self._idle_at:
            return []
        idle = [s.session for s in self.sessions.values() if now >= s.active_at + self._config.idle_s]
        effects: list[Effect] = []
        for session in idle:
            effects += [Emit(Event("session.idle", {"session": session})), *self.release(session)]
        self._idle_at = min((s.active_at for s in self.sessions.values()), default=NEVER) + self._config.idle_s
        return effects

    def reserve(self, sender: PeerId, message: wire.Reserve, now: float) -> list[Effect]:
        """Make room for a session or refuse it; nothing is half-opened."""
        code, reason = self._objection(message)
        blocks = block_ids(message.pipeline, message.stage, message.chain) if not code else ()
        taken = self.ledger.begun(blocks[: blocks_before(message.prompt_tokens)])
        if not code:
            layers = message.pipeline[message.stage].layers
            room = min(message.tokens_max, message.prompt_tokens + self._config.ahead_tokens)
            share_max = self._config.yields_share if message.yields else self._config.full_share
            share_max = 1.0 if message.made else share_max
            try:
                self.ledger.reserve(message.session, layers, room, share_max, blocks[:taken])
            except Busy as busy:
                code, reason = "busy", str(busy)
        if code:
            return [Send(sender, wire.Refused(session=message.session, peer=self.me, code=code, reason=reason))]
        cached = taken * BLOCK_TOKENS
        self._share += 1 / len(message.pipeline)
        self._elsewhere += len(message.pipeline) > 1
        self.sessions[message.session] = StageSession(
            session=message.session,
            pipeline=message.pipeline,
            stage=message.stage,
            tokens_max=message.tokens_max,
            prompt_left=message.prompt_tokens - cached,
            sampling=message.sampling,
            history=history_of(message),
            active_at=now,
            owner=message.owner,
            yields=message.yields,
            blocks=blocks,
            taken=taken,
        )
        self._in_line += message.prompt_tokens - cached
        self._idle_at = min(self._idle_at, now + self._config.idle_s)
        return [*self._evicted(), Send(sender, wire.Reserved(session=message.session, cached=cached))]

    def _objection(self, message: wire.Reserve) -> tuple[str, str]:
        """Why the reservation cannot be: (code, reason); empty strings if it can."""
        if message.manifest_hash != self.manifest.hash:
            return "manifest", f"this peer serves {self.manifest.name} with manifest {self.manifest.hash[:12]}"
        try:
            check_pipeline(message.pipeline, self.manifest.layers)
        except ValueError as error:
            return "bad_request", str(error)
        mine = message.pipeline[message.stage]
        if mine.peer != self.me:
            return "bad_request", "the reservation is for another peer"
        if message.stage == len(message.pipeline) - 1 and message.sampling is None:
            return "bad_request", "the exit was not told how to sample"
        packings = {mine.sends, message.pipeline[message.stage - 1].sends if message.stage else RAW}
        if not packings <= set(self.takes):
            return "not_held", f"this peer does not pack activations as {', '.join(sorted(packings))}"
        if self.draining:
            return "draining", "this peer is leaving"
        if not any(span.holds(mine.layers) for span in self.served):
            return "not_held", f"layers {mine.layers} are not served here"
        room = self.ledger.tokens_max(mine.layers)
        if self.held == self.served and message.tokens_max > room:
            return "too_long", f"{message.tokens_max} tokens, and this peer has KV room for {room} at most"
        if message.session in self.sessions or len(self.sessions) >= self._config.sessions_max:
            return "busy", "too many sessions"
        if self._in_line * self._prompt_token_s > self._config.backlog_s:
            return "busy", f"{self._in_line} prompt tokens are in line"
        return "", ""

    def steps(self, sender: PeerId, message: wire.Steps, body: memoryview, now: float) -> list[Effect]:
        """Take activations in from the stage before.

        Raises:
            RemoteProtocolError: the body is not what the items announce.
        """
        dtype, width, packing = self.manifest.dtype, self.manifest.hidden_size, message.packing
        row = row_bytes(packing, dtype, width)
        _check_rows(message, row, body)
        effects: list[Effect] = []
        start, taken = 0, 0
        for item in message.items:
            session_id, tokens = item.session, item.tokens
            stop = start + tokens * row
            rows, start = body[start:stop], stop
            session = self.sessions.get(session_id)
            if session is None or session.previous_hop != sender or session.takes != packing:
                lost = wire.Broken(session=session_id, suspects=(self.me,), reason="the stage has no such session")
                effects.append(Send(sender, lost))
                continue
            effects += self._advance(session, item.position, tokens, now, len(item.drafts))
            if session_id not in self.sessions:
                continue
            taken += session.came
            self._batcher.add(
                Work(
                    session=session_id,
                    layers=session.layers,
                    position=item.position,
                    activation=Activation(dtype, tokens, width, rows, packing),
                    sample=session.sampling if item.sample and session.next_hop is None else None,
                    history=session.history,
                    wanted=item.sample,
                    packing=session.sends,
                    drafts=item.drafts,
                    decode=item.decode,
                ),
                session.owner,
                session.yields,
            )
        if taken:
            self.meter.count(sender, taken, now)
        return effects + self.pump()

    def submit(self, work: Work, now: float) -> list[Effect]:
        """Queue tokens at the first stage, for the entry. Call `pump` afterwards."""
        session = self.sessions.get(work.session)
        if session is None:
            return []
        effects = self._advance(session, work.position, work.tokens, now, len(work.drafts))
        if work.session not in self.sessions:
            return effects
        self.meter.count(None, session.came, now)
        if work.wanted and session.next_hop is None:
            work = msgspec.structs.replace(work, sample=session.sampling, history=session.history)
        elif session.sends:
            work = msgspec.structs.replace(work, packing=session.sends)
        self._batcher.add(work, session.owner, session.yields)
        return effects

    def _advance(self, session: StageSession, position: int, tokens: int, now: float, drafts: int) -> list[Effect]:
        """So many tokens of a session came for `position`: it has room for them now, or is gone."""
        effects = [] if session.has_begun else self._begin(session, position)
        problem = session.advance(position, tokens, now, drafts)
        if problem:
            return effects + self._broken(session, (), problem)
        has_room = session.next_position <= self.ledger.tokens(session.session)
        return effects if has_room else effects + self._make_room(session)

    def _begin(self, session: StageSession, position: int) -> list[Effect]:
        """The first tokens of a session came: they tell how many of its blocks all stages have."""
        count = position // BLOCK_TOKENS
        if position % BLOCK_TOKENS or count > session.taken:
            return []  # which is not where it can begin
        session.has_begun, session.next_position, session.sealed = True, position, count
        again = session.taken * BLOCK_TOKENS - position
        session.prompt_left += again
        self._in_line += again
        self.ledger.cut(session.session, count)
        room = self.ledger.tokens(session.session)
        return [*self._evicted(), OpenKv(session.session, session.layers, room, session.blocks[:count])]

    def _make_room(self, session: StageSession) -> list[Effect]:
        """Pages for what just came of a session, and some ahead; if there are none, whoever has come least far goes.

        All stages choose by the same rule, so whoever has come farthest always goes on.
        """
        effects: list[Effect] = []
        needed = session.next_position
        while True:
            for tokens in (min(session.tokens_max, needed + self._config.ahead_tokens), needed):
                if self.ledger.extend(session.session, tokens):
                    return [*effects, *self._evicted(), ExtendKv(session.session, tokens)]
            effects += self._preempt("requests that had come farther needed its KV pages")
            if session.session not in self.sessions:
                return effects

    def _preempt(self, why: str) -> list[Effect]:
        """Whoever yields, or else has come least far, goes, and comes again when there is room."""
        goes = min(self.sessions.values(), key=lambda one: (not one.yields, one.next_position, one.session))
        return self._broken(goes, (), why, wire.PREEMPTED)

    def pump(self) -> list[Effect]:
        """Start the next batch if the engine is free."""
        if self._running:
            return []
        self._running = self._batcher.take(self._share, self._busy, self._beside)
        return [RunBatch(self._running)] if self._running else []

    @property
    def _beside(self) -> float:
        """Tokens that each prompt in line may bring to a batch."""
        if not self.decoding or not self._decode_s or not self._token_s:
            return inf
        share = BESIDE_IN_PIPELINE if self._elsewhere else BESIDE_ALONE
        return share * self._decode_s / self._token_s

    def done(self, outcome: BatchDone, now: float) -> list[Effect]:
        """Hand on what the engine made, one frame for each next hop and lane; start the next batch."""
        batch, self._running = self._running, ()
        self._count_busy(outcome.seconds, now)
        self._count_prompts(batch, outcome.seconds)
        effects: list[Effect] = []
        onward: dict[_Way, _Onward] = {}
        sampled: dict[PeerId, list[wire.SampledItem]] = {}
        for work, result in zip(batch, outcome.results, strict=True):
            session = self.sessions.get(work.session)
            if session is None:
                continue  # released while it ran
            activation = result.activation
            if result.error is not None:
                effects += self._broken(session, (self.me,), f"the engine failed: {result.error}")
                continue
            session.done_position = work.position + work.tokens - len(work.drafts)
            if session.sealed < len(session.blocks):
                effects += self._seal(session)
            if result.token_id is not None:
                if session.history is not None:
                    session.history.made += (*work.drafts[: result.right], result.token_id)
                last = session.done_position - 1 + result.right
                item = wire.SampledItem(work.session, last, result.token_id, result.logprobs, result.right)
                sampled.setdefault(session.entry, []).append(item)
            elif activation is not None and session.next_hop is not None:
                way = session.next_hop, work.decode, session.sends
                items, rows = onward.get(way) or onward.setdefault(way, ([], []))
                row = work.session, work.position, activation.tokens, work.wanted, work.decode, work.drafts
                items.append(wire.StepItem(*row))
                rows.append(activation.data)
        # Where a token goes round through this very stage, it comes back before anything else is started.
        started = self.pump() if self.me not in sampled else []
        effects += [Send(entry, wire.Sampled(items=tuple(items))) for entry, items in sampled.items()]
        for (peer, decode, packing), (items, rows) in onward.items():
            body = memoryview(rows[0] if len(rows) == 1 else b"".join(rows))
            steps = wire.Steps(items=tuple(items), packing=packing)
            effects.append(Send(peer, steps, body, Lane.TOKEN if decode else Lane.PREFILL))
        return started + effects

    def _count_busy(self, seconds: float, now: float) -> None:
        """A batch ended: so long it ran, and all the time since the last one is over."""
        passed = max(seconds, now - self._done_at, MOMENT_S)
        self._busy += passed / (passed + BUSY_S) * (seconds / passed - self._busy)
        self._done_at = now

    def _count_prompts(self, batch: tuple[Work, ...], seconds: float) -> None:
        """Prompt tokens that ran are no longer in line; remember what they cost."""
        prompts = [work for work in batch if not work.decode]
        if not prompts:
            self._decode_s += SMOOTHING * (seconds - self._decode_s) if self._decode_s else seconds
            return
        tokens = sum([work.tokens for work in prompts])
        self._prompt_token_s += SMOOTHING * (seconds / tokens - self._prompt_token_s)
        beyond = max(MOMENT_S, seconds - self._decode_s)  # reading the weights once takes as long for one as for many
        self._token_s += SMOOTHING * (beyond / tokens - self._token_s) if self._token_s else beyond / tokens
        for work in prompts:
            session = self.sessions.get(work.session)
            if session is not None:
                ran = min(session.prompt_left, work.tokens)
                session.prompt_left -= ran
                self._in_line -= ran
                self.decoding += ran > 0 and not session.prompt_left

    def _seal(self, session: StageSession) -> list[Effect]:
        """Whole blocks that have run may be shared."""
        last = min(len(session.blocks), session.done_position // BLOCK_TOKENS)
        whole = [(place, session.blocks[place]) for place in range(session.sealed, last)]
        fresh = tuple(one for one in whole if self.ledger.seal(session.session, *one))
        session.sealed = max(session.sealed, last)
        return [SealKv(session.session, fresh)] if fresh else []

    def end(self, message: wire.Release) -> list[Effect]:
        """The entry needs a session no more: whole blocks of its answer may stay, too."""
        session = self.sessions[message.session]
        session.blocks += block_ids(session.pipeline, session.stage, message.chain)
        return [*self._seal(session), *self.release(message.session)]

    def release(self, session_id: SessionId) -> list[Effect]:
        """Free everything of a session; unknown ones are ignored."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return []
        self._in_line -= session.prompt_left
        self.decoding -= not session.prompt_left
        self._elsewhere -= len(session.pipeline) > 1
        self._share = self._share - 1 / len(session.pipeline) if self.sessions else 0.0
        self._batcher.forget(session_id)
        self.ledger.release(session_id)
        return [*self._evicted(), *([ReleaseKv(session_id)] if session.has_begun else [])]

    def _evicted(self) -> list[Effect]:
        """What the engine has to know of blocks that went because their pages were needed."""
        blocks = self.ledger.take_evicted()
        return [EvictKv(blocks)] if blocks else []

    def gone(self, peer: PeerId, reason: str) -> list[Effect]:
        """A peer cannot be reached: free what it began, report what cannot go on because of it."""
        effects: list[Effect] = []
        for session in list(self.sessions.values()):
            if session.entry == peer:
                effects += self.release(session.session)
            elif session.next_hop == peer:
                effects += self._broken(session, (peer,), f"peer {peer[-6:]} is gone: {reason}")
        return effects

    def broken(self, sender: PeerId, message: wire.Broken) -> list[Effect]:
        """The next hop cannot go on: tell the entry."""
        session = self.sessions.get(message.session)
        if session is None or session.next_hop != sender:
            return []
        return self._broken(session, message.suspects, message.reason, message.code)

    def break_outside(self, keep: Span | None, reason: str) -> list[Effect]:
        """End the sessions that run layers outside `keep`: their clients go on elsewhere."""
        effects: list[Effect] = []
        for session in list(self.sessions.values()):
            if keep is None or not keep.holds(session.layers):
                effects += self._broken(session, (self.me,), reason)
        return effects

    def _broken(self, session: StageSession, suspects: tuple[PeerId, ...], reason: str, code: str = "") -> list[Effect]:
        broken = wire.Broken(session=session.session, suspects=suspects, reason=reason, code=code)
        told = Send(session.entry, broken)
        return [told, *self.release(session.session)]


def _check_rows(message: wire.Steps, row: int, body: memoryview) -> None:
    tokens = 0
    for item in message.items:
        if item.tokens < 1 or item.position < 0:
            raise RemoteProtocolError("a step has no tokens or a negative position")
        if item.drafts and (not item.decode or len(item.drafts) != min(item.tokens - 1, wire.DRAFTS_MAX)):
            raise RemoteProtocolError("a step has drafts that are not those of its tokens")
        tokens += item.tokens
    if not row or tokens * row != body.nbytes:
        raise RemoteProtocolError("the activations are not as long as their frame announces")

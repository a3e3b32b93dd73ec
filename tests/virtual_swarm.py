"""A whole swarm of real `Peer` machines and `Request` clients in virtual time, with a toy engine and planner.

Messages are really encoded and decoded; links can be cut, peers killed. Nothing here sleeps: time is a number.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from helixnet.core.machine import (
    BatchDone,
    DropLayers,
    Dropped,
    Effect,
    Emit,
    Event,
    EvictKv,
    ExtendKv,
    Gone,
    KvEffect,
    Loaded,
    LoadSpan,
    OpenKv,
    Outcome,
    Publish,
    ReleaseKv,
    RunBatch,
    SealKv,
    Send,
    Solve,
    Solved,
)
from helixnet.core.model import Manifest
from helixnet.core.peer import Peer, PeerConfig, PeerFacts
from helixnet.core.plan.plan import Assignment, Flow, Placement, Prediction, uncovered
from helixnet.core.plan.snapshot import Snapshot
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.route.follow import SwarmView
from helixnet.core.route.request import Request, RequestConfig, RequestSpec
from helixnet.core.stage.work import Done, Work
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.swarm.records import decode_record
from helixnet.core.types import BlockId, PeerId, SessionId, Span, runs
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import Activation
from helixnet.core.wire.coding import decode_message, encode_message

LAYERS = 6
HOP_S = 0.01
NO_BODY = memoryview(b"")
STEP_S = 0.02
READ_S = 2.0

MANIFEST = Manifest(
    name="toy",
    architecture="Toy",
    layers=LAYERS,
    hidden_size=8,
    vocab_size=100_000,
    context_tokens=512,
    kv_heads=1,
    head_dim=8,
    dtype="float32",
    layer_bytes=1_000_000,
    embedding_bytes=0,
    head_bytes=0,
    source_format="safetensors",
    config_sha256="",
    tokenizer_sha256="",
    weights_sha256="",
)


def capability(memory_bytes: int) -> Capability:
    """A plausible small device."""
    curve = (RatePoint(1, 0.001),)
    return Capability(
        device="toy",
        matmul_flops=1e9,
        memory_bandwidth=1e9,
        decode=curve,
        prefill=curve,
        memory_bytes=memory_bytes,
    )


WORDS = 1 << 16
"""The toy model's; with few, its texts repeat themselves."""


def toy_output(prompt: tuple[int, ...], count: int, layers: int = LAYERS, words: int = WORDS) -> list[int]:
    """What the toy model says after `prompt`: each token depends on all before it and on every layer."""
    tokens = list(prompt)
    for _ in range(count):
        state = b""
        for token in tokens:
            state = _mix(state, token)
        for layer in range(layers):
            state = hashlib.sha256(state + bytes([layer])).digest()
        tokens.append(int.from_bytes(state[:2], "big") % words)
    return tokens[len(prompt) :]


def _mix(state: bytes, token: int) -> bytes:
    return hashlib.sha256(state + token.to_bytes(4, "big")).digest()


class ToyEngine:
    """Layers as hashes. The first stage's "KV" is the digest of all tokens so far, so a gap shows at once."""

    def __init__(self, words: int = WORDS) -> None:
        self.words = words
        self.loaded: set[int] = set()
        self.drafted: dict[SessionId, dict[int, bytes]] = {}
        """The first stage's KV before each draft, by its position."""
        self.kv: dict[SessionId, tuple[Span, int, bytes]] = {}
        self.ends: dict[tuple[SessionId, int], bytes] = {}
        """The first stage's KV at the end of each block."""
        self.blocks: dict[BlockId, tuple[Span, int, bytes]] = {}

    def held(self) -> tuple[Span, ...]:
        """Maximal runs of loaded layers."""
        return runs(self.loaded)

    def make_room(self, effect: KvEffect) -> None:
        """Open, extend, seal, evict or release."""
        match effect:
            case OpenKv():
                begun = self.blocks[effect.begun[-1]] if effect.begun else (effect.layers, 0, b"")
                assert begun[:2] == (effect.layers, BLOCK_TOKENS * len(effect.begun))
                self.kv[effect.session] = begun
            case ExtendKv():
                assert effect.session in self.kv
            case SealKv():
                for place, block in effect.blocks:
                    span, filled, _ = self.kv[effect.session]
                    end = BLOCK_TOKENS * (place + 1)
                    assert filled >= end and block not in self.blocks
                    self.blocks[block] = (span, end, self.ends.get((effect.session, end), b""))
            case EvictKv():
                for block in effect.blocks:
                    del self.blocks[block]
            case ReleaseKv():
                self.kv.pop(effect.session, None)
                self.drafted.pop(effect.session, None)

    def run(self, work: Work) -> Done:
        """One item through its layers: the digest of the last token travels as the activation."""
        if not set(work.layers.layers()) <= self.loaded:
            return Done(session=work.session, error="layers not loaded")
        span, position, state = self.kv[work.session]
        if work.position in self.drafted.get(work.session, {}):
            position, state = work.position, self.drafted[work.session][work.position]
        if span != work.layers or position != work.position:
            return Done(session=work.session, error=f"position {work.position} where {position} was due")
        states: list[bytes] = []
        self.drafted[work.session] = {}
        for row in range(work.tokens):
            if row and work.drafts:
                self.drafted[work.session][position] = state
            position += 1
            if work.token_ids is not None:
                state = _mix(state, work.token_ids[row])
                digest = state
                self.ends[work.session, position] = state
            else:
                assert work.activation is not None
                digest = bytes(work.activation.data[row * 32 : row * 32 + 32])
            for layer in work.layers.layers():
                digest = hashlib.sha256(digest + bytes([layer])).digest()
            states.append(digest)
        self.kv[work.session] = (span, position, state)
        if work.layers.stop == LAYERS:
            if work.sample is None:
                return Done(session=work.session)
            tokens = [int.from_bytes(one[:2], "big") % self.words for one in states[-1 - len(work.drafts) :]]
            right = next(place for place, token in enumerate(tokens) if token not in work.drafts[place : place + 1])
            return Done(session=work.session, token_id=tokens[right], right=right)
        return Done(
            session=work.session, activation=Activation("float32", work.tokens, 8, memoryview(b"".join(states)))
        )


def toy_plan(snapshot: Snapshot) -> Placement | str:
    """Spans one after the other, as long as memory allows, until every layer is covered; then again."""
    manifest = snapshot.manifest
    assignments: list[Assignment] = []
    reached = 0
    for view in snapshot.peers:
        bytes_left = view.capability.memory_bytes * 3 // 4 - manifest.embedding_bytes
        room = min(manifest.layers, bytes_left // manifest.layer_bytes)
        if room < 1:
            continue
        start = reached % manifest.layers
        span = Span(start, min(manifest.layers, start + room))
        assignments.append(Assignment(view.peer, span))
        reached = span.stop % manifest.layers
    gaps = uncovered([a.span for a in assignments], manifest.layers)
    if gaps:
        return f"layers {', '.join(map(str, gaps))} are uncovered"
    return Placement(
        assignments=tuple(assignments), flows=_toy_flows(assignments, manifest.layers), prediction=_toy_prediction()
    )


def _toy_flows(assignments: list[Assignment], layers: int) -> tuple[Flow, ...]:
    flows = [Flow(None, a.peer, 1.0) for a in assignments if a.span.start == 0]
    for a in assignments:
        for b in assignments:
            if b.span.start <= a.span.stop < b.span.stop:
                flows.append(Flow(a.peer, b.peer, 1.0))
        if a.span.stop == layers:
            flows.append(Flow(a.peer, None, 1.0))
    return tuple(flows)


def _toy_prediction() -> Prediction:
    return Prediction(tokens_per_s=10.0, bound_tokens_per_s=10.0, ttft_s=0.1, tpot_s=0.1)


@dataclass
class Client:
    """A request and the view it routes by."""

    name: PeerId
    request: Request
    followed: SwarmView
    events: list[Event] = field(default_factory=list)


class VirtualSwarm:
    """The event heap. `at` schedules, `run_until` lets time pass."""

    def __init__(self, seed: int = 0, config: PeerConfig | None = None, words: int = WORDS) -> None:
        self.now = 0.0
        self.words = words
        self.rng = random.Random(seed)
        self.config = config or PeerConfig()
        self.peers: dict[PeerId, Peer] = {}
        self.engines: dict[PeerId, ToyEngine] = {}
        self.clients: dict[PeerId, Client] = {}
        self.directory: dict[str, dict[PeerId, tuple[float, bytes]]] = {}
        self.cuts: set[frozenset[PeerId]] = set()
        self.events: list[tuple[float, PeerId, Event]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # --- building ----------------------------------------------------------------------------------

    def join(self, name: str, layers_room: int) -> Peer:
        """A peer with memory for so many layers (and a third as much again for KV) joins."""
        me = PeerId(name)
        memory = layers_room * MANIFEST.layer_bytes * 4 // 3
        facts = PeerFacts(peer=me, name=name, network="test", manifest=MANIFEST, memory_bytes=memory)
        peer = Peer(facts, self.config, self.now)
        peer.addresses = (f"/memory/{name}",)
        self.peers[me] = peer
        self.engines[me] = ToyEngine(self.words)
        self._read_directory(me)
        self._apply(me, peer.measured(capability(memory), self.now))
        self._tick(me)
        return peer

    def kill(self, name: str) -> None:
        """The peer dies without a word; whoever talked with it notices that the channel broke."""
        dead = PeerId(name)
        del self.peers[dead], self.engines[dead]
        for other in [*self.peers, *self.clients]:
            self.at(HOP_S, lambda other=other: self._receive(dead, other, Gone("connection reset")))  # type: ignore[misc]

    def cut(self, a: str, b: str) -> None:
        """Nothing travels between the two any more, and nobody is told."""
        self.cuts.add(frozenset((PeerId(a), PeerId(b))))

    def ask(
        self,
        name: str,
        prompt: tuple[int, ...],
        tokens_max: int,
        config: RequestConfig | None = None,
        drafts: int = 0,
    ) -> Request:
        """A client asks; it follows the view of any live peer."""
        me = PeerId(name)
        spec = RequestSpec(
            manifest_hash=MANIFEST.hash,
            context_tokens=MANIFEST.context_tokens,
            prompt=prompt,
            tokens_max=tokens_max,
            drafts=drafts,
        )
        ids = (SessionId(f"{name}-{number}") for number in itertools.count())

        followed = SwarmView(self.rng)
        request = Request(spec, followed, lambda: next(ids), config or RequestConfig(), self.now)
        self.clients[me] = Client(me, request, followed)
        self._client_tick(me)
        return request

    # --- time --------------------------------------------------------------------------------------

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def run_until(self, condition: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Let time pass until the condition holds; fails if it does not within `limit_s`."""
        end = self.now + limit_s
        while not condition():
            assert self._heap and self._heap[0][0] <= end, f"nothing came of it by {end:.1f} s of virtual time"
            self.now, _, action = heapq.heappop(self._heap)
            action()

    def run_for(self, seconds: float) -> None:
        """Let so much time pass."""
        reached: list[bool] = []
        self.at(seconds, lambda: reached.append(True))
        self.run_until(lambda: bool(reached), seconds + 1)

    # --- driving -----------------------------------------------------------------------------------

    def _tick(self, me: PeerId) -> None:
        peer = self.peers.get(me)
        if peer is None:
            return
        if self.rng.random() < 0.3:
            self._read_directory(me)
        self._apply(me, peer.tick(self.now))
        self.at(max(0.001, min(1.0, peer.deadline() - self.now)), lambda: self._tick(me))

    def _read_directory(self, me: PeerId) -> None:
        for key in self.peers[me].keys_to_read(READ_S, self.now):
            entries = self.directory.get(key, {})
            records = [
                decode_record(owner, value)
                for owner, (expires, value) in sorted(entries.items())
                if expires > self.now and frozenset((owner, me)) not in self.cuts
            ]
            self._apply(me, self.peers[me].listed(records, self.now, key))

    def _apply(self, me: PeerId, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(me, effect)
                case Publish():
                    entry = (self.now + effect.lifetime_s, effect.value)
                    self.directory.setdefault(effect.key, {})[me] = entry
                case Emit():
                    self.events.append((self.now, me, effect.event))
                case Solve():
                    self._outcome(me, 0.05, self._solve(effect))
                case _:
                    self._compute(me, effect)

    def _solve(self, effect: Solve) -> Solved:
        answer = toy_plan(effect.snapshot)
        if isinstance(answer, str):
            return Solved(None, effect.current, answer)
        return Solved(answer, effect.current)

    def _compute(self, me: PeerId, effect: Effect) -> None:
        engine = self.engines[me]
        match effect:
            case RunBatch():
                results = tuple(engine.run(work) for work in effect.batch)
                self._outcome(me, STEP_S, BatchDone(results, STEP_S))
            case OpenKv() | ExtendKv() | SealKv() | EvictKv() | ReleaseKv():
                engine.make_room(effect)
            case LoadSpan():
                engine.loaded |= set(effect.span.layers())
                self._outcome(me, 0.5, Loaded(engine.held()))
            case DropLayers():
                engine.loaded &= set(effect.keep.layers()) if effect.keep else set()
                self._outcome(me, 0.01, Dropped(engine.held()))

    def _outcome(self, me: PeerId, delay_s: float, outcome: Outcome) -> None:
        self.at(delay_s, lambda: self._receive(me, me, outcome))

    def _send(self, me: PeerId, effect: Send) -> None:
        message = decode_message(encode_message(effect.message))
        delay_s = 0.0 if effect.to == me else HOP_S
        if frozenset((me, effect.to)) in self.cuts:
            return
        if effect.to not in self.peers and effect.to not in self.clients:
            self.at(delay_s, lambda: self._receive(effect.to, me, Gone("cannot be reached")))
            return
        self.at(delay_s, lambda: self._receive(me, effect.to, message, memoryview(bytes(effect.body))))

    def _receive(self, sender: PeerId, to: PeerId, message: wire.Message | Outcome, body: memoryview = NO_BODY) -> None:
        if to in self.peers:
            self._apply(to, self.peers[to].receive(sender, message, self.now, body))
        elif to in self.clients:
            self._client_receive(sender, to, message)

    # --- clients -----------------------------------------------------------------------------------

    def _client_tick(self, me: PeerId) -> None:
        client = self.clients[me]
        if client.request.over:
            return
        view = client.followed.view
        known = view.coordinator if view is not None and view.coordinator in self.peers else None
        for peer in [known] if known is not None else sorted(self.peers)[:1]:
            self._send(me, Send(peer, wire.GetView()))
        self._client_apply(me, client.request.tick(self.now))
        self.at(0.25, lambda: self._client_tick(me))

    def _client_receive(self, sender: PeerId, me: PeerId, message: wire.Message | Outcome) -> None:
        client = self.clients[me]
        if isinstance(message, wire.View):
            client.followed.take(message, self.now, sender)
            client.request.plan_changed(self.now)
        self._client_apply(me, client.request.receive(sender, message, self.now))

    def _client_apply(self, me: PeerId, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(me, effect)
            elif isinstance(effect, Emit):
                self.clients[me].events.append(effect.event)

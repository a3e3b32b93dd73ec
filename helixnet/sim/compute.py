"""Devices under virtual time: seconds come from curves or tables, contents from digests instead of hidden states.

A row of an activation is a digest of all tokens so far, the layer it has reached and its position, so that a wrong
layer, a gap in the KV or a mixed-up session shows at once: in an `InvariantBroken` here, or as a wrong token at the
client, who knows what the undisturbed model says (`continuation`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import msgspec

from helixnet.core.model import DTYPE_BYTES, Manifest
from helixnet.core.prefix import BLOCK_TOKENS
from helixnet.core.stage.work import Done, Work
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import BlockId, SessionId, Span, runs
from helixnet.core.wire.activation import Activation
from helixnet.planner.problem import seconds_at
from helixnet.sim.invariants import broken

_ROW = struct.Struct("<QII")
ROW_BYTES = _ROW.size
"""What the machines take a row to be; links are charged for the model's real rows."""
VOCABULARY = 1 << 17
_MASK = (1 << 64) - 1
_SPREAD = 0x9E3779B97F4A7C15
"""Knuth's multiplier: 2**64 over the golden ratio."""


def digested(manifest: Manifest) -> Manifest:
    """The model as the simulated machines know it: digests are its rows, and tokens are told apart."""
    row = ROW_BYTES // DTYPE_BYTES[manifest.dtype]
    return msgspec.structs.replace(manifest, hidden_size=row, vocab_size=VOCABULARY)


def absorb(state: int, token: int) -> int:
    """The digest after one more token."""
    state = ((state ^ token) * _SPREAD + 1) & _MASK
    return state ^ (state >> 29)


def next_token(state: int, vocab_size: int) -> int:
    """What the model says after everything in `state`."""
    return (state >> 16) % vocab_size


def continuation(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What an undisturbed model says after `prompt`."""
    state, tokens = 0, list[int]()
    for token in prompt:
        state = absorb(state, token)
    for _ in range(count):
        tokens.append(next_token(state, vocab_size))
        state = absorb(state, tokens[-1])
    return tokens


class Timing(Protocol):
    """Seconds of one layer, and of a batch besides its layers."""

    @property
    def batch_s(self) -> float:
        """However many layers it runs."""
        ...

    def decode_s(self, steps: int) -> float:
        """For so many decode steps together."""
        ...

    def prefill_s(self, tokens: int) -> float:
        """For so many prompt tokens together."""
        ...


class Curves:
    """What a capability promises, between its points on straight lines."""

    def __init__(self, capability: Capability) -> None:
        self._capability = capability
        self.batch_s = capability.batch_s
        self._decode: dict[int, float] = {0: 0.0}
        self._prefill: dict[int, float] = {0: 0.0}

    def decode_s(self, steps: int) -> float:
        """See Timing."""
        known = self._decode.get(steps)
        if known is None:
            known = self._decode[steps] = seconds_at(self._capability.decode, steps)
        return known

    def prefill_s(self, tokens: int) -> float:
        """See Timing."""
        known = self._prefill.get(tokens)
        if known is None:
            known = self._prefill[tokens] = seconds_at(self._capability.prefill, tokens)
        return known


@dataclass(frozen=True, slots=True)
class Tables:
    """Measured seconds for 0, 1, 2, ... of either; beyond the end in proportion."""

    decode: Sequence[float]
    prefill: Sequence[float]
    batch_s: float = 0.0

    def decode_s(self, steps: int) -> float:
        """See Timing."""
        return _beyond(self.decode, steps)

    def prefill_s(self, tokens: int) -> float:
        """See Timing."""
        return _beyond(self.prefill, tokens)


def _beyond(table: Sequence[float], count: int) -> float:
    last = len(table) - 1
    return table[count] if count <= last else table[last] * count / last


@dataclass(slots=True)
class _Kv:
    """What one session has in this device's KV."""

    layers: Span
    tokens: int
    """There is room for so many."""
    filled: int = 0
    state: int = 0
    states: list[int] = field(default_factory=list)
    """After each of its whole blocks."""
    checked_at: int = -1
    """How often layers had come or gone when this session's were last seen to be loaded."""


class Device:
    """One peer's device: the twin of the engine. It runs a batch at a time and holds what was loaded."""

    def __init__(self, manifest: Manifest, timing: Timing, load_bytes_per_s: float) -> None:
        self.slowdown = 1.0
        """Everything takes so many times as long as the capability says."""
        self.busy_s = 0.0
        self.layer_tokens = 0
        """Tokens times layers that were run, ..."""
        self.decode_layer_tokens = 0
        """... and of these the decode steps."""
        self.layers_loaded = 0
        """Again those that had been dropped meanwhile."""
        self._manifest = manifest
        self._layers, self._dtype, self._width = manifest.layers, manifest.dtype, manifest.hidden_size
        self._timing = timing
        self._load_bytes_per_s = load_bytes_per_s
        self._loaded: set[int] = set()
        self._moves = 0
        self._kv: dict[SessionId, _Kv] = {}
        self._blocks: dict[BlockId, tuple[Span, int, int]] = {}
        """Of every sealed block: its layers, its place, and the state after it."""

    # --- weights -----------------------------------------------------------------------------------

    def held(self) -> tuple[Span, ...]:
        """Maximal runs of loaded layers."""
        return runs(self._loaded)

    def load_s(self, span: Span) -> float:
        """How long the missing layers of a span take to load."""
        missing = sum(layer not in self._loaded for layer in span.layers())
        return missing * self._manifest.layer_bytes / self._load_bytes_per_s

    def load(self, span: Span) -> None:
        """The layers of the span are there now."""
        self.layers_loaded += sum(layer not in self._loaded for layer in span.layers())
        self._loaded |= set(span.layers())
        self._moves += 1

    def drop(self, keep: Span | None) -> None:
        """Forget all layers outside `keep`."""
        self._loaded &= set(keep.layers()) if keep else set()
        self._moves += 1

    # --- KV ----------------------------------------------------------------------------------------

    def open(self, session: SessionId, layers: Span, tokens: int, begun: Sequence[BlockId]) -> None:
        """Make room for so many tokens of a session, which begins with these blocks."""
        kv = self._kv[session] = _Kv(layers, tokens)
        for place, block in enumerate(begun):
            if block not in self._blocks or self._blocks[block][:2] != (layers, place):
                broken(f"session {session} begins with a block that is not here, or is another")
            kv.states.append(self._blocks[block][2])
        if begun:
            kv.filled, kv.state = BLOCK_TOKENS * len(begun), kv.states[-1]

    def seal(self, session: SessionId, blocks: Sequence[tuple[int, BlockId]]) -> None:
        """Others may begin with these."""
        kv = self._kv[session]
        for place, block in blocks:
            if place >= len(kv.states) or block in self._blocks:
                broken(f"session {session}: block {place} is not whole, or known already")
            self._blocks[block] = kv.layers, place, kv.states[place]

    def evict(self, blocks: Sequence[BlockId]) -> None:
        """Forget them."""
        for block in blocks:
            del self._blocks[block]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._blocks)

    def extend(self, session: SessionId, tokens: int) -> None:
        """Make it room for so many."""
        self._kv[session].tokens = tokens

    def release(self, session: SessionId) -> None:
        """Free it again."""
        self._kv.pop(session, None)

    @property
    def sessions(self) -> int:
        """Sessions that have room here."""
        return len(self._kv)

    # --- batches -----------------------------------------------------------------------------------

    def seconds(self, batch: Sequence[Work]) -> float:
        """How long a batch takes: in every layer, the decode steps and the prompt tokens that meet there."""
        first, timing = batch[0].layers, self._timing
        decode = prompt = 0
        for work in batch:
            if work.layers is not first and work.layers != first:
                break
            if work.decode:
                decode += 1
            else:
                prompt += work.tokens
        else:
            layer_s = timing.decode_s(decode) + timing.prefill_s(prompt)
            return self.slowdown * ((first.stop - first.start) * layer_s + timing.batch_s)
        ends = sorted({end for work in batch for end in (work.layers.start, work.layers.stop)})
        seconds = timing.batch_s
        for start, stop in pairwise(ends):
            there = [work for work in batch if work.layers.start <= start < work.layers.stop]
            decode = sum(work.decode for work in there)
            prompt = sum(work.tokens for work in there if not work.decode)
            seconds += (stop - start) * (timing.decode_s(decode) + timing.prefill_s(prompt))
        return self.slowdown * seconds

    def run(self, batch: Sequence[Work], seconds: float) -> tuple[Done, ...]:
        """What comes of a batch that took so long."""
        self.busy_s += seconds
        return tuple([self._run(work) for work in batch])

    def _run(self, work: Work) -> Done:
        session, layers, activation = work.session, work.layers, work.activation
        kv = self._kv.get(session)
        if kv is None:
            return Done(session=session, error="the session was released")
        if kv.checked_at != self._moves or (kv.layers is not layers and kv.layers != layers):
            self._check_layers(work, kv)
        tokens = work.tokens if activation is None else activation.tokens
        filled = kv.filled + tokens
        if work.position != kv.filled or filled > kv.tokens:
            broken(f"session {session}: position {work.position} where {kv.filled} of {kv.tokens} was due")
        ends = range(BLOCK_TOKENS - kv.filled % BLOCK_TOKENS, tokens + 1, BLOCK_TOKENS)
        kv.filled = filled
        layer_tokens = tokens * (layers.stop - layers.start)
        self.layer_tokens += layer_tokens
        if work.decode:
            self.decode_layer_tokens += layer_tokens // tokens
        if activation is not None:
            kv.state, reached, position = _ROW.unpack_from(activation.data, (tokens - 1) * ROW_BYTES)
            if reached != layers.start or position != filled:
                broken(f"session {session}: rows of layer {reached}, position {position} came to {layers}")
            states = [_ROW.unpack_from(activation.data, (end - 1) * ROW_BYTES)[0] for end in ends]
        else:
            assert work.token_ids is not None, "work has either token ids or an activation"
            states = []
            for count, token in enumerate(work.token_ids, 1):
                kv.state = absorb(kv.state, token)
                if count in ends:
                    states.append(kv.state)
        kv.states += states
        if layers.stop < self._layers:
            rows = bytearray(_ROW.pack(kv.state, layers.stop, filled) * tokens)
            for end, state in zip(ends, states, strict=True):
                _ROW.pack_into(rows, (end - 1) * ROW_BYTES, state, layers.stop, work.position + end)
            return Done(session=session, activation=Activation(self._dtype, tokens, self._width, memoryview(rows)))
        if work.sample is None:
            return Done(session=session)
        return Done(session=session, token_id=next_token(kv.state, self._manifest.vocab_size))

    def _check_layers(self, work: Work, kv: _Kv) -> None:
        """Once for a session, and again whenever layers have been loaded or dropped."""
        if kv.layers != work.layers or not self._loaded.issuperset(work.layers.layers()):
            broken(f"session {work.session} runs {work.layers}, which is not what it opened or not loaded")
        kv.checked_at = self._moves

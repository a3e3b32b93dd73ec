"""The placement problem as plain numbers, derived once from a snapshot: everything else here reads only this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from helixnet.core.errors import MemoryTooSmall, SwarmTooSmall
from helixnet.core.model import Manifest
from helixnet.core.plan.snapshot import PeerView, Snapshot
from helixnet.core.stage.batch import DECODE_BATCH_MAX, PREFILL_BUDGET_TOKENS, PREFILL_CHUNK_TOKENS
from helixnet.core.swarm.capability import RatePoint
from helixnet.core.types import PeerId, Span

FRAME_BYTES_PER_TOKEN = 96
"""What session, position and framing add to each activation on a link."""
LINK_SHARE = 0.5
"""Share of a measured bandwidth that is planned. In the paper's geo-distributed instance planning and routing slow
links at half brought 40 % more throughput than filling them (shared findings): queues on links cost every token."""
HOP_S = 0.001
"""What a hop costs besides the link: two event loops, framing, and a batch to wait for."""

SESSIONS_MAX = 256
"""Requests in flight that our stages admit at most, whatever their memory."""

SpanOrNone = Span | None
Spans = tuple[SpanOrNone, ...]
"""One span (or none) for each peer of a problem, in its order."""
Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
"""Numbers one after the other."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The typical request that is planned for."""

    prompt_tokens: int = 256
    output_tokens: int = 256

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError("a typical request has at least one prompt token and one output token")

    @property
    def tokens(self) -> int:
        """KV tokens that a request reserves in each layer."""
        return self.prompt_tokens + self.output_tokens

    @property
    def prefill_ratio(self) -> float:
        """Prompt tokens that pass for each decoded one."""
        return self.prompt_tokens / self.output_tokens


@dataclass(frozen=True, slots=True)
class PlanPeer:
    """What one peer can carry. A token-layer is one decoded token (with its share of prefill) through one layer."""

    peer: PeerId
    layers_max: tuple[int, int, int, int]
    """Most layers of a span that touches neither end, the first layer, the last layer, both (all layers, or 0)."""
    capacity: tuple[float, ...]
    """Token-layers/s when k layers are held, k from 0: fewer weights leave more KV, hence larger batches."""
    kv_token_layers: tuple[int, ...]
    """KV room beside k inner layers, k from 0, in tokens of one layer."""
    kv_first: int
    """What the embedding takes of that room, in the same unit."""
    kv_last: int
    """What the head takes of it."""
    batch_rate: tuple[float, ...]
    """Token-layers/s in batches of b + 1 decode steps; never falls with b."""
    decode_s: float
    """One layer, one token, nobody else."""
    prefill_s: float
    """One layer, the prompt of a typical request."""
    piece_s: float
    """One layer, the first piece of that prompt: none is larger."""
    held: SpanOrNone
    """What it holds now."""
    batch_s: float = 0.0
    """A batch takes so much longer than its layers; in `capacity`, not in `batch_rate`."""

    def tokens_per_s(self, held: int) -> float:
        """The paper's T(k): tokens/s through all of the k layers held."""
        return self.capacity[held] / held

    def kv_room(self, span: Span, layers: int) -> int:
        """KV room beside the weights of `span` in a model of so many layers, in token-layers; 0 if there is none."""
        ends = (self.kv_first if span.start == 0 else 0) + (self.kv_last if span.stop == layers else 0)
        return max(0, self.kv_token_layers[len(span)] - ends)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Problem:
    """Peers in the order of their ids; matrices are indexed [source, target]."""

    model: str
    layers: int
    layer_bytes: int
    """Memory that one more layer needs, with the KV of one request."""
    first_bytes: int
    """What a peer needs besides to hold the first layer."""
    last_bytes: int
    session_tokens: int
    """KV tokens that a typical request reserves in each layer it runs."""
    peers: tuple[PlanPeer, ...]
    link_tokens_per_s: Matrix
    link_s: Matrix
    """One way, one activation."""
    prompt_link_s: Matrix
    """One way, the activations of a typical prompt."""
    flow_per_token: float = 1.0
    """Tokens of flow that one decoded token stands for: 1 where capacities count decoded tokens with their share of
    prompt tokens, more where they count prompt tokens as flow too (the paper's T(k))."""
    sessions_max: int = SESSIONS_MAX
    """Requests in flight that a stage admits at most, whatever its memory."""
    output_tokens: int = 256
    """Decoded tokens of a typical request."""
    chunks: float = 1.0
    """Pieces in which a typical prompt passes a stage or link."""
    convoys: bool = False
    """Whether a decode step that meets a piece of a prompt moves at its pace from there on: where whole prompts share
    batches and queues with decode steps (the paper's system). In ours decode steps overtake them."""

    def fits(self, index: int, start: int, stop: int) -> bool:
        """Whether peer `index` has room for the layers `[start, stop)` and the KV of one request."""
        return 0 <= start < stop <= self.layers and stop - start <= self.room(index, start == 0, stop == self.layers)

    def room(self, index: int, first: bool, last: bool) -> int:
        """The most layers that peer `index` can hold in a span that does or does not touch the model's ends."""
        return self.peers[index].layers_max[first + 2 * last]

    def only(self, members: Sequence[int]) -> Problem:
        """The problem of these peers alone, in the order given."""
        chosen = np.ix_(members, members)
        return replace(
            self,
            peers=tuple(self.peers[index] for index in members),
            link_tokens_per_s=_frozen(self.link_tokens_per_s[chosen]),
            link_s=_frozen(self.link_s[chosen]),
            prompt_link_s=_frozen(self.prompt_link_s[chosen]),
        )

    def has_room(self) -> bool:
        """Whether the peers together can hold every layer."""
        ends = best_ends(self)
        return ends is not None and chain_length(self, *ends) == self.layers


def from_snapshot(snapshot: Snapshot, workload: Workload | None = None) -> Problem:
    """The problem of the peers that are not draining. Peers without room stay in it and can hold nothing."""
    manifest = snapshot.manifest
    work = workload or Workload()
    views = [view for view in snapshot.peers if not view.draining]
    tokens = min(work.tokens, manifest.context_tokens)
    token_s, round_trip_s = _links(snapshot, [view.peer for view in views], manifest)
    hop_s = round_trip_s / 2 + HOP_S * (1 - np.eye(len(views)))
    token_bytes = manifest.activation_bytes + FRAME_BYTES_PER_TOKEN
    bandwidth = np.divide(token_bytes, token_s, out=np.full_like(token_s, np.inf), where=token_s > 0)
    return Problem(
        model=manifest.name,
        layers=manifest.layers,
        layer_bytes=manifest.layer_bytes + tokens * manifest.kv_bytes,
        first_bytes=manifest.embedding_bytes,
        last_bytes=manifest.head_bytes,
        session_tokens=tokens,
        peers=tuple(_plan_peer(view, manifest, work, tokens) for view in views),
        link_tokens_per_s=_frozen(bandwidth * LINK_SHARE / (token_bytes * (1 + work.prefill_ratio))),
        link_s=_frozen(hop_s + token_s),
        prompt_link_s=_frozen(hop_s + token_s * work.prompt_tokens),
        output_tokens=work.output_tokens,
        chunks=max(1.0, work.prompt_tokens / PREFILL_CHUNK_TOKENS),
    )


def require_room(problem: Problem) -> None:
    """Nothing, if the peers together can hold every layer.

    Raises:
        MemoryTooSmall: no peer has room for a single layer.
        SwarmTooSmall: some layers would be uncovered; the message says which, and how much memory is missing.
    """
    count = len(problem.peers)
    if not count:
        raise SwarmTooSmall(f"No measured peer serves {problem.model} yet. Start one with `helixnet peer`.")
    if not any(any(peer.layers_max) for peer in problem.peers):
        raise MemoryTooSmall(
            f"None of the swarm's {_peers(count)} has room for one layer of {problem.model}, which takes "
            f"{_gb(problem.layer_bytes)} with KV for one request. Raise --memory or serve a smaller model."
        )
    ends = best_ends(problem)
    if ends is None and (sentence := _missing_end(problem)):
        raise SwarmTooSmall(f"{sentence} Add a peer with more memory or raise --memory.")
    held = chain_length(problem, *ends) if ends is not None else _open_chain_length(problem)
    if held < problem.layers:
        last = problem.layers - 1
        gap = f"layer {last}" if held == last else f"layers {held} to {last}"
        missing = (problem.layers - held) * problem.layer_bytes + (problem.last_bytes if ends is None else 0)
        raise SwarmTooSmall(
            f"The swarm's {_peers(count)} can hold {held} of {problem.layers} layers of {problem.model}, which leaves "
            f"{gap} uncovered: {_gb(missing)} of memory is missing. Add a peer or raise --memory."
        )


def best_ends(problem: Problem) -> tuple[int, int] | None:
    """Which peers should hold the first and the last layer so that most layers are covered; None if none can.

    The same peer twice stands for one that holds the whole model. Ties go to the peers that come first.
    """
    indices = range(len(problem.peers))
    for index in indices:
        if problem.room(index, True, True):
            return index, index
    # Holding an end costs a peer some inner layers; only the two cheapest at each end can be in the best pair.
    first = [i for i in indices if problem.room(i, True, False)]
    last = [i for i in indices if problem.room(i, False, True)]
    first = sorted(first, key=lambda i: problem.room(i, False, False) - problem.room(i, True, False))[:2]
    last = sorted(last, key=lambda i: problem.room(i, False, False) - problem.room(i, False, True))[:2]
    pairs = [(i, j) for i in first for j in last if i != j]
    return max(pairs, key=lambda ends: chain_length(problem, *ends), default=None)


def chain_length(problem: Problem, first: int, last: int) -> int:
    """How many layers the peers can hold one after the other, with these two at the ends; at most all."""
    if first == last:
        return problem.room(first, True, True)
    inner = sum(problem.room(i, False, False) for i in range(len(problem.peers)) if i not in (first, last))
    return min(problem.layers, inner + problem.room(first, True, False) + problem.room(last, False, True))


def seconds_at(curve: Sequence[RatePoint], tokens: float) -> float:
    """Seconds of one layer for so many tokens: straight lines through the measured points and beyond the last."""
    if tokens <= curve[0].tokens:
        return curve[0].seconds
    if len(curve) == 1:
        return curve[0].seconds * tokens / curve[0].tokens
    after = next((n for n, point in enumerate(curve) if point.tokens >= tokens), len(curve) - 1)
    low, high = curve[after - 1], curve[after]
    # Noise may make a larger batch look faster; a negative slope must not be drawn out beyond the last point.
    slope = max(0.0, (high.seconds - low.seconds) / (high.tokens - low.tokens))
    return low.seconds + slope * (tokens - low.tokens)


def met_together(largest: int, ratio: float, piece: int) -> Vector:
    """Prompt tokens that run together when batches have 1, 2, ... `largest` decode steps, each with `ratio` of them.

    Few steps meet the pieces of a prompt one by one, now and then; many meet more of them in each batch.
    """
    return np.clip(np.arange(1, largest + 1) * ratio, piece, max(piece, PREFILL_BUDGET_TOKENS))


def batch_rates(steps_s: Sequence[float] | Vector, extra_s: Vector) -> tuple[float, ...]:
    """Token-layers/s in batches of 1, 2, ... decode steps, which take so long, each step with `extra_s` of prefill.

    Never falls: a batch need not be as large as it may be.
    """
    batches = np.arange(1, len(steps_s) + 1)
    return tuple(np.maximum.accumulate(batches / (np.asarray(steps_s) + batches * extra_s)).tolist())


def capacity(
    rates: Sequence[float], kv_token_layers: Sequence[int], whole_tokens: int, batch_s: float = 0.0
) -> tuple[float, ...]:
    """Token-layers/s when k layers are held, by the KV room beside them, in the batches that this lets count on.

    A peer that runs k of L layers meets about k/L of the requests in flight at once, and KV lets kv / (k * session) of
    them in: kv / `whole_tokens`, what a request reserves in all layers. That depends on k only through the room left.
    """
    batches = np.clip(np.asarray(kv_token_layers) // whole_tokens, 1, len(rates))
    return tuple([slowed(rates[batch - 1], batch, batch_s, max(1, k)) for k, batch in enumerate(batches.tolist())])


def slowed(rate: float, batch: int, batch_s: float, layers: float) -> float:
    """Token-layers/s of a batch that runs so many layers at this rate, and takes `batch_s` longer than they do."""
    return rate if not batch_s else batch / (batch / rate + batch_s / layers)


def _read(curve: Sequence[RatePoint], asked: Vector) -> Vector:
    """Seconds of one layer for so many tokens each: the curve as `seconds_at` reads it, in one go."""
    tokens = np.array([point.tokens for point in curve])
    seconds = np.array([point.seconds for point in curve])
    if len(curve) == 1:
        found = seconds[0] * asked / tokens[0]
    else:
        after = np.clip(np.searchsorted(tokens, asked), 1, len(tokens) - 1)
        slopes = np.maximum(0.0, np.diff(seconds) / np.diff(tokens))
        found = seconds[after - 1] + slopes[after - 1] * (asked - tokens[after - 1])
    read: Vector = np.where(asked <= tokens[0], seconds[0], found)
    return read


def _plan_peer(view: PeerView, manifest: Manifest, work: Workload, session_tokens: int) -> PlanPeer:
    capability, layers = view.capability, manifest.layers
    whole, rest = divmod(work.prompt_tokens, PREFILL_CHUNK_TOKENS)
    prefill_s = whole * seconds_at(capability.prefill, PREFILL_CHUNK_TOKENS)
    prefill_s += seconds_at(capability.prefill, rest) if rest else 0.0
    piece = min(work.prompt_tokens, PREFILL_CHUNK_TOKENS)
    met = met_together(DECODE_BATCH_MAX, work.prefill_ratio, piece)
    extra_s = work.prefill_ratio * _read(capability.prefill, met) / met
    rates = batch_rates(_read(capability.decode, np.arange(1.0, DECODE_BATCH_MAX + 1)), extra_s)
    spare = np.maximum(0, capability.memory_bytes - np.arange(layers + 1) * manifest.layer_bytes)
    kv = (spare // manifest.kv_bytes).tolist()
    return PlanPeer(
        peer=view.peer,
        layers_max=_layers_max(capability.memory_bytes, manifest, session_tokens),
        capacity=capacity(rates, kv, session_tokens * layers, capability.batch_s),
        kv_token_layers=tuple(kv),
        kv_first=-(-manifest.embedding_bytes // manifest.kv_bytes),
        kv_last=-(-manifest.head_bytes // manifest.kv_bytes),
        batch_rate=rates,
        decode_s=capability.decode[0].seconds,
        prefill_s=prefill_s,
        piece_s=seconds_at(capability.prefill, piece),
        held=view.held,
        batch_s=capability.batch_s,
    )


def _layers_max(memory_bytes: int, manifest: Manifest, session_tokens: int) -> tuple[int, int, int, int]:
    each = manifest.layer_bytes + session_tokens * manifest.kv_bytes
    embedding, head = manifest.embedding_bytes, manifest.head_bytes

    def room(ends: int) -> int:
        return max(0, min(manifest.layers, (memory_bytes - ends) // each))

    whole = room(embedding + head)
    return room(0), room(embedding), room(head), whole if whole == manifest.layers else 0


def _links(snapshot: Snapshot, peers: list[PeerId], manifest: Manifest) -> tuple[Matrix, Matrix]:
    """Seconds of one activation on the wire and round trips, [source, target]; nothing from a peer to itself."""
    count = len(peers)
    token_bytes = manifest.activation_bytes + FRAME_BYTES_PER_TOKEN
    token_s = np.full((count, count), token_bytes / snapshot.default_bandwidth)
    round_trip_s = np.full((count, count), snapshot.default_round_trip_s)
    index = {peer: n for n, peer in enumerate(peers)}
    known = [link for link in snapshot.links if link.source in index and link.target in index]
    sources = np.array([index[link.source] for link in known], dtype=np.intp)
    targets = np.array([index[link.target] for link in known], dtype=np.intp)
    seconds = token_bytes / np.array([link.bandwidth for link in known])
    delays = np.array([link.round_trip_s for link in known])
    # Where only the other direction was measured, that is a better guess than the default: it goes first.
    for pairs in ((targets, sources), (sources, targets)):
        token_s[pairs], round_trip_s[pairs] = seconds, delays
    np.fill_diagonal(token_s, 0.0)
    np.fill_diagonal(round_trip_s, 0.0)
    return token_s, round_trip_s


def _open_chain_length(problem: Problem) -> int:
    """How many layers can be held from the first on when nobody is left who has room for the last."""
    inner = [problem.room(i, False, False) for i in range(len(problem.peers))]
    first = max(problem.room(i, True, False) - inner[i] for i in range(len(inner)) if problem.room(i, True, False))
    return min(problem.layers - 1, sum(inner) + first)


def _missing_end(problem: Problem) -> str:
    """Which end of the model nobody has room for, as a sentence; empty if there is somebody for either."""
    indices = range(len(problem.peers))
    needs = f"layer of {problem.model} with the"
    if not any(problem.room(i, True, False) for i in indices):
        need = _gb(problem.layer_bytes + problem.first_bytes)
        return f"No peer of the swarm has room for the first {needs} embedding, which takes {need}."
    if not any(problem.room(i, False, True) for i in indices):
        need = _gb(problem.layer_bytes + problem.last_bytes)
        return f"No peer of the swarm has room for the last {needs} head, which takes {need}."
    return ""


def _frozen(matrix: Matrix) -> Matrix:
    matrix.setflags(write=False)
    return matrix


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


Cancelled = Callable[[], bool]
"""Asked now and then; True stops the work with the best so far."""

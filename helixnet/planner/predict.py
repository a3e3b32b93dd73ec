"""What a placement will serve: saturated tokens/s, first-token and per-token time, and what limits it.

Flow is only a ceiling. Requests in flight are limited by KV memory, each of their tokens pays every stage and hop, so
the swarm serves at most in-flight / round trip; and stages slow down as their batches grow. At a rate x peer i runs
batches of the smallest size that keeps up; a step waits for a part of a batch and then takes one, however few of its
layers it needs: where requests enter a span in the middle, those wait for the ones that run all of it. Where prompts
form convoys (`Problem.convoys`: the paper's system) a step that meets one moves at its pace from there on, stage by
stage and link by link: with N requests in flight a token finds N / output_tokens prompts on their way, and goes free
with probability exp(-that). The saturated rate is the largest x whose requests in flight fit the KV room (Little's
law).
Against the paper's published simulations of its own placements (70B, unchunked prompts) it is within some 25 %, and in
the same order; against our own simulator see `sim.prediction_check`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from helixnet.core.plan.plan import Prediction
from helixnet.planner.bounds import proven_bound
from helixnet.planner.flow import OUTSIDE, Edge, Routing, layers_run
from helixnet.planner.problem import Matrix, PlanPeer, Problem, Spans, Vector, slowed

BISECTIONS = 14
"""Enough for a ten-thousandth of the flow."""
WAIT = 0.5
"""Of the batch under way that a step waits for at a busy peer, as if steps came at random. Random clusters that are
simulated (`sim.prediction_check`) serve 1 % less than is predicted, by median; 5 % with 0.4."""
ROUNDING = 1e-9
"""Of a request that still counts as a whole one."""
NAME_CHARS = 6
"""Peers are called by the end of their ids, as in every other message ..."""
NAME_CHARS_MAX = 40
"""... unless those are names: of a cluster file, not of libp2p, whose ids are longer than this."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The numbers of a prediction, still without words."""

    tokens_per_s: float
    sessions: float
    """Requests in flight that fit the KV room when the flow's shares are kept."""
    tightest: int
    """The peer whose KV room runs out first."""
    ttft_s: float
    """One request alone, average pipeline."""
    tpot_s: float
    """One request alone, average pipeline."""
    kv_limited: bool
    """KV room ends the growth before compute and links do."""
    hops: float
    """Of an average token, its way from the exit back to the entry included: as many as the stages it passes."""


NO_FORECAST = Forecast(0.0, 0.0, 0, 0.0, 0.0, False, 0.0)
KV_LIMITED = 0.999
"""Share of the flow below which KV room is what limits."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A peer's part in an average token: how often it is visited and how many layers it runs."""

    index: int
    visits: float
    layers: float
    segments: tuple[tuple[float, int], ...]
    """Runs of layers by the share of visits that pass them: all that come pass the last ones, fewer those before."""


def forecast(problem: Problem, spans: Spans, routing: Routing) -> Forecast:
    """What the swarm serves when flow is routed like this; all zero where nothing flows."""
    flow = routing.tokens_per_s
    if flow <= 0:
        return NO_FORECAST
    parts = _parts(spans, routing)
    sessions, tightest = _sessions(problem, spans, parts)
    hops_s, opening_s = _hops(problem, spans, routing)
    peers = [problem.peers[part.index] for part in parts]
    decode_s = sum(
        part.layers * peer.decode_s + part.visits * peer.batch_s for part, peer in zip(parts, peers, strict=True)
    )
    ceiling = flow / problem.flow_per_token
    load = _Load(problem, parts, routing, hops_s)
    saturated = load.saturated(ceiling, sessions)
    return Forecast(
        tokens_per_s=saturated,
        sessions=sessions,
        tightest=tightest,
        ttft_s=opening_s + load.first_token_s(),
        tpot_s=decode_s + hops_s,
        kv_limited=saturated < ceiling * KV_LIMITED,
        hops=sum(part.visits for part in parts),
    )


def predict(problem: Problem, spans: Spans, routing: Routing) -> Prediction:
    """The forecast, with the proven bound on the flow and the bottleneck in words."""
    outlook = forecast(problem, spans, routing)
    return Prediction(
        tokens_per_s=outlook.tokens_per_s,
        bound_tokens_per_s=proven_bound(problem),
        ttft_s=outlook.ttft_s,
        tpot_s=outlook.tpot_s,
        bottleneck=_bottleneck(problem, spans, routing, outlook),
    )


def _parts(spans: Spans, routing: Routing) -> list[_Part]:
    flow = routing.tokens_per_s
    lengths: dict[int, dict[int, float]] = {}
    for edge, rate in routing.edges.items():
        if edge[1] != OUTSIDE:
            by_length, length = lengths.setdefault(edge[1], {}), layers_run(spans, edge)
            by_length[length] = by_length.get(length, 0.0) + rate
    return [
        _Part(index, sum(lengths[index].values()) / flow, load / flow, _segments(lengths[index]))
        for index, load in enumerate(routing.loads)
        if load > 0
    ]


def _segments(lengths: dict[int, float]) -> tuple[tuple[float, int], ...]:
    """From what is visited by how much of the flow for how many layers, up to the last; most visited first."""
    left, reached = sum(lengths.values()), 0
    total, segments = left, []
    for length in sorted(lengths):
        segments.append((left / total, length - reached))
        left, reached = left - lengths[length], length
    return tuple(segments)


def _sessions(problem: Problem, spans: Spans, parts: list[_Part]) -> tuple[float, int]:
    """Requests in flight that fit when they are routed like this, and the peer that is full first.

    A stage lets whole requests in, however little is missing for one more. Where there is no room for a single typical
    one there may be for a shorter one, now and then.
    """
    fullest, most = parts[0].index, inf
    for part in parts:
        span, peer = spans[part.index], problem.peers[part.index]
        assert span is not None, "only peers with spans carry flow"
        held = problem.session_tokens * part.layers / part.visits
        room = min(peer.kv_room(span, problem.layers) / held, problem.sessions_max)
        admitted = (room + ROUNDING) // 1 if room >= 1 else room
        if admitted / part.visits < most:
            fullest, most = part.index, admitted / part.visits
    return most, fullest


def _hops(problem: Problem, spans: Spans, routing: Routing) -> tuple[float, float]:
    """Seconds that an average token spends on links, and what an average request's opening and first token add to that.

    A token goes from peer to peer, and from the exit back to the entry. Before the prompt, the entry asks every stage
    for room; the farthest answers last. Where tokens came from at every peer follows from the flows: at each, routers
    choose without looking back.
    """
    entries = [target for source, target in routing.edges if source == OUTSIDE]
    back_s = problem.link_s[:, entries]
    came = dict[int, Matrix]()  # tokens/s at each peer, by entry
    for position, entry in enumerate(entries):
        came[entry] = np.zeros(len(entries))
        came[entry][position] = routing.edges[OUTSIDE, entry]
    seconds = back = 0.0
    onward = [(edge, rate) for edge, rate in routing.edges.items() if edge[0] != OUTSIDE]
    for (source, target), rate in sorted(onward, key=lambda item: _stop(spans, item[0][0])):
        share = came[source] * (rate / came[source].sum())
        if target == OUTSIDE:
            back += float(back_s[source] @ share)
        else:
            seconds += float(problem.link_s[source, target]) * rate
            came[target] = came[target] + share if target in came else share
    flow, there = routing.tokens_per_s, sorted(came)
    asked_s = problem.link_s[np.ix_(entries, there)] + back_s[there].T
    passed = np.array([came[index] for index in there])
    opening = sum(
        routing.edges[OUTSIDE, entry] * _largest(asked_s[position], passed[:, position] / routing.edges[OUTSIDE, entry])
        for position, entry in enumerate(entries)
    )
    return (seconds + back) / flow, (back + opening) / flow


def _largest(values: Vector, chances: Vector) -> float:
    """The expected largest of values that are met with these chances, each for itself; 0 where none is met."""
    largest, unmet = 0.0, 1.0
    for index in np.argsort(-values).tolist():
        met = min(1.0, float(chances[index]))
        largest += unmet * met * float(values[index])
        unmet *= 1.0 - met
    return largest


def _stop(spans: Spans, index: int) -> int:
    span = spans[index]
    assert span is not None, "only peers with spans carry flow"
    return span.stop


class _Load:
    """Requests in flight by rate, for one placement and its routing."""

    def __init__(self, problem: Problem, parts: list[_Part], routing: Routing, hops_s: float) -> None:
        self.problem, self.hops_s = problem, hops_s
        peers = [problem.peers[part.index] for part in parts]
        self._stages = [(part.visits, *_as_one(peer, part.segments)) for part, peer in zip(parts, peers, strict=True)]
        edges = [edge for edge in routing.edges if OUTSIDE not in edge]
        tails, heads = [edge[0] for edge in edges], [edge[1] for edge in edges]
        crossed = np.array([routing.edges[edge] for edge in edges]) / routing.tokens_per_s
        piece = (problem.prompt_link_s - problem.link_s)[tails, heads] / problem.chunks
        visits = np.array([part.visits for part in parts])
        layers = np.array([part.layers for part in parts])
        held = layers / visits
        batch_s = np.array([peer.batch_s for peer in peers])
        first_s = held * np.array([peer.piece_s for peer in peers]) + batch_s
        rest_s = held * np.array([peer.prefill_s - peer.piece_s for peer in peers]) + (problem.chunks - 1.0) * batch_s
        # One entry for each stage, then for each link: passes of a token, seconds of the first piece of a prompt, and
        # of all others together.
        self._passes = np.concatenate([visits, crossed])
        self._piece_s = np.concatenate([first_s, piece])
        self._rest_s = np.concatenate([rest_s, (problem.chunks - 1.0) * piece])
        self._between_s = float((problem.link_s[tails, heads] * crossed).sum())
        self._pieces = self._passes * problem.chunks / problem.output_tokens * problem.convoys
        self.met_s = 0.0

    def first_token_s(self) -> float:
        """A prompt alone: its first piece passes every stage and link, the others come behind the slowest of them."""
        first_s = self._between_s + float((self._passes * self._piece_s).sum())
        return first_s + _largest(self._rest_s, self._passes)

    def in_flight(self, rate: float) -> float:
        """At so many decoded tokens/s: each token is at some stage or on some link."""
        seconds = self.hops_s + self.met_s
        for visits, layers, rates in self._stages:
            asked = rate * visits
            batch = min(bisect_left(rates, asked * layers), len(rates) - 1) + 1
            batch_s = layers * batch / rates[batch - 1]
            # A lone step waits for nobody on average unless the peer is busy.
            seconds += visits * batch_s * (1.0 + WAIT * min(1.0, asked * batch_s / batch))
        return rate * seconds

    def saturated(self, most: float, sessions: float) -> float:
        """The largest rate up to `most` at which the requests in flight fit."""
        met = 1.0 - np.exp(-self._pieces * sessions)
        self.met_s = float((self._passes * met * self._piece_s).sum())
        if self.in_flight(most) <= sessions:
            return most
        low, high = 0.0, most
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.in_flight(middle) <= sessions:
                low = middle
            else:
                high = middle
        return low


def _as_one(peer: PlanPeer, segments: tuple[tuple[float, int], ...]) -> tuple[float, Sequence[float]]:
    """As if all steps ran all layers: how many those are, and token-layers/s of them by batch size.

    All steps of a batch wait for its end, of whatever layers each has need. Where less than one of them needs a layer
    on average, the layer is run now and then.
    """
    rates, batch_s = peer.batch_rate, peer.batch_s
    if len(segments) == 1:
        layers = segments[0][1]
        return layers, [slowed(rate, n, batch_s, layers) for n, rate in enumerate(rates, 1)] if batch_s else rates
    batches, known = np.arange(1, len(rates) + 1), np.array(rates)
    seconds = np.full(len(rates), batch_s)
    for share, layers in segments:
        there = np.maximum(1, np.rint(batches * share)).astype(np.intp)
        seconds += layers * there / known[there - 1] * np.minimum(1.0, batches * share)
    return 1.0, np.maximum.accumulate(batches / seconds).tolist()


def _bottleneck(problem: Problem, spans: Spans, routing: Routing, outlook: Forecast) -> str:
    if routing.tokens_per_s <= 0:
        return "no chain of spans leads from the first layer to the last"
    if outlook.kv_limited:
        name = _name(problem, outlook.tightest)
        return f"KV memory of {name} {spans[outlook.tightest]}: room for {outlook.sessions:.1f} requests in flight"
    if not routing.limits:
        return "nothing in particular"
    edge, share = routing.limits[0]
    others = "" if share > 0.95 else f", and {len(routing.limits) - 1} more" if len(routing.limits) > 1 else ""
    return f"{_limit(problem, spans, edge)}{others}"


def _limit(problem: Problem, spans: Spans, edge: Edge) -> str:
    source, target = edge
    if source == target:
        return f"compute of {_name(problem, source)} {spans[source]}"
    rate = float(problem.link_tokens_per_s[edge])
    return f"link {_name(problem, source)} -> {_name(problem, target)} ({rate:.0f} tokens/s)"


def _name(problem: Problem, index: int) -> str:
    peer = problem.peers[index].peer
    return peer if len(peer) <= NAME_CHARS_MAX else peer[-NAME_CHARS:]

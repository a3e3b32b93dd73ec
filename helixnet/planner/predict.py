"""What a placement will serve: saturated tokens/s, first-token and per-token time, and what limits it.

Flow is only a ceiling. Requests in flight are limited by KV memory, each of their tokens pays every stage and hop,
so the swarm serves at most in-flight / round trip; and stages slow down as their batches grow. At a rate x peer i
runs batches of the smallest size that keeps up; a step waits half a batch and then takes one. The saturated rate
is the largest x whose requests in flight fit the KV room (Little's law).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from helixnet.core.plan.plan import Prediction
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.flow import OUTSIDE, Edge, Routing
from helixnet.planner.problem import Problem, Spans

BISECTIONS = 14
"""Enough for a ten-thousandth of the flow."""
NAME_CHARS = 6
"""Peers are called by the end of their ids, as in every other message ..."""
NAME_CHARS_MAX = 40
"""... unless those are names: of a cluster file, not of libp2p, whose ids are longer than this."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The numbers of a prediction, still without words."""

    tokens_per_s: float
    sessions: float
    """Requests in flight that fit the KV room, on average pipelines."""
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


def forecast(problem: Problem, spans: Spans, routing: Routing) -> Forecast:
    """What the swarm serves when flow is routed like this; all zero where nothing flows."""
    flow = routing.tokens_per_s
    if flow <= 0:
        return NO_FORECAST
    parts = _parts(routing)
    sessions, tightest = _sessions(problem, spans, parts)
    hops_s = _hops(problem, routing)
    decode_s = sum(part.layers * problem.peers[part.index].decode_s for part in parts)
    prefill_s = sum(part.layers * problem.peers[part.index].prefill_s for part in parts)
    prompt_hops_s = sum(
        float(problem.prompt_link_s[edge]) * rate / flow for edge, rate in routing.edges.items() if OUTSIDE not in edge
    )
    ceiling = flow / problem.flow_per_token
    saturated = _saturated(problem, parts, ceiling, hops_s, sessions)
    return Forecast(
        tokens_per_s=saturated,
        sessions=sessions,
        tightest=tightest,
        ttft_s=prefill_s + prompt_hops_s,
        tpot_s=decode_s + hops_s,
        kv_limited=saturated < ceiling * KV_LIMITED,
        hops=sum(part.visits for part in parts),
    )


def predict(problem: Problem, spans: Spans, routing: Routing) -> Prediction:
    """The forecast, with the proven bound on the flow and the bottleneck in words."""
    outlook = forecast(problem, spans, routing)
    return Prediction(
        tokens_per_s=outlook.tokens_per_s,
        bound_tokens_per_s=coverage_bound(problem),
        ttft_s=outlook.ttft_s,
        tpot_s=outlook.tpot_s,
        bottleneck=_bottleneck(problem, spans, routing, outlook),
    )


def _parts(routing: Routing) -> list[_Part]:
    flow = routing.tokens_per_s
    visits = [0.0] * len(routing.loads)
    for (_, target), rate in routing.edges.items():
        if target != OUTSIDE:
            visits[target] += rate / flow
    return [_Part(i, visits[i], load / flow) for i, load in enumerate(routing.loads) if load > 0]


def _sessions(problem: Problem, spans: Spans, parts: list[_Part]) -> tuple[float, int]:
    """Requests in flight that fit, and the peer that limits them. Each reserves KV in the layers it runs."""
    rooms: list[tuple[float, int]] = []
    for part in parts:
        span = spans[part.index]
        assert span is not None, "only peers with spans carry flow"
        room = problem.peers[part.index].kv_room(span, problem.layers)
        rooms.append((room / (problem.session_tokens * part.layers), part.index))
    fewest, tightest = min(rooms)
    return min(fewest, float(problem.sessions_max)), tightest


def _hops(problem: Problem, routing: Routing) -> float:
    """Seconds that an average token spends on links: peer to peer, and from the exit back to the entry."""
    flow = routing.tokens_per_s
    between = sum(float(problem.link_s[edge]) * rate for edge, rate in routing.edges.items() if OUTSIDE not in edge)
    entries = [(target, rate / flow) for (source, target), rate in routing.edges.items() if source == OUTSIDE]
    exits = [(source, rate / flow) for (source, target), rate in routing.edges.items() if target == OUTSIDE]
    back = sum(float(problem.link_s[leave, enter]) * a * b for leave, a in exits for enter, b in entries)
    return between / flow + back


def _saturated(problem: Problem, parts: list[_Part], flow: float, hops_s: float, sessions: float) -> float:
    """The largest rate up to `flow` at which the requests in flight fit."""
    if _in_flight(problem, parts, flow, hops_s) <= sessions:
        return flow
    low, high = 0.0, flow
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _in_flight(problem, parts, middle, hops_s) <= sessions:
            low = middle
        else:
            high = middle
    return low


def _in_flight(problem: Problem, parts: list[_Part], rate: float, hops_s: float) -> float:
    """Requests in flight at `rate` tokens/s: each token is at some stage or on some link."""
    seconds = hops_s
    for part in parts:
        peer = problem.peers[part.index]
        asked = rate * part.layers
        batch = min(bisect_left(peer.batch_rate, asked), len(peer.batch_rate) - 1) + 1
        reached = peer.batch_rate[batch - 1]
        step_s = batch / reached
        # A lone step waits for nobody on average unless the peer is busy; in a batch it waits for half of the last.
        seconds += part.layers * step_s * (1.0 + 0.5 * min(1.0, asked / reached))
    return rate * seconds


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

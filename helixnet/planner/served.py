"""The flow that is predicted to serve most: a max flow, unless KV memory and not compute ends what a swarm serves.

A request holds KV at each of its stages for its whole life. So where KV limits, peers should be visited in proportion
to the requests they have room for, and no peer more often than it can compute: a max flow again (Little's law), in
which a peer's capacity is also the requests that it has room for times the pace at which each of them moves. The
slower the pace, the more this is a flow of KV room; the faster, the more of compute. The pace is that of the forecast.
In large swarms, where each exact flow takes seconds, it is guessed, and placements are searched for that flow, too.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.flow import CapacityModel, Routing, max_flow
from helixnet.planner.predict import Forecast, forecast
from helixnet.planner.problem import PlanPeer, Problem, Spans

SPREAD_MIN = 0.99
"""Share of what the best flow would serve that one which is spread over the peers must serve."""
CHOICE_PEERS_MAX = 200
"""In larger swarms a plan has no choice of flows."""
PACES = (1.0, 0.85, 0.7, 1.2)
"""Times the pace of the forecast: a flow by KV room lets more in, and then each of them moves more slowly."""
LOADED = 1.3
"""Times as long as alone a token takes in a swarm that is full, as a guess."""
_ROOMY: WeakKeyDictionary[Problem, Problem] = WeakKeyDictionary()


def served(problem: Problem, spans: Spans, model: CapacityModel) -> tuple[Routing, Forecast]:
    """What a search takes a placement to serve, by one flow or two; in large swarms in the paper's model."""
    if is_large(problem):
        routing = _in_large(problem, spans)
        return routing, forecast(problem, spans, routing)
    quick = max_flow(problem, spans, model)
    outlook = forecast(problem, spans, quick)
    if not outlook.kv_limited or outlook.tokens_per_s <= 0:
        return quick, outlook
    roomy = at_pace(problem, spans, outlook.tokens_per_s / outlook.sessions)
    paced = max_flow(roomy, spans, model)
    whole = max_flow(roomy, spans, CapacityModel.PAPER)
    found = [(quick, outlook), *((each, forecast(problem, spans, each)) for each in (paced, whole))]
    return max(found, key=lambda pair: _rate(pair[1]))


def planned_routing(problem: Problem, spans: Spans, model: CapacityModel) -> Routing:
    """The flow that a plan says: spread over peers that can share it, unless another is predicted to serve more.

    In large swarms, what a search would see.
    """
    if is_large(problem):
        return _in_large(problem, spans)
    spread = max_flow(problem, spans, model, final=True)
    found = [spread, max_flow(problem, spans, model)]
    outlooks = [forecast(problem, spans, each) for each in found]
    most = max(outlooks, key=_rate)
    if most.kv_limited and most.tokens_per_s > 0:
        pace = most.tokens_per_s / most.sessions
        paced = [at_pace(problem, spans, pace * factor) for factor in PACES]
        more = [max_flow(each, spans, model, final=final) for final in (True, False) for each in paced]
        more += [max_flow(each, spans, CapacityModel.PAPER) for each in paced]
        found, outlooks = found + more, outlooks + [forecast(problem, spans, each) for each in more]
    enough = SPREAD_MIN * max(map(_rate, outlooks))
    chosen = next(each for each, outlook in zip(found, outlooks, strict=True) if _rate(outlook) >= enough)
    return replace(chosen, limits=spread.limits)


def _rate(outlook: Forecast) -> float:
    return outlook.tokens_per_s


def is_large(problem: Problem) -> bool:
    """Whether every flow in the exact model takes seconds."""
    return len(problem.peers) > CHOICE_PEERS_MAX


def _in_large(problem: Problem, spans: Spans) -> Routing:
    """A flow of compute and KV room: the paper's model counts whole spans, as peers do that let requests in."""
    return max_flow(at_pace(problem, spans, usual_pace(problem)), spans, CapacityModel.PAPER)


def by_room(problem: Problem) -> Problem:
    """The same with peers that carry no more than the requests they have room for, whatever they hold, at a usual pace.

    Whole requests, but for peers that have room for less than one. Always the same problem for the same.
    """
    if problem not in _ROOMY:
        pace = problem.flow_per_token * usual_pace(problem)
        lengths = np.arange(problem.layers + 1)
        _ROOMY[problem] = replace(
            problem,
            peers=tuple(replace(peer, capacity=_limited(problem, peer, lengths, pace)) for peer in problem.peers),
        )
    return _ROOMY[problem]


def usual_pace(problem: Problem) -> float:
    """Decoded tokens/s of one request in a swarm that is full, guessed from its typical peers, spans and links."""
    room = np.array([peer.kv_token_layers[0] for peer in problem.peers], dtype=np.float64)
    layer_s = float(room @ np.array([peer.decode_s for peer in problem.peers])) / max(1.0, float(room.sum()))
    spans = [max(peer.layers_max) for peer in problem.peers if any(peer.layers_max)]
    hop_s = float(np.median(problem.link_s[~np.eye(len(problem.peers), dtype=bool)]))
    return 1.0 / (LOADED * problem.layers * (layer_s + hop_s / (sum(spans) / len(spans))))


def _limited(problem: Problem, peer: PlanPeer, lengths: NDArray[np.intp], pace: float) -> tuple[float, ...]:
    requests = np.minimum(
        np.array(peer.kv_token_layers) / np.maximum(1, lengths * problem.session_tokens), problem.sessions_max
    )
    whole = np.where(requests >= 1, np.floor(requests), requests)
    return tuple(np.minimum(peer.capacity, whole * lengths * pace).tolist())


def at_pace(problem: Problem, spans: Spans, tokens_per_s: float) -> Problem:
    """The same with peers that carry no more than their KV room lets in, each request at so many decoded tokens/s."""
    peers = [
        peer if span is None else _paced(problem, peer, span, tokens_per_s)
        for peer, span in zip(problem.peers, spans, strict=True)
    ]
    return replace(problem, peers=tuple(peers))


def _paced(problem: Problem, peer: PlanPeer, span: Span, tokens_per_s: float) -> PlanPeer:
    requests = min(peer.kv_room(span, problem.layers) / (problem.session_tokens * len(span)), problem.sessions_max)
    most = requests * len(span) * tokens_per_s * problem.flow_per_token
    return replace(peer, capacity=tuple([min(each, most) for each in peer.capacity]))

"""What makes one placement better than another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.predict import Forecast
from helixnet.planner.problem import Problem, Spans
from helixnet.planner.served import served

UNCOVERED = -1000.0
"""What each uncovered layer costs: worse than anything that serves, and less bad the fewer there are."""
SERVES_MIN = UNCOVERED / 2
"""Every placement that covers all layers scores more than this, every other one less."""
FLOOR_WEIGHT = 20.0
"""What missing the floor altogether would cost: a hundredth of the flow missing costs as much as a fifth of the rate,
which is more than any sensible way of getting it back does, and far less than an uncovered layer."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The logarithm of the rate, plus weights for what else counts; 0.1 is worth a tenth more tokens/s.

    `predicted` weighs what will be served (KV, hops, batches); otherwise the flow alone counts.
    """

    model: CapacityModel
    predicted: bool
    survival: float = 0.0
    """For a swarm that still covers every layer whichever peer leaves; in proportion to the peers that may."""
    replicas: float = 0.0
    """For every layer held twice; more replicas count less and less. Shows the way to survival."""
    latency: float = 0.0
    """For each factor e by which one request alone is quicker."""
    room: float = 0.0
    """For each factor e of more requests in flight than saturation needs."""
    moves: float = 0.0
    """Against loading the whole swarm anew; in proportion to the layers loaded."""
    floor: float = 0.0
    """The share of the flow that should be left whichever peer leaves, 0 to 1; what is missing costs FLOOR_WEIGHT."""

    @property
    def is_throughput(self) -> bool:
        """Whether what the swarm serves counts most."""
        return self.predicted and self.latency < 1.0 and not self.floor


BALANCED = Objective(
    CapacityModel.EXACT, predicted=True, survival=0.25, replicas=0.1, latency=0.2, room=0.01, moves=0.05
)
THROUGHPUT = Objective(CapacityModel.EXACT, predicted=True, room=0.01)
LATENCY = Objective(CapacityModel.EXACT, predicted=True, latency=3.0, room=0.01)
PAPER = Objective(CapacityModel.PAPER, predicted=False)
PRESETS = {"throughput": THROUGHPUT, "balanced": BALANCED, "latency": LATENCY, "throughput-paper": PAPER}
"""By the names that people give them."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A placement with its worth; larger is better."""

    spans: Spans
    score: float


def score(problem: Problem, objective: Objective, spans: Spans) -> float:
    """The worth of `spans`; below SERVES_MIN if they do not cover every layer."""
    gaps = sum(count == 0 for count in coverage(problem, spans))
    if gaps:
        return UNCOVERED * gaps
    if not objective.predicted:
        flow = max_flow(problem, spans, objective.model).tokens_per_s
        if flow <= 0:
            return UNCOVERED  # links that carry nothing lie between
        return math.log(flow) + _extras(problem, objective, spans) - _missing(problem, objective, spans)
    _, outlook = served(problem, spans, objective.model)
    if outlook.tokens_per_s <= 0:
        return UNCOVERED  # the same, or no room for anyone's KV
    missing = _missing(problem, objective, spans)
    return _served(objective, outlook) + _extras(problem, objective, spans) - missing


def _served(objective: Objective, outlook: Forecast) -> float:
    return (
        math.log(outlook.tokens_per_s)
        - objective.latency * math.log(outlook.tpot_s)
        + objective.room * math.log(outlook.sessions)
    )


def score_at_most(problem: Problem, objective: Objective, spans: Spans) -> float:
    """No less than `score`, without solving a flow: lets a search pass over what cannot be good."""
    counts, supply = [0] * problem.layers, [0.0] * problem.layers
    total = room = 0.0
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None:
            capacity = peer.capacity[len(span)]
            total += capacity
            room += min(peer.kv_room(span, problem.layers), problem.sessions_max * problem.session_tokens * len(span))
            for layer in span.layers():
                counts[layer] += 1
                supply[layer] += capacity if objective.model is CapacityModel.EXACT else capacity / len(span)
    thinnest = min(supply)
    if thinnest <= 0:
        return UNCOVERED * counts.count(0)
    flow = min(thinnest, total / problem.layers)
    quickest = problem.layers * min(peer.decode_s for peer in problem.peers)
    sessions = max(1.0, room / (problem.session_tokens * problem.layers))
    served = math.log(flow) - objective.latency * math.log(quickest) + objective.room * math.log(sessions)
    return (served if objective.predicted else math.log(flow)) + _extras(problem, objective, spans)


def _extras(problem: Problem, objective: Objective, spans: Spans) -> float:
    """What the spans are worth whatever flows through them."""
    value = 0.0
    if objective.survival or objective.replicas:
        counts = coverage(problem, spans)
        value += objective.replicas * sum(2 - 2.0 ** (2 - count) for count in counts) / len(counts)
        value += objective.survival * survivable_share(spans, counts)
    if objective.moves:
        value -= objective.moves * moved_share(problem, spans)
    return value


def coverage(problem: Problem, spans: Spans) -> list[int]:
    """How many peers hold each layer."""
    counts = [0] * problem.layers
    for span in spans:
        for layer in span.layers() if span is not None else ():
            counts[layer] += 1
    return counts


def survivable_share(spans: Spans, counts: list[int]) -> float:
    """Share of the peers with a span that may leave without uncovering a layer."""
    held = [span for span in spans if span is not None]
    spared = sum(all(counts[layer] > 1 for layer in span.layers()) for span in held)
    return spared / len(held) if held else 0.0


def _missing(problem: Problem, objective: Objective, spans: Spans) -> float:
    """What it costs that the worst departure leaves less of the flow than the floor."""
    if not objective.floor:
        return 0.0
    flow = max_flow(problem, spans, objective.model).tokens_per_s
    return FLOOR_WEIGHT * max(0.0, objective.floor - left_by_supply(problem, spans, flow)[0])


def left_by_supply(problem: Problem, spans: Spans, flow: float) -> tuple[float, int]:
    """About which share of `flow` is left after the worst single departure, and whose that is; links aside.

    What is left is taken to be the least that a layer's other holders supply, each T(k).
    """
    supply, largest, whose = [0.0] * problem.layers, [0.0] * problem.layers, [0] * problem.layers
    for index, (peer, span) in enumerate(zip(problem.peers, spans, strict=True)):
        if span is not None:
            rate = peer.tokens_per_s(len(span))
            for layer in span.layers():
                supply[layer] += rate
                if rate > largest[layer]:
                    largest[layer], whose[layer] = rate, index
    left, layer = min((supply[layer] - largest[layer], layer) for layer in range(problem.layers))
    return min(1.0, left / flow), whose[layer]


def moved_share(problem: Problem, spans: Spans) -> float:
    """Layers that peers which hold something would have to load, as a share of what they hold then."""
    moved = total = 0
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None and peer.held is not None:
            kept = max(0, min(span.stop, peer.held.stop) - max(span.start, peer.held.start))
            moved += len(span) - kept
            total += len(span)
    return moved / total if total else 0.0

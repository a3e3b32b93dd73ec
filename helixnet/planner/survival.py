"""What is left of the flow when one peer leaves and nobody moves, and placements that keep a stated share of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.objective import Objective, left_by_supply
from helixnet.planner.problem import Problem, Spans

PEERS_MAX = 200
"""In larger swarms what is left is estimated: a flow for each departure takes too long."""
TRIES = 2
"""Solves at most, each aiming higher by what was missing in the last: objectives only estimate what is left."""
FLOOR_MAX = 0.98
"""No aim is higher: nothing is left whole when a peer leaves that carries something."""
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Survival:
    """What the worst single departure leaves."""

    share: float
    """Of the flow, 0 to 1."""
    peer: int
    """Whose departure that is."""
    estimated: bool = False

    def reaches(self, floor: float) -> bool:
        """Whether so much is left."""
        return self.share >= floor - ROUNDING


def survival(problem: Problem, spans: Spans, model: CapacityModel = CapacityModel.EXACT) -> Survival:
    """What is left of the largest flow of `spans` after the worst departure; 0 if nothing flows in the first place.

    The max flow without each peer that carries something; for more than PEERS_MAX peers by the supply of each layer.
    """
    routing = max_flow(problem, spans, model)
    if routing.tokens_per_s <= 0:
        return Survival(0.0, 0)
    if len(problem.peers) > PEERS_MAX:
        return Survival(*left_by_supply(problem, spans, routing.tokens_per_s), estimated=True)
    left = [
        (max_flow(problem, (*spans[:index], None, *spans[index + 1 :]), model).tokens_per_s, index)
        for index, load in enumerate(routing.loads)
        if load > 0
    ]
    least, peer = min(left)
    return Survival(min(1.0, least / routing.tokens_per_s), peer)


def place_surviving(
    problem: Problem, objective: Objective, floor: float, solver: Callable[[Objective], Spans]
) -> Spans:
    """What `solver` finds for `objective` with a floor: the first try that reaches it, else the one nearest to it."""
    aim = floor
    tries: list[tuple[float, Spans]] = []
    for _ in range(TRIES):
        spans = solver(replace(objective, floor=aim))
        share = survival(problem, spans, objective.model).share
        tries.append((share, spans))
        missing = floor - share
        if missing <= ROUNDING or aim >= FLOOR_MAX:
            break
        flow = max_flow(problem, spans, objective.model).tokens_per_s
        if flow <= 0 or left_by_supply(problem, spans, flow)[0] < aim - ROUNDING:
            break  # not even the estimate got there: a higher aim would change nothing
        aim = min(FLOOR_MAX, aim + missing)
    return max(tries, key=lambda each: each[0])[1]

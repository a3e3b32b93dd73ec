"""The planner as the simulated coordinator's worker: the real one, inline, its seconds modelled."""

from __future__ import annotations

from helixnet.core.errors import HelixError
from helixnet.core.machine import Solve, Solved
from helixnet.planner.flow import CapacityModel
from helixnet.planner.objective import BALANCED, Objective
from helixnet.planner.problem import Workload, from_snapshot, require_room
from helixnet.planner.solve import MEND_PEERS_MIN, Budget, evaluate, mend, solve, to_placement
from helixnet.planner.starts import starts
from helixnet.sim.swarm import Solving

SOLVE_S, SOLVE_PEER_S, SOLVE_S_MAX = 1.0, 0.1, 30.0
REPAIR_S, REPAIR_PEER_S = 0.5, 0.006
"""What a solve and a repair take in virtual time, and each of the peers; measured on one core of an AMD EPYC."""


def planner(workload: Workload, objective: Objective = BALANCED, budget: Budget | None = None) -> Solving:
    """The real planner, as the daemon's worker process calls it."""

    def solving(effect: Solve) -> tuple[Solved, float]:
        seconds = _seconds(len(effect.snapshot.peers), effect.repair)
        find = mend if effect.repair else solve
        try:
            placement = find(effect.snapshot, effect.seed, budget, objective, None, workload)
        except HelixError as error:
            return Solved(None, None, str(error), seconds), seconds
        current = None
        if effect.current is not None:
            current = evaluate(effect.snapshot, effect.current.assignments, CapacityModel.EXACT, workload)
        return Solved(placement, current, "", seconds), seconds

    return solving


def _seconds(peers: int, repair: bool) -> float:
    if repair and peers >= MEND_PEERS_MIN:
        return REPAIR_S + REPAIR_PEER_S * peers
    return min(SOLVE_S_MAX, SOLVE_S + SOLVE_PEER_S * peers)


def first_fit(workload: Workload, seconds: float = 0.05) -> Solving:
    """Only the planner's first constructive start: for thousands of small swarms that test the protocol, not plans."""

    def solving(effect: Solve) -> tuple[Solved, float]:
        problem = from_snapshot(effect.snapshot, workload)
        try:
            require_room(problem)
        except HelixError as error:
            return Solved(None, None, str(error), seconds), seconds
        placement = to_placement(problem, starts(problem)[0], CapacityModel.EXACT)
        current = None
        if effect.current is not None:
            current = evaluate(effect.snapshot, effect.current.assignments, CapacityModel.EXACT, workload)
        return Solved(placement, current, "", seconds), seconds

    return solving

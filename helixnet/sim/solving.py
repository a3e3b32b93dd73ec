"""The planner as the simulated coordinator's worker: the real one, its seconds modelled; and simpler ones."""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial

import msgspec

from helixnet.core.errors import HelixError
from helixnet.core.machine import Solve, Solved
from helixnet.core.plan.plan import Placement
from helixnet.planner.flow import CapacityModel
from helixnet.planner.objective import BALANCED, Objective
from helixnet.planner.problem import Workload, from_snapshot, require_room
from helixnet.planner.solve import MEND_PEERS_MIN, Budget, answer, evaluate, to_placement
from helixnet.planner.starts import starts
from helixnet.sim.swarm import Answer, Solving

SOLVE_S, SOLVE_PEER_S, SOLVE_S_MAX = 1.0, 0.1, 30.0
REPAIR_S, REPAIR_PEER_S = 0.5, 0.006
"""What a solve and a repair take in virtual time, and each of the peers: about twice what a free core of an AMD EPYC
takes for 1 000 peers, for a coordinator serves, too."""
FIRST_FIT_S, FIXED_S = 0.05, 0.1


def planner(
    workload: Workload,
    objective: Objective = BALANCED,
    budget: Budget | None = None,
    workers: Executor | None = None,
) -> Solving:
    """The real planner, as the daemon's worker process calls it: on `workers`, beside the simulation, or in line.

    Either way it says the same.
    """

    def solving(effect: Solve) -> tuple[Answer, float]:
        seconds = _seconds(len(effect.snapshot.peers), effect.repair)
        ahead = workers.submit(answer, effect, budget, objective, workload) if workers is not None else None

        def solved() -> Solved:
            found = answer(effect, budget, objective, workload) if ahead is None else ahead.result()
            return msgspec.structs.replace(found, seconds=seconds)

        return solved, seconds

    return solving


def _seconds(peers: int, repair: bool) -> float:
    if repair and peers >= MEND_PEERS_MIN:
        return REPAIR_S + REPAIR_PEER_S * peers
    return min(SOLVE_S_MAX, SOLVE_S + SOLVE_PEER_S * peers)


def first_fit(workload: Workload) -> Solving:
    """Only the planner's first constructive start: for thousands of small swarms that test the protocol, not plans."""

    def solved(effect: Solve) -> Solved:
        problem = from_snapshot(effect.snapshot, workload)
        try:
            require_room(problem)
        except HelixError as error:
            return Solved(None, None, str(error), FIRST_FIT_S)
        placement = to_placement(problem, starts(problem)[0], CapacityModel.EXACT)
        current = None
        if effect.current is not None:
            current = evaluate(effect.snapshot, effect.current.assignments, CapacityModel.EXACT, workload)
        return Solved(placement, current, "", FIRST_FIT_S)

    return lambda effect: (partial(solved, effect), FIRST_FIT_S)


def always(placement: Placement) -> Solving:
    """A planner with one idea: it waits until everybody of it is there."""

    def solved(effect: Solve) -> Solved:
        here = {view.peer for view in effect.snapshot.peers}
        if any(assignment.peer not in here for assignment in placement.assignments):
            return Solved(None, None, "not everybody is there yet")
        return Solved(placement, effect.current, "", FIXED_S)

    return lambda effect: (partial(solved, effect), FIXED_S)

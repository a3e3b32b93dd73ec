"""The ways into the planner: `solve` and `place` find a placement, `evaluate` says what a given one is worth today."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec

from helixnet.core.errors import HelixError
from helixnet.core.machine import Solve, Solved
from helixnet.core.plan.plan import Assignment, Flow, Placement
from helixnet.core.plan.snapshot import Snapshot
from helixnet.core.types import PeerId
from helixnet.planner.bounds import proven_bound
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.flow import OUTSIDE, CapacityModel
from helixnet.planner.laid import laid_starts
from helixnet.planner.largest import ROAM_PEERS_MAX, largest_flow
from helixnet.planner.milp import MILP_LAYER_CHOICES_MAX, MILP_PEERS_MAX, solve_exactly
from helixnet.planner.objective import BALANCED, PAPER, Objective
from helixnet.planner.predict import predict
from helixnet.planner.problem import Cancelled, Problem, Spans, Workload, from_snapshot, require_room
from helixnet.planner.replan import repaired_start
from helixnet.planner.search import Search
from helixnet.planner.served import by_room, is_large, planned_routing
from helixnet.planner.starts import starts

BY_FLOW_SHARE = 0.25
"""Of the work for flow alone, for a search that computes each flow, where links bind."""
MEND_PEERS_MIN = 16
"""In smaller swarms a whole search takes about as long as a repair."""
LARGE_SHARE = 0.25
"""Of the work for flow alone, for a large swarm that waits for its plan: 10 s instead of 26 with 1 000 peers, and a
twentieth less is served."""
MOVING_PAYS = 1.1
"""Times the flow of what is held, repaired, that spans found anew must carry in a large swarm."""
REACHED = 0.92
"""Of the proven bound, at most, by searches of large swarms (docs/planning.md)."""
CELLS_PER_WORK = 200
"""Array cells filled in the time of one unit of such a search's work."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How much work a solve may do. Counted, not timed, so that it always ends with the same plan."""

    work: int = 60_000
    """Of the search, at least; a unit is about 8 microseconds."""
    work_per_peer: int = 10_000
    work_max: int = 100_000
    milp_nodes: int = 20_000
    """Of the exact solver's tree, for swarms small enough for it; 0 leaves it out."""
    flow_work: int = 600_000_000
    """Of the search for flow alone, in array cells, at least; about 25 million take a second."""
    flow_work_per_peer: int = 10_000_000
    flow_work_max: int = 1_050_000_000
    laying_work: int = 50_000_000
    """Of laying placements that the search for everything else begins with, in the same unit, at most."""
    laying_work_per_peer: int = 3_000_000

    def work_for(self, peers: int) -> int:
        """Work of the search in a swarm of so many peers."""
        return min(self.work_max, self.work + self.work_per_peer * peers)

    def flow_work_for(self, peers: int) -> int:
        """Likewise of the search for flow alone."""
        return min(self.flow_work_max, self.flow_work + self.flow_work_per_peer * peers)


def solve(
    snapshot: Snapshot,
    seed: int,
    budget: Budget | None = None,
    objective: Objective = BALANCED,
    cancelled: Cancelled | None = None,
    workload: Workload | None = None,
) -> Placement:
    """The best placement found for the peers of `snapshot` that are not draining.

    Every peer with room for a layer gets a span. The same seed and budget give the same placement; `cancelled`
    ends the search early with the best so far.

    Raises:
        MemoryTooSmall: no peer has room for one layer.
        SwarmTooSmall: the peers together cannot hold every layer.
    """
    problem = from_snapshot(snapshot, workload)
    return to_placement(problem, place(problem, seed, budget, objective, cancelled), objective.model)


def mend(
    snapshot: Snapshot,
    seed: int,
    budget: Budget | None = None,
    objective: Objective = BALANCED,
    cancelled: Cancelled | None = None,
    workload: Workload | None = None,
) -> Placement:
    """Soon after somebody came or went: what the peers hold, repaired with few moves; otherwise as `solve`.

    Where few hold anything, or there are so few peers that a whole search is quick, it is `solve`.

    Raises:
        MemoryTooSmall: no peer has room for one layer.
        SwarmTooSmall: the peers together cannot hold every layer.
    """
    problem = from_snapshot(snapshot, workload)
    return to_placement(problem, _mended(problem, seed, budget, objective, cancelled), objective.model)


def answer(
    question: Solve, budget: Budget | None = None, objective: Objective = BALANCED, workload: Workload | None = None
) -> Solved:
    """What a coordinator asked, answered: a placement or why there is none, and what the current one is worth today."""
    problem = from_snapshot(question.snapshot, workload)
    find = _mended if question.repair else place
    try:
        spans = find(problem, question.seed, budget, objective)
    except HelixError as error:
        return Solved(None, None, str(error))
    placement = to_placement(problem, spans, objective.model)
    if question.current is None:
        return Solved(placement, None)
    today = _spans_of(problem, question.current.assignments)
    return Solved(placement, placement if today == spans else to_placement(problem, today, objective.model))


def place(
    problem: Problem,
    seed: int,
    budget: Budget | None = None,
    objective: Objective = BALANCED,
    cancelled: Cancelled | None = None,
) -> Spans:
    """The spans of the best placement found; otherwise as `solve`.

    Raises:
        MemoryTooSmall: no peer has room for one layer.
        SwarmTooSmall: the peers together cannot hold every layer.
    """
    require_room(problem)
    allowance, rng, stopped = budget or Budget(), random.Random(seed), cancelled or (lambda: False)
    built = starts(problem)
    count = len(problem.peers)
    if objective.model is CapacityModel.PAPER and not objective.predicted:
        exact = _exactly(problem, allowance)
        return exact or _largest(problem, built, rng, allowance.flow_work_for(count), stopped)
    if is_large(problem) and objective.is_throughput:
        return _place_large(problem, built, rng, int(LARGE_SHARE * allowance.flow_work_for(count)), stopped)
    laying_work = min(allowance.laying_work, allowance.laying_work_per_peer * count)
    constructed = list(built)
    built += laid_starts(problem, objective, rng, laying_work, stopped)
    if objective.is_throughput:
        built.append(largest_flow(by_room(problem), constructed, rng, laying_work, stopped).spans)
    repaired = repaired_start(problem)
    if repaired is not None:
        built.append(repaired)
    return Search(problem, objective, rng, allowance.work_for(count), cancelled).run(built).spans


def to_placement(problem: Problem, spans: Spans, model: CapacityModel) -> Placement:
    """The flows and the prediction that these spans give; a prediction of zero if they cannot serve."""
    routing = planned_routing(problem, spans, model)
    assignments = [
        Assignment(peer.peer, span) for peer, span in zip(problem.peers, spans, strict=True) if span is not None
    ]

    def name(index: int) -> PeerId | None:
        return None if index == OUTSIDE else problem.peers[index].peer

    flows = [Flow(name(source), name(target), rate) for (source, target), rate in routing.edges.items()]
    return Placement(
        assignments=tuple(assignments),
        flows=tuple(sorted(flows, key=lambda flow: (flow.source or "", flow.target or ""))),
        prediction=predict(problem, spans, routing),
    )


def evaluate(
    snapshot: Snapshot,
    assignments: Iterable[Assignment],
    model: CapacityModel = CapacityModel.EXACT,
    workload: Workload | None = None,
) -> Placement:
    """The flows and the prediction that these spans give in `snapshot`; a prediction of zero if they cannot serve.

    Peers that are gone or draining are left out; spans are taken as they are, whatever the memory says.
    """
    problem = from_snapshot(snapshot, workload)
    return to_placement(problem, _spans_of(problem, assignments), model)


def _spans_of(problem: Problem, assignments: Iterable[Assignment]) -> Spans:
    given = {assignment.peer: assignment.span for assignment in assignments}
    return tuple(given.get(peer.peer) for peer in problem.peers)


def _mended(
    problem: Problem, seed: int, budget: Budget | None, objective: Objective, cancelled: Cancelled | None = None
) -> Spans:
    """What the peers hold, repaired; found anew as `place` does where that is as quick, or little is held."""
    require_room(problem)
    known = by_room(problem) if is_large(problem) else problem
    repaired = repaired_start(known) if len(problem.peers) >= MEND_PEERS_MIN else None
    return repaired or place(problem, seed, budget, objective, cancelled)


def _place_large(problem: Problem, built: list[Spans], rng: random.Random, work: int, stopped: Cancelled) -> Spans:
    """The spans with the largest flow of compute and KV room found, or what is held, repaired, if about as good.

    Where no search can be so much better, none is begun.

    What else an objective weighs is left to chance where looking at one placement takes seconds.
    """
    roomy = by_room(problem)
    repaired = repaired_start(roomy)
    if repaired is None:
        return _largest(roomy, built, rng, work, stopped)
    pays_from = MOVING_PAYS * paper_max_flow(roomy, repaired)
    if pays_from > REACHED * proven_bound(roomy):
        return repaired
    found = _largest(roomy, [*built, repaired], rng, work, stopped)
    return found if paper_max_flow(roomy, found) >= pays_from else repaired


def _largest(problem: Problem, built: list[Spans], rng: random.Random, work: int, stopped: Cancelled) -> Spans:
    """The spans with the largest flow found; small swarms whose links bind are also searched flow by flow."""
    small = len(problem.peers) <= ROAM_PEERS_MAX
    found = largest_flow(problem, built, rng, int(work * (1 - BY_FLOW_SHARE)), stopped)
    if not small or not found.links_bind:
        return found.spans
    search = Search(problem, PAPER, rng, int(work * BY_FLOW_SHARE / CELLS_PER_WORK), stopped)
    return search.run([found.spans]).spans


def _exactly(problem: Problem, budget: Budget) -> Spans | None:
    """The spans with the largest flow, where the swarm is small enough for them to be proven."""
    small = len(problem.peers) <= MILP_PEERS_MAX and len(problem.peers) * problem.layers <= MILP_LAYER_CHOICES_MAX
    if not small or not budget.milp_nodes:
        return None
    exact = solve_exactly(problem, budget.milp_nodes)
    return exact.spans if exact is not None else None

"""The paper's placement problem as a mixed-integer program (arXiv 2406.01566, section 4.4), through PuLP with HiGHS.

Exact under the paper's capacity model, links and partial inference included, but a big-M model: it is for swarms of a
few peers and layers, as a check of the search and as one of its starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import pulp

from helixnet.core.types import Span
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.flow import OUTSIDE, Edge
from helixnet.planner.problem import Problem, SpanOrNone, Spans

MILP_PEERS_MAX = 6
MILP_LAYER_CHOICES_MAX = 96
"""Peers times layers; beyond this HiGHS seldom ends within seconds."""
GAP_MAX = 1e-6


@dataclass(frozen=True, slots=True)
class Exact:
    """What the solver proved to be best."""

    spans: Spans
    tokens_per_s: float


def solve_exactly(problem: Problem, nodes_max: int, seconds_max: float | None = None) -> Exact | None:
    """The placement with the largest flow in the paper's model; None if that was not proven within the limits.

    Every peer with room holds at least one layer. Limited by nodes, not seconds, where plans must be reproducible.
    """
    program = _Program(problem)
    solver = pulp.HiGHS(
        msg=False, threads=1, timeLimit=seconds_max, gapRel=GAP_MAX, mip_max_nodes=nodes_max, random_seed=0
    )
    # Step by step: PuLP's own `solve` raises KeyError when HiGHS stops at its limit of nodes.
    solver.createAndConfigureSolver(program.lp)
    solver.buildSolverModel(program.lp)
    solver.callSolver(program.lp)
    if program.lp.solverModel.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solver.findSolutionValues(program.lp)
    return Exact(program.spans(), program.tokens_per_s())


class _Program:
    """Variables of each peer with room: start, how many layers are held (one binary for each number), whether it
    holds the first and the last layer; of each possible edge: its flow, and a switch that may be on only if the
    spans allow the edge. Flows are scaled to the coverage bound, so that switches can serve as their limits.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.unit = coverage_bound(problem)
        self.members = [i for i, peer in enumerate(problem.peers) if any(peer.layers_max)]
        self.lp = pulp.LpProblem("placement", pulp.LpMaximize)
        layers, members = problem.layers, self.members
        self.start = {i: self.lp.add_variable(f"start_{i}", 0, layers - 1, pulp.LpInteger) for i in members}
        self.holds = {
            (i, k): self.lp.add_variable(f"holds_{i}_{k}", cat=pulp.LpBinary) for i in members for k in self._lengths(i)
        }
        self.stop = {i: self.start[i] + pulp.lpSum(k * self.holds[i, k] for k in self._lengths(i)) for i in members}
        self.first = {i: self.lp.add_variable(f"first_{i}", cat=pulp.LpBinary) for i in members}
        self.last = {i: self.lp.add_variable(f"last_{i}", cat=pulp.LpBinary) for i in members}
        inner = [(i, j) for i in members for j in members if i != j]
        self.flow: dict[Edge, pulp.LpVariable] = {}
        for i, j in [*((OUTSIDE, i) for i in members), *((i, OUTSIDE) for i in members), *inner]:
            self.flow[i, j] = self.lp.add_variable(f"flow_{i + 1}_{j + 1}", 0, 1)
        self.lp += pulp.lpSum(self.flow[OUTSIDE, i] for i in members)
        for index in members:
            self._place(index)
            self._carry(index)
        for edge in inner:
            self._connect(edge)

    def spans(self) -> Spans:
        """The spans of the solution."""
        placed: list[SpanOrNone] = [None] * len(self.problem.peers)
        for index in self.members:
            start = round(self.start[index].value())
            length = next(k for k in self._lengths(index) if self.holds[index, k].value() > 0.5)
            placed[index] = Span(start, start + length)
        return tuple(placed)

    def tokens_per_s(self) -> float:
        """The flow of the solution."""
        return float(pulp.value(self.lp.objective)) * self.unit

    def _lengths(self, index: int) -> range:
        return range(1, max(self.problem.peers[index].layers_max) + 1)

    def _place(self, index: int) -> None:
        """One length, inside the model, within memory: less of it where the span touches an end of the model."""
        layers, room = self.problem.layers, self.problem.room
        first, last = self.first[index], self.last[index]
        self.lp += pulp.lpSum(self.holds[index, k] for k in self._lengths(index)) == 1
        self.lp += self.stop[index] <= layers - 1 + last
        self.lp += self.start[index] >= 1 - first
        self.lp += self.start[index] <= (layers - 1) * (1 - first)
        self.lp += self.stop[index] >= layers * last
        inner = room(index, False, False)
        length = pulp.lpSum(k * self.holds[index, k] for k in self._lengths(index))
        self.lp += (
            length <= inner - (inner - room(index, True, False)) * first - (inner - room(index, False, True)) * last
        )
        if not room(index, True, True):
            self.lp += first + last <= 1

    def _carry(self, index: int) -> None:
        """What comes in goes out, and is at most T(k); clients reach only who holds an end."""
        others = [OUTSIDE, *(i for i in self.members if i != index)]
        incoming = pulp.lpSum(self.flow[i, index] for i in others)
        self.lp += incoming == pulp.lpSum(self.flow[index, i] for i in others)
        peer = self.problem.peers[index]
        self.lp += incoming <= pulp.lpSum(
            min(1.0, peer.tokens_per_s(k) / self.unit) * self.holds[index, k] for k in self._lengths(index)
        )
        self.lp += self.flow[OUTSIDE, index] <= self.first[index]
        self.lp += self.flow[index, OUTSIDE] <= self.last[index]

    def _connect(self, edge: Edge) -> None:
        """The edge carries something only if its target holds the layer at which its source stops."""
        i, j = edge
        layers = self.problem.layers
        switch = self.lp.add_variable(f"switch_{i}_{j}", cat=pulp.LpBinary)
        self.lp += self.start[j] <= self.stop[i] + layers * (1 - switch)
        self.lp += self.stop[i] + 1 <= self.stop[j] + layers * (1 - switch)
        self.lp += self.flow[edge] <= min(1.0, float(self.problem.link_tokens_per_s[edge]) / self.unit) * switch

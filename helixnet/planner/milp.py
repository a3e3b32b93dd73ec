"""The paper's placement problem as a mixed-integer program (arXiv 2406.01566, section 4.4), through PuLP with HiGHS.

Exact under the paper's capacity model, links and partial inference included, but a big-M model: it is for swarms of a
few peers and layers, as a check of the search and as one of its starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
import pulp

from helixnet.core.types import Span
from helixnet.planner.bounds import proven_bound
from helixnet.planner.flow import OUTSIDE, Edge, edges_of
from helixnet.planner.problem import Problem, SpanOrNone, Spans

MILP_PEERS_MAX = 6
MILP_LAYER_CHOICES_MAX = 48
"""Peers times layers; beyond this HiGHS seldom ends within seconds."""
GAP_MAX = 1e-6


@dataclass(frozen=True, slots=True)
class Exact:
    """What the solver proved to be best."""

    spans: Spans
    tokens_per_s: float


def solve_exactly(
    problem: Problem,
    nodes_max: int,
    seconds_max: float | None = None,
    incumbent: Spans | None = None,
    links_kept: int | None = None,
) -> Exact | None:
    """The placement with the largest flow in the paper's model; None if that was not proven within the limits.

    Every peer with room holds at least one layer. Limited by nodes, not seconds, where plans must be reproducible.
    The solver starts from `incumbent` if that gives each peer with room a span, and ends when the proven bound is met.
    With `links_kept` only so many of the fastest links from each peer count (the paper prunes slow links): the flow is
    then the largest over these, and a bound on nothing.
    """
    unit = proven_bound(problem)
    if unit <= 0:
        return None
    program = _Program(problem, unit, links_kept)
    solver = pulp.HiGHS(
        msg=False, threads=1, timeLimit=seconds_max, gapRel=GAP_MAX, mip_max_nodes=nodes_max, random_seed=0
    )
    # Step by step: PuLP's own `solve` raises KeyError when HiGHS stops at its limit of nodes.
    solver.createAndConfigureSolver(program.lp)
    solver.buildSolverModel(program.lp)
    if incumbent is not None and all(incumbent[index] is not None for index in program.members):
        program.begin_with(incumbent)
    solver.callSolver(program.lp)
    if program.lp.solverModel.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solver.findSolutionValues(program.lp)
    return Exact(program.spans(), program.tokens_per_s())


class _Program:
    """Variables of each peer with room: start, how many layers are held (one binary for each number), whether it
    holds the first and the last layer; of each possible edge: its flow, and a switch that may be on only if the
    spans allow the edge. Flows are scaled to `unit`, which none of them exceeds, so that switches can serve as their
    limits.
    """

    def __init__(self, problem: Problem, unit: float, links_kept: int | None) -> None:
        self.problem, self.unit = problem, unit
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
        inner = [(i, j) for i in members for j in self._linked(i, links_kept)]
        self.flow: dict[Edge, pulp.LpVariable] = {}
        for i, j in [*((OUTSIDE, i) for i in members), *((i, OUTSIDE) for i in members), *inner]:
            self.flow[i, j] = self.lp.add_variable(f"flow_{i + 1}_{j + 1}", 0, 1)
        self.switch = {(i, j): self.lp.add_variable(f"switch_{i}_{j}", cat=pulp.LpBinary) for i, j in inner}
        self.lp += pulp.lpSum(self.flow[OUTSIDE, i] for i in members)
        self.lp += pulp.lpSum(self.flow[OUTSIDE, i] for i in members) <= 1  # ends the search where the bound is met
        for index in members:
            self._place(index)
            self._carry(index)
        for edge in inner:
            self._connect(edge)

    def begin_with(self, spans: Spans) -> None:
        """Tells the solver of a placement; it finds the flows itself. Once its model is built."""
        values: dict[pulp.LpVariable, float] = {}
        for i in self.members:
            span = spans[i]
            assert span is not None, "every member holds something"
            values[self.start[i]] = span.start
            values |= {self.holds[i, k]: k == len(span) for k in self._lengths(i)}
            values |= {self.first[i]: span.start == 0, self.last[i]: span.stop == self.problem.layers}
        edges = set(edges_of(self.problem, spans))
        values |= {switch: edge in edges for edge, switch in self.switch.items()}
        columns = np.array([variable.index for variable in values], dtype=np.int32)
        self.lp.solverModel.setSolution(len(columns), columns, np.array([float(value) for value in values.values()]))

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

    def _linked(self, index: int, links_kept: int | None) -> list[int]:
        """The peers that its edges lead to, in order."""
        links = self.problem.link_tokens_per_s[index]
        others = sorted((i for i in self.members if i != index), key=lambda i: (-float(links[i]), i))
        return sorted(others[:links_kept])

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
        incoming = pulp.lpSum(flow for (_, target), flow in self.flow.items() if target == index)
        self.lp += incoming == pulp.lpSum(flow for (source, _), flow in self.flow.items() if source == index)
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
        switch = self.switch[edge]
        self.lp += self.start[j] <= self.stop[i] + layers * (1 - switch)
        self.lp += self.stop[i] + 1 <= self.stop[j] + layers * (1 - switch)
        self.lp += self.flow[edge] <= min(1.0, float(self.problem.link_tokens_per_s[edge]) / self.unit) * switch

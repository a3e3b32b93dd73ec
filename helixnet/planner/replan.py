"""Repair of a placement after somebody came, went or changed: few moves, each the best there is, in a moment.

Everybody keeps what they hold. Newcomers get the windows where they help most. Then peers are moved, best move first,
by their windows' shortage (windows.py); several times, for higher and lower goals, because a move that looks best to
one leads nowhere for another. Where links bind, the supply of the whole swarm does not tell: there each group of peers
with wide links between them is repaired by itself, then moves to where the flow is cut are tried one by one. Last,
moves that turn out to gain next to nothing are taken back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from helixnet.core.types import Span
from helixnet.planner.climb import coverage_of
from helixnet.planner.fastflow import paper_max_flow, paper_routing
from helixnet.planner.flow import CapacityModel, edge_count, max_flow
from helixnet.planner.migration import Step, steps
from helixnet.planner.problem import Problem, SpanOrNone, Spans
from helixnet.planner.served import is_large
from helixnet.planner.starts import longest_from
from helixnet.planner.windows import Windows

WORK, WORK_PER_PEER = 24_000_000, 100_000
"""Work of a repair unless told otherwise, at least and in large swarms; a unit is about 30 nanoseconds, an array cell
filled."""
EDGE_COST = {CapacityModel.PAPER: 20, CapacityModel.EXACT: 270}
"""Work of an edge in a flow that is looked at."""
MOVED_MAX = 0.05
"""Share of the spans that a repair moves at most, unless told otherwise."""
GOALS = (0.5, 1.0, 0.3, 1.2, 0.7)
"""Supply that every layer should have: from the least (0) to the mean (1) of what the layers have."""
GOALS_LARGE = GOALS[:2]
"""In large swarms there is time for fewer."""
TURNS = 3
"""Moves tried for one goal, as a multiple of the spans that may move: spans already moved may move on."""
BINDING = 0.98
"""With less than this share of what supply would allow, it is links that bind."""
TRIED_AT_ONCE = 24
"""Moves to where the flow is cut whose flow is looked at before the best of them is made."""
GAP_MIN = 2.0
"""So many times as wide as the widest narrow link is the narrowest wide one, where links fall into the two."""
GAIN_MIN = 0.0005
"""A move that gains a smaller share of the flow does not pay."""
EXACT_PEERS_MAX = 40
"""In larger swarms the exact model only judges what was found with the paper's: its flows take too long."""
HELD_MIN = 0.5
"""Share of the peers with room that must hold something for a repair to be a start."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What came of it."""

    spans: Spans
    tokens_per_s: float
    unmoved_tokens_per_s: float
    """If those that hold something kept it, as far as it fits, and newcomers held nothing."""
    placed: tuple[int, ...]
    """Peers that held nothing and hold something now."""
    moved: tuple[int, ...]
    """Peers that held something and hold something else now, or nothing."""
    order: tuple[Step, ...] | None
    """Leaves no layer uncovered that is covered now; None if there is no such order."""
    work: int


def repair(
    problem: Problem,
    held: Spans,
    rng: random.Random,
    work_max: int | None = None,
    model: CapacityModel = CapacityModel.PAPER,
    moves_max: int | None = None,
    target: float = math.inf,
) -> Repair:
    """`held`, with newcomers placed and few spans moved, so that it carries more in today's `problem`.

    Besides spans that no longer fit, at most `moves_max` move (by default 5 % of those held, at least one); none once
    the flow is `target` tokens/s. The flow is never less than that of `held`, as far as that fits.
    """
    work = max(WORK, WORK_PER_PEER * len(held)) if work_max is None else work_max
    return _Repairing(problem, held, rng, work, model, target).run(moves_max)


def repaired_start(problem: Problem) -> Spans | None:
    """What the peers hold, repaired: a start for a search. None if too few hold anything, or nothing would flow."""
    roomy = sum(any(peer.layers_max) for peer in problem.peers)
    held = tuple(peer.held for peer in problem.peers)
    if sum(span is not None for span in held) < HELD_MIN * roomy:
        return None
    repaired = repair(problem, held, random.Random(0))
    return repaired.spans if repaired.tokens_per_s > 0 else None


def link_groups(problem: Problem) -> list[frozenset[int]]:
    """Peers with wide links between them, as in one region; none if links do not fall into wide and narrow.

    Wide and narrow are told apart at the largest gap between the bandwidths of two pairs, in their narrower directions.
    """
    count = len(problem.peers)
    links = np.minimum(problem.link_tokens_per_s, problem.link_tokens_per_s.T)
    widths = np.unique(links[np.triu_indices(count, 1)])
    widths = widths[widths > 0]
    if len(widths) < 2:
        return []
    gaps = widths[1:] / widths[:-1]
    widest = int(gaps.argmax())
    if gaps[widest] < GAP_MIN:
        return []
    number, labels = connected_components(csr_array(links >= widths[widest + 1]), directed=False)
    if not 1 < number <= count / 2:
        return []
    return [frozenset(np.flatnonzero(labels == group).tolist()) for group in range(number)]


class _Repairing:
    def __init__(
        self,
        problem: Problem,
        held: Spans,
        rng: random.Random,
        work_max: int,
        model: CapacityModel,
        target: float,
    ) -> None:
        self.problem, self.rng, self.work_max, self.target = problem, rng, work_max, target
        exact = model is CapacityModel.EXACT
        self.model = model
        self.searched = CapacityModel.PAPER if exact and len(held) > EXACT_PEERS_MAX else model
        """The model that tells one candidate from another."""
        self.held = held
        self.kept = tuple(
            span if span is not None and problem.fits(index, span.start, span.stop) else None
            for index, span in enumerate(held)
        )
        self.work = 0
        self.groups = link_groups(problem)
        self._windows = Windows(problem, self.kept)
        self._known: dict[Spans, float] = {}

    def run(self, moves_max: int | None) -> Repair:
        """All of it."""
        count = sum(span is not None for span in self.kept)
        most = max(1, int(MOVED_MAX * count)) if moves_max is None else moves_max
        placed = self._placed()
        best = self._moved_within(placed, most) if most and not self._enough(placed) else placed
        if most and not self._enough(best) and self._binding(best):
            best = self._rerouted(best, most)
        best = max(placed, self._in_order(self._pruned(best)), key=self._flow)
        if self.model is not self.searched and self._judged(best) < self._judged(placed):
            best = placed
        return Repair(
            spans=best,
            tokens_per_s=self._judged(best),
            unmoved_tokens_per_s=self._judged(self.kept),
            placed=tuple(i for i, span in enumerate(best) if span is not None and self.held[i] is None),
            moved=tuple(i for i, span in enumerate(best) if span != self.held[i] is not None),
            order=steps(self.problem, self.held, best),
            work=self.work,
        )

    def _placed(self) -> Spans:
        """What is kept, and each newcomer where its group or the swarm needs it most, the strongest first."""
        spans, peers = self.kept, self.problem.peers
        new = [i for i, span in enumerate(spans) if span is None and any(peers[i].layers_max)]
        every = frozenset(range(len(spans)))
        views = {among: self._windows.holding(_only(spans, among)) for among in (*self.groups, every)}
        for index in sorted(new, key=lambda i: (-max(peers[i].capacity[1 : max(peers[i].layers_max) + 1]), i)):
            ways: dict[Spans, None] = {}
            for among, windows in views.items():
                if index in among:
                    # A goal above the mean: every layer is in want, the thinnest most.
                    goal = float(windows.supply.mean() + windows.rates[index, 0])
                    found = windows.best(np.array([index]), goal)
                    self.work += windows.cells
                    ways[_with(spans, index, found[1] if found is not None else None)] = None
            spans = max(ways, key=self._flow) if len(ways) > 1 else next(iter(ways))
            for among, windows in views.items():
                if index in among:
                    windows.put(index, spans[index])
        return spans

    def _moved_within(self, spans: Spans, most: int) -> Spans:
        """The best of what moves by supply lead to: in one group after the other, the least even first, or in all."""
        best = spans
        for group in sorted(self.groups, key=lambda group: self._evenness(spans, group)):
            best = self._best_filled(best, most, best, group)
        if self.groups and self._binding(best):
            return best
        return self._best_filled(spans, most, best, range(len(spans)))

    def _best_filled(self, spans: Spans, most: int, best: Spans, among: Collection[int]) -> Spans:
        """`best` or what moves of these peers lead to from `spans`."""
        for share in GOALS_LARGE if is_large(self.problem) else GOALS:
            if self._enough(best):
                break
            best = max(best, self._filled(spans, most, share, among), key=self._flow)
        return best

    def _evenness(self, spans: Spans, group: Collection[int]) -> float:
        supply = self._windows.holding(_only(spans, group)).supply
        return float(supply.min() / supply.mean()) if supply.any() else 1.0

    def _filled(self, spans: Spans, most: int, share: float, among: Collection[int]) -> Spans:
        """The best placement on the way of making the best move of these peers for a goal, again and again."""
        windows, best = self._windows.holding(_only(spans, among)), spans
        least = float(windows.supply.min())
        for _ in range(TURNS * most):
            supply = windows.supply
            goal = float(supply.min() + share * (supply.mean() - supply.min()))
            members = np.array([i for i in self._may_move(spans, most) if i in among], dtype=np.intp)
            self.work += windows.cells * len(members)
            found = windows.best(members, goal) if len(members) and self.work < self.work_max else None
            if found is None or found[2] <= GAIN_MIN * float((np.maximum(0.0, goal - supply) ** 2).sum()):
                break
            windows.put(found[0], found[1])
            spans = _with(spans, found[0], found[1])
            if windows.supply.min() > least:
                least = float(windows.supply.min())
                best = max(best, spans, key=self._flow)
                if self._enough(best):
                    break
        return best

    def _rerouted(self, spans: Spans, most: int) -> Spans:
        """Moves to where the flow is cut, the best of some tried at a time, while one pays."""
        while self.work < self.work_max and not self._enough(spans):
            candidates = self._around_the_cut(spans, most)
            better = spans
            for begin in range(0, len(candidates), TRIED_AT_ONCE):
                tried = [_with(spans, *move) for move in candidates[begin : begin + TRIED_AT_ONCE]]
                better = max((each for each in tried if self.work < self.work_max), key=self._flow, default=spans)
                if self._pays(better, spans):
                    break
            if not self._pays(better, spans):
                return spans
            spans = better
        return spans

    def _around_the_cut(self, spans: Spans, most: int) -> list[tuple[int, Span]]:
        """Peers beside, before or behind those at the minimum cut (all if nothing flows), roughly the idlest first."""
        routing = paper_routing(self.problem, spans, limits=True)
        at_cut = {index for edge, _ in routing.limits for index in edge if index >= 0} or range(len(spans))
        wanted = {span for index in at_cut if (span := spans[index]) is not None}
        found: dict[tuple[int, Span], None] = {}
        for index in self._may_move(spans, most):
            for other in sorted(wanted):
                for start in {other.start, other.stop % self.problem.layers}:
                    if length := longest_from(self.problem, index, start):
                        shorter = min(length, len(other))
                        found[index, Span(start, start + length)] = None
                        if self.problem.fits(index, start, start + shorter):
                            found[index, Span(start, start + shorter)] = None
                longest = max(self.problem.peers[index].layers_max)
                for stop in (other.stop, other.start):
                    start = next((s for s in range(max(0, stop - longest), stop) if self._fits(index, s, stop)), stop)
                    if start < stop:
                        found[index, Span(start, stop)] = None
        passed = [0.0] * len(spans)
        for (_, target), rate in routing.edges.items():
            if target >= 0:
                passed[target] += rate

        def busy(index: int) -> float:
            span = spans[index]
            assert span is not None, "only holders move"
            return passed[index] / self.problem.peers[index].tokens_per_s(len(span))

        moves = [(busy(index) + self.rng.random(), index, span) for index, span in found if spans[index] != span]
        return [(index, span) for _, index, span in sorted(moves)]

    def _pruned(self, spans: Spans) -> Spans:
        """Without the moves that gain next to nothing."""
        for index in self._moved(spans):
            back = _with(spans, index, self.kept[index])
            if self._flow(back) >= self._flow(spans) * (1 - GAIN_MIN):
                spans = back
        return spans

    def _in_order(self, spans: Spans) -> Spans:
        """Without the moves that keep the others from having an order, as long as it is still better than nothing."""
        while steps(self.problem, self.held, spans) is None:
            backs = [_with(spans, index, self.kept[index]) for index in self._moved(spans)]
            backs = [back for back in backs if self._pays(back, self.kept)]
            if not backs:
                break
            spans = max(backs, key=self._flow)
        return spans

    def _may_move(self, spans: Spans, most: int) -> list[int]:
        """Who holds something: only newcomers and those that moved already when as many moved as may."""
        moved = self._moved(spans)
        free = len(moved) < most
        holders = [i for i, span in enumerate(spans) if span is not None]
        return [i for i in holders if free or self.kept[i] is None or i in moved]

    def _moved(self, spans: Spans) -> tuple[int, ...]:
        pairs = zip(self.kept, spans, strict=True)
        return tuple(i for i, (have, span) in enumerate(pairs) if have is not None and have != span)

    def _binding(self, spans: Spans) -> bool:
        """Whether links let through less than the peers could carry."""
        return self._flow(spans) < BINDING * coverage_of(self.problem, spans)

    def _enough(self, spans: Spans) -> bool:
        return self._flow(spans) >= self.target

    def _pays(self, spans: Spans, instead_of: Spans) -> bool:
        return self._flow(spans) > self._flow(instead_of) * (1 + GAIN_MIN)

    def _fits(self, index: int, start: int, stop: int) -> bool:
        return self.problem.fits(index, start, stop)

    def _flow(self, spans: Spans) -> float:
        """Tokens/s in the model searched with, remembered."""
        known = self._known.get(spans)
        if known is None:
            self.work += EDGE_COST[self.searched] * edge_count(self.problem, spans)
            if self.searched is CapacityModel.PAPER:
                known = paper_max_flow(self.problem, spans)
            else:
                known = max_flow(self.problem, spans, self.searched).tokens_per_s
            self._known[spans] = known
        return known

    def _judged(self, spans: Spans) -> float:
        """Tokens/s in the model asked for."""
        if self.model is self.searched:
            return self._flow(spans)
        return max_flow(self.problem, spans, self.model).tokens_per_s


def _with(spans: Spans, index: int, span: SpanOrNone) -> Spans:
    return (*spans[:index], span, *spans[index + 1 :])


def _only(spans: Spans, among: Collection[int]) -> Spans:
    return tuple(span if index in among else None for index, span in enumerate(spans))

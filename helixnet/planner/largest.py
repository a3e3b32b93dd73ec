"""The placement with the largest flow in the paper's capacity model: laid first, then, where links bind, polished."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np

from helixnet.planner.bounds import proven_bound
from helixnet.planner.climb import BOUND_MET, SHARE_MIN, Climb
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.lay import Order, kinds_of, lay
from helixnet.planner.polish import Polish
from helixnet.planner.problem import Cancelled, Matrix, Problem, Spans
from helixnet.planner.regions import groups_of, windows
from helixnet.planner.starts import with_everyone

LINKS_BIND = 0.999
"""Links matter where the flow is below this share of the coverage."""
FIRST_SHARE = 0.08
"""Of the work, before it is looked at whether links bind."""
LAY_SHARE, LAYINGS_MIN = 0.3, 8
"""Of the work, for layings where links bind; and how many there are at least."""
AIM, HIGHER, LOWER = 0.9, 1.02, 0.985
"""They aim at this share of the bound at first, at more after a success, at less after a failure ..."""
CAPS = (0.06, 1.0)
"""... with spans that pass at most a share of it between these."""
PRICES, WIDTH, WIDTH_KINDS = 0.1, 20, 600
ROUNDS, HOT, HOT_LAST = 6, 0.03, 0.006
"""Rounds of polishing from different layings, and what they begin with; the last goes on from the best of all."""


@dataclass(frozen=True, slots=True)
class Found:
    """A placement and its flow, tokens/s."""

    spans: Spans
    tokens_per_s: float


def largest_flow(
    problem: Problem, starts: list[Spans], rng: random.Random, work_max: int, cancelled: Cancelled
) -> Found:
    """The best placement found; at least the best of `starts`, of which there is one or more."""
    search = _Search(problem, rng, cancelled)
    for spans in starts:
        search.look(spans)
    search.climb(int(work_max * FIRST_SHARE))
    if not search.links_bind:
        search.climb(work_max)
        return search.best
    search.lay_regions(int(work_max * LAY_SHARE))
    search.polish(work_max)
    return search.best


class _Search:
    def __init__(self, problem: Problem, rng: random.Random, cancelled: Cancelled) -> None:
        self.problem, self.rng, self.cancelled = problem, rng, cancelled
        self.bound = proven_bound(problem)
        self.best = Found((None,) * len(problem.peers), 0.0)
        self.links_bind = False
        self.work = 0
        self._climb = Climb(problem, kinds_of(problem), rng)
        self._laid: list[tuple[float, float, Spans]] = []

    def look(self, spans: Spans) -> float:
        """The flow of a placement, kept if it is the best."""
        flow = paper_max_flow(self.problem, spans)
        if flow > self.best.tokens_per_s or not any(self.best.spans):
            self.best = Found(spans, flow)
        return flow

    def climb(self, work_max: int) -> None:
        """Look for coverage alone until so much work is done in all."""
        self._climb.run(work_max, self._stopped)
        self.work = self._climb.work
        if self._climb.best is not None:
            flow = self.look(self._climb.best.spans)
            self.links_bind = flow < LINKS_BIND * self._climb.best.tokens_per_s

    def lay_regions(self, work_max: int) -> None:
        """Placements that keep groups of peers together, and spans long enough for their links."""
        groups = groups_of(self.problem)
        kinds = kinds_of(self.problem, groups)
        width = max(4, min(WIDTH, WIDTH_KINDS // len(kinds.members)))
        modes = [(max(groups) > 0, capped) for capped in (False, True)]
        aims, tries = dict.fromkeys(modes, self.bound * AIM), 0
        while (self.work < work_max or tries < LAYINGS_MIN) and not self._stopped():
            apart, capped = mode = modes[tries % len(modes)]
            tries += 1
            order = Order(
                aims[mode],
                np.exp([self.rng.gauss(0.0, PRICES) for _ in kinds.members]),
                width,
                SHARE_MIN,
                self.bound * math.exp(self.rng.uniform(*np.log(CAPS))) if capped else math.inf,
                windows(self.problem, kinds, groups, aims[mode], self.rng) if apart else None,
            )
            laid = lay(self.problem, kinds, order, self.rng)
            self.work += laid.work
            whole = laid.reached == self.problem.layers
            if whole:
                spans = with_everyone(self.problem, laid.spans)
                self._laid.append((self.look(spans), aims[mode], spans))
            aims[mode] = min(self.bound, aims[mode] * (HIGHER if whole else LOWER))

    def polish(self, work_max: int) -> None:
        """Rounds from the layings of largest aim and flow, then on from the best."""
        by_aim = sorted(self._laid, key=lambda laid: -laid[1])
        by_flow = sorted(self._laid, key=lambda laid: -laid[0])
        ranked = list(dict.fromkeys(itertools.chain.from_iterable(zip(by_aim, by_flow, strict=True))))
        each = max(1, (work_max - self.work) // (ROUNDS + 1))
        for number in range(ROUNDS + 1):
            if self._stopped():
                return
            last = number >= min(ROUNDS, len(ranked))
            flow, aim, spans = (self.best.tokens_per_s, self.best.tokens_per_s, self.best.spans) if last else ranked[number]
            goal = max(aim, flow, self.best.tokens_per_s * 1.02)
            polish = Polish(self.problem, lambda s: paper_max_flow(self.problem, s), self.bound, self.rng, goal)
            polish.run(spans, HOT_LAST if last else HOT, each, self._stopped)
            self.work += polish.work
            if polish.value > self.best.tokens_per_s:
                self.best = Found(polish.best, polish.value)

    def _stopped(self) -> bool:
        return self.cancelled() or self.best.tokens_per_s >= self.bound * BOUND_MET

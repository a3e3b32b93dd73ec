"""The placement with the largest flow in the paper's capacity model: laid first, then, where links bind, polished."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import numpy as np

from helixnet.planner.bounds import proven_bound
from helixnet.planner.climb import BOUND_MET, SHARE_MIN, Climb
from helixnet.planner.fastflow import paper_max_flow
from helixnet.planner.lay import Kinds, Order, kinds_of, lay
from helixnet.planner.polish import Polish
from helixnet.planner.problem import Cancelled, Problem, SpanOrNone, Spans
from helixnet.planner.regions import groups_of, teams_of, throttled, windows
from helixnet.planner.starts import starts, with_everyone

LINKS_BIND = 0.999
"""Links matter where the flow is below this share of the coverage."""
FIRST_SHARE = 0.08
"""Of the work, before it is looked at whether links bind."""
TEAMS_SHARE = 0.5
"""Of the work, for teams of peers that are swarms of their own, where links bind and there are such teams."""
LAY_SHARE, LAYINGS_MIN = 0.3, 8
"""Of the work left, for layings of all peers where links bind; and how many there are at least."""
AIM, HIGHER, LOWER = 0.9, 1.02, 0.985
"""They aim at this share of the bound at first, at more after a success, at less after a failure."""
AIM_FED, AIM_SPREAD, SCALE_SPREAD = 0.8, 0.06, 0.5
"""Likewise for rates throttled to what links feed: drawn around the aim and throttle of largest flow so far, with
these standard deviations of the logarithm."""
PRICES, WIDTH, WIDTH_KINDS, WIDTH_MIN = 0.1, 20, 600, 4
GOAL = 1.02
"""Polishing wants so many times the best flow."""
ROUNDS, HOT, HOT_LAST = 6, 0.03, 0.002
"""Rounds of polishing from different layings, and what they begin with; the last goes on from the best of all."""
ROAM_PEERS_MAX = 64
"""Larger swarms are only polished from the best: a round takes too long to start over."""


@dataclass(frozen=True, slots=True)
class Found:
    """A placement and its flow, tokens/s."""

    spans: Spans
    tokens_per_s: float
    links_bind: bool = False
    """Links keep it below what its peers could carry."""


def largest_flow(
    problem: Problem, built: list[Spans], rng: random.Random, work_max: int, cancelled: Cancelled
) -> Found:
    """The best placement found; at least the best of `built`, of which there is one or more."""
    search = _Search(problem, rng, cancelled)
    for spans in built:
        search.look(spans)
    search.climb(int(work_max * FIRST_SHARE))
    if not search.links_bind:
        search.climb(work_max)
        return search.best
    search.part(int(work_max * TEAMS_SHARE))
    search.lay_regions(search.work + int((work_max - search.work) * LAY_SHARE))
    search.polish(work_max)
    return replace(search.best, links_bind=True)


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
            self.bound = min(self.bound, self._climb.bound)
            self.links_bind = flow < LINKS_BIND * self._climb.best.tokens_per_s

    def part(self, work_max: int) -> None:
        """Teams of peers near each other, each with the whole model, as swarms of their own."""
        teams = teams_of(self.problem, groups_of(self.problem))
        spans: list[SpanOrNone] = [None] * len(self.problem.peers)
        for team in teams if len(teams) > 1 else ():
            alone = self.problem.only(team)
            found = largest_flow(alone, starts(alone), self.rng, work_max * len(team) // len(spans), self.cancelled)
            for index, span in zip(team, found.spans, strict=True):
                spans[index] = span
        if len(teams) > 1:
            self.work += work_max
            self.look(tuple(spans))

    def lay_regions(self, work_max: int) -> None:
        """Placements that keep groups of peers together; every other one with spans that their links can feed."""
        groups = groups_of(self.problem)
        kinds = kinds_of(self.problem, groups)
        aim, tries, best = self.bound * AIM, 0, (0.0, self.bound * AIM_FED, 1.0)
        while (self.work < work_max or tries < LAYINGS_MIN) and not self._stopped():
            tries += 1
            if tries % 2:
                flow = self._lay(kinds, groups, aim)
                aim = min(self.bound, aim * (HIGHER if flow is not None else LOWER))
                continue
            _, fed_aim, scale = best
            fed_aim = min(self.bound, fed_aim * math.exp(self.rng.gauss(0.0, AIM_SPREAD)))
            scale *= math.exp(self.rng.gauss(0.0, SCALE_SPREAD))
            flow = self._lay(throttled(self.problem, kinds, scale), groups, fed_aim)
            best = max(best, (flow or 0.0, fed_aim, scale))

    def _lay(self, kinds: Kinds, groups: tuple[int, ...], aim: float) -> float | None:
        """The flow of one laying; None if it does not reach the last layer."""
        order = Order(
            flow=aim,
            prices=np.exp([self.rng.gauss(0.0, PRICES) for _ in kinds.members]),
            width=max(WIDTH_MIN, min(WIDTH, WIDTH_KINDS // len(kinds.members))),
            share_min=SHARE_MIN,
            windows=windows(self.problem, kinds, groups, aim, self.rng) if max(groups) > 0 else None,
        )
        laid = lay(self.problem, kinds, order, self.rng)
        self.work += laid.work
        if laid.reached < self.problem.layers:
            return None
        spans = with_everyone(self.problem, laid.spans)
        flow = self.look(spans)
        self._laid.append((flow, aim, spans))
        return flow

    def polish(self, work_max: int) -> None:
        """Rounds from the layings of largest aim and flow by turns, then on from the best."""
        by_aim = sorted(self._laid, key=lambda laid: -laid[1])
        by_flow = sorted(self._laid, key=lambda laid: -laid[0])
        ranked = list(dict.fromkeys(itertools.chain.from_iterable(zip(by_aim, by_flow, strict=True))))
        ranked = ranked[:ROUNDS] if len(self.problem.peers) <= ROAM_PEERS_MAX else []
        each = max(1, (work_max - self.work) // (len(ranked) + 1))
        for flow, aim, spans in ranked:
            self._round(spans, max(aim, flow, self.best.tokens_per_s * GOAL), HOT, each)
        self._round(self.best.spans, self.best.tokens_per_s * GOAL, HOT_LAST, work_max - self.work)

    def _round(self, spans: Spans, goal: float, hot: float, work_max: int) -> None:
        if work_max > 0 and not self._stopped():
            polish = Polish(self.problem, lambda s: paper_max_flow(self.problem, s), self.bound, self.rng, goal)
            polish.run(spans, hot, work_max, self._stopped)
            self.work += polish.work
            if polish.value > self.best.tokens_per_s:
                self.best = Found(polish.best, polish.value)

    def _stopped(self) -> bool:
        return self.cancelled() or self.best.tokens_per_s >= self.bound * BOUND_MET

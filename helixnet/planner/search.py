"""Local search over spans: annealing from the best starts, then descent. Anytime: there is a whole placement from the
first moment, and it only gets better.

Work is counted in columns of the linear programs solved, not in seconds: the same seed gives the same plan on any
machine, and a swarm twice as large gets fewer, dearer looks at its placements.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from helixnet.planner.flow import edge_count
from helixnet.planner.moves import neighbours, random_move
from helixnet.planner.objective import Objective, Scored, score, score_at_most
from helixnet.planner.problem import Cancelled, Problem, Spans

LOOK_COST = 80
"""Work of looking at a placement besides its edges; a unit is about 8 microseconds."""
PASS_COST = 8
"""Work of passing over a placement that cannot be good."""
ANNEAL_SHARE = 0.75
"""Of the work; the rest is for descent."""
ROUNDS = (0.5, 0.5, 0.1, 0.1, 0.02)
"""Losses accepted at the beginning of each round of annealing, in units of the score (0.15 is 15 % of the rate): the
first round roams, the last only tidies up. Each goes on from the best so far."""
COOLING = 0.02
"""What is left of that at the end of the round."""


class Search:
    """One search. `best` is always the best placement looked at so far."""

    def __init__(
        self,
        problem: Problem,
        objective: Objective,
        rng: random.Random,
        work_max: int,
        cancelled: Cancelled | None = None,
    ) -> None:
        self.best: Scored | None = None
        self.work = 0
        self._problem, self._objective, self._rng = problem, objective, rng
        self._work_max, self._cancelled = work_max, cancelled or (lambda: False)
        self._known: dict[Spans, float] = {}

    def run(self, starts: Sequence[Spans]) -> Scored:
        """Search from all of `starts`, at least one, until the work is used up or cancelled."""
        for spans in starts:
            self._look(spans)
        for turn, hot in enumerate(ROUNDS, 1):
            self._anneal(hot, int(self._work_max * ANNEAL_SHARE * turn / len(ROUNDS)))
        assert self.best is not None, "there was a start"
        self._descend(self.best)
        return self.best

    def _stopped(self, work_max: int) -> bool:
        return self.work >= work_max or self._cancelled()

    def _look(self, spans: Spans) -> Scored:
        """The worth of a placement, remembered."""
        known = self._known.get(spans)
        if known is None:
            self.work += LOOK_COST + edge_count(self._problem, spans)
            known = self._known[spans] = score(self._problem, self._objective, spans)
        else:
            self.work += PASS_COST
        scored = Scored(spans, known)
        if self.best is None or scored.score > self.best.score:
            self.best = scored
        return scored

    def _anneal(self, hot: float, work_max: int) -> None:
        assert self.best is not None, "there was a start"
        here, begun = self.best, self.work
        while not self._stopped(work_max):
            heat = hot * COOLING ** ((self.work - begun) / max(1, work_max - begun))
            spans = random_move(self._problem, here.spans, self._rng)
            threshold = here.score + heat * math.log(1.0 - self._rng.random())
            there = self._look_if(spans, threshold)
            if there is not None and there.score >= threshold:
                here = there

    def _look_if(self, spans: Spans | None, threshold: float) -> Scored | None:
        """The worth of `spans`, or None if it is clear without a flow that it is below `threshold`."""
        if spans is None or (
            spans not in self._known and score_at_most(self._problem, self._objective, spans) < threshold
        ):
            self.work += PASS_COST
            return None
        return self._look(spans)

    def _descend(self, start: Scored) -> None:
        """Take improving steps, small ones first, until there is none."""
        here: Scored | None = start
        while here is not None:
            here = self._first_better(here, neighbours(self._problem, here.spans))

    def _first_better(self, here: Scored, candidates: Iterable[Spans]) -> Scored | None:
        for spans in candidates:
            if self._stopped(self._work_max):
                return None
            there = self._look_if(spans, here.score)
            if there is not None and there.score > here.score + 1e-9:
                return there
        return None

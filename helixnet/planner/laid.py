"""Laid placements for objectives beyond flow: of many kinds, the best by the objective itself.

How much flow is aimed at decides how long spans may be: less of it leaves room for fewer hops and more KV. So aims, the
most a span may pass, and whether groups of peers stay together are drawn at random, and what comes of them is scored.
"""

from __future__ import annotations

import math
import random

import numpy as np

from helixnet.planner.bounds import coverage_bound
from helixnet.planner.flow import edge_count
from helixnet.planner.lay import Kinds, Order, kinds_of, lay
from helixnet.planner.objective import Objective, Scored, score
from helixnet.planner.problem import Cancelled, Problem, Spans
from helixnet.planner.regions import groups_of, roomy, windows
from helixnet.planner.starts import with_everyone

AIMS = (0.1, 0.97)
"""Share of the bound aimed at, between these."""
CAPS = (0.03, 1.0)
"""What a span may pass at most, as a share of the bound, between these."""
PRICES = 0.1
"""Standard deviation of the logarithms of the prices."""
WIDTH, WIDTH_KINDS, WIDTH_MIN = 12, 300, 3
SHARE_MIN = 0.5
ROOMY_SHARE, ROOMY_SPREAD = 0.8, 1.0
"""Share of the layings in which layers must have KV room too; standard deviation of the logarithm of how much of it for
each token/s, around what the peers have to offer."""
EDGE_CELLS = 1000
"""Work of a score for each edge of its flow, in cells."""
BEST = 4
"""Placements handed on."""


def laid_starts(
    problem: Problem, objective: Objective, rng: random.Random, work_max: int, cancelled: Cancelled
) -> list[Spans]:
    """The best of those laid until so much work is done, at least one try; may be empty in odd swarms."""
    groups, bound = groups_of(problem), coverage_bound(problem)
    whole, apart = kinds_of(problem), kinds_of(problem, groups)
    found: dict[Spans, Scored] = {}
    work = 0
    while work < work_max and not cancelled():
        together = max(groups) == 0 or rng.random() < 0.5
        kinds = whole if together else apart
        aim = bound * rng.uniform(*AIMS)
        if rng.random() < ROOMY_SHARE:
            kinds = roomy(problem, kinds, math.exp(rng.gauss(0.0, ROOMY_SPREAD)))
        laid = lay(problem, kinds, _order(problem, kinds, None if together else groups, aim, bound, rng), rng)
        work += laid.work
        if laid.reached < problem.layers:
            continue
        spans = with_everyone(problem, laid.spans)
        work += EDGE_CELLS * edge_count(problem, spans)
        if spans not in found:
            found[spans] = Scored(spans, score(problem, objective, spans))
    ranked = sorted(found.values(), key=lambda scored: -scored.score)
    return [scored.spans for scored in ranked[:BEST]]


def _order(
    problem: Problem, kinds: Kinds, groups: tuple[int, ...] | None, aim: float, bound: float, rng: random.Random
) -> Order:
    return Order(
        flow=aim,
        prices=np.exp([rng.gauss(0.0, PRICES) for _ in kinds.members]),
        width=max(WIDTH_MIN, min(WIDTH, WIDTH_KINDS // len(kinds.members))),
        share_min=SHARE_MIN,
        rate_max=bound * math.exp(rng.uniform(*np.log(CAPS))),
        windows=None if groups is None else windows(problem, kinds, groups, aim, rng),
    )

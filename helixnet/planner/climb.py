"""Placements of ever larger flow where links do not bind: laid again and again, for higher and higher aims.

What the kinds of peers should cost is learned on the way: prices are drawn around those that led to the best so far
(a (1+1) evolution strategy). The first laying takes a moment and is within some 15 % of the bound.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from helixnet.planner.bounds import coverage_bound
from helixnet.planner.lay import Counts, Kinds, Order, kinds_of, lay
from helixnet.planner.problem import Cancelled, Matrix, Problem, Spans
from helixnet.planner.starts import with_everyone

FIRST_AIM, LOWER = 0.85, 0.9
"""Share of the bound tried first, and what is left of an aim that failed while there is no placement yet."""
REACH, STEP_MIN = 0.3, 0.001
"""Later aims lie anywhere up to this part of the way from the best to the bound, and at least so much above it."""
SPREADS = (0.05, 0.1, 0.15)
"""Standard deviations of the logarithms of the prices drawn, one of them each time."""
WIDTH, WIDTH_KINDS, WIDTH_MIN = 40, 600, 4
"""States side by side; fewer (WIDTH_KINDS / kinds) where there are many kinds."""
SHARE_MIN = 0.7
"""Lengths that carry less than this share of a peer's best are not tried."""
PROOF_WIDTH, PROOF_ABOVE = 2000, 1e-6
PROOF_KINDS_MAX = 4
"""With more kinds of peers a proof would take far more states than that."""
PROOF_TRIES = (4, 64)
"""Layings after which it is tried to prove the best."""
BOUND_MET = 1 - 1e-4
"""Share of the bound at which looking further cannot pay."""


@dataclass(frozen=True, slots=True)
class Covered:
    """A placement and what its thinnest layer is supplied with."""

    spans: Spans
    tokens_per_s: float


def coverage_of(problem: Problem, spans: Spans) -> float:
    """The flow of a placement in the paper's capacity model if no link limited it: the least summed T(k)."""
    supply = np.zeros(problem.layers)
    for peer, span in zip(problem.peers, spans, strict=True):
        if span is not None:
            supply[span.start : span.stop] += peer.tokens_per_s(len(span))
    return float(supply.min())


def prove(problem: Problem, value: float, width: int = PROOF_WIDTH) -> bool:
    """Whether no placement covers every layer with more than `value` tokens/s, in the paper's capacity model.

    Tried out to the end, one part in a million above `value`; False if that takes more states side by side.
    """
    kinds = kinds_of(problem)
    order = Order(value * (1 + PROOF_ABOVE), np.ones(len(kinds.members)), width, share_min=0.0)
    laid = lay(problem, kinds, order, random.Random(0))
    return laid.exhaustive and laid.reached < problem.layers


class Climb:
    """One climb. `best` is None until a placement covers every layer; then it only gets better.

    `bound` is the coverage bound, and falls to the best's value once that is proven.
    """

    def __init__(self, problem: Problem, kinds: Kinds, rng: random.Random, windows: Counts | None = None) -> None:
        self.best: Covered | None = None
        self.work = 0
        self.bound = coverage_bound(problem)
        self._problem, self._kinds, self._rng, self._windows = problem, kinds, rng, windows
        self._width = max(WIDTH_MIN, min(WIDTH, WIDTH_KINDS // len(kinds.members)))
        self._centre: Matrix = np.zeros(len(kinds.members))
        self._tries = 0
        self._first_aim = self.bound * FIRST_AIM

    @property
    def value(self) -> float:
        """Tokens/s of the best so far."""
        return self.best.tokens_per_s if self.best is not None else 0.0

    def run(self, work_max: int, cancelled: Cancelled) -> Covered | None:
        """Lay until the work is used up, the bound is met, or cancelled."""
        while self.work < work_max and self.value < self.bound * BOUND_MET and not cancelled():
            self.step()
            worth_a_proof = self._tries in PROOF_TRIES and len(self._kinds.members) <= PROOF_KINDS_MAX
            if worth_a_proof and prove(self._problem, self.value):
                self.bound = self.value
        return self.best

    def step(self) -> bool:
        """One laying; whether it led to a better placement."""
        prices = self._prices()
        order = Order(self._aim(), np.exp(prices), self._width, SHARE_MIN, windows=self._windows)
        laid = lay(self._problem, self._kinds, order, self._rng)
        self.work += laid.work
        self._tries += 1
        if laid.reached < self._problem.layers:
            self._first_aim *= LOWER
            return False
        spans = with_everyone(self._problem, laid.spans)
        value = coverage_of(self._problem, spans)
        if value <= self.value:
            return False
        self.best, self._centre = Covered(spans, value), prices - prices.mean()
        return True

    def _aim(self) -> float:
        if self.best is None:
            return self._first_aim
        return max(self.value * (1 + STEP_MIN), self.value + (self.bound - self.value) * REACH * self._rng.random())

    def _prices(self) -> Matrix:
        """Logarithms of prices: none at first, then drawn between no preference and what led to the best."""
        if self.work == 0:
            return np.zeros_like(self._centre)
        spread = self._rng.choice(SPREADS)
        drawn = np.array([self._rng.gauss(0.0, spread) for _ in self._centre])
        prices: Matrix = self._centre * self._rng.random() + drawn
        return prices

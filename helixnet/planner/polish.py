"""Placements made better where links bind: annealing over spans on what links let through.

A peer passes no more than its T(k), than all links from peers that may hand tokens to it, and than all links to peers
that may take them. The supply of a layer, counted so, is at least the flow through it, costs no flow to know, and
changes little with one span: many changes are looked at in one go with arrays. Layers with less than the goal pay for
what they lack; the next placement is drawn from all those looked at by what they pay (heat-bath sampling). The max flow
itself is computed only for placements that promise more than the best.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.problem import Cancelled, Matrix, Problem, Spans

Ints = NDArray[np.int64]
LOOKS = 32
"""Changes looked at in one step."""
LINEAR = 0.2
"""A layer that lacks the share x of the goal pays x * x + LINEAR * x."""
COLD = 0.05
"""What is left of the temperature at the end of a round."""
SHIFTS = 0.08
"""Share of the steps that shift everyone behind a layer by one."""
SHARE_MIN = 0.5
"""Lengths that carry less than this share of a peer's best are not drawn."""
GOAL_STEP = 1.03
"""The next goal over the best, once a goal is reached."""
BOUND_MET = 1 - 1e-4
CELL, STEP_CELLS, FLOW_CELLS = 3, 30_000, 30_000
"""Work of one cell of these arrays, in cells of a laying: both take about 40 ns then."""


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """Placements side by side: spans as start and stop of each peer, [looks, peers]; absent peers have 0 and 0."""

    start: Ints
    stop: Ints
    taken: Matrix
    """Tokens/s that links bring to each peer, at most; [looks, peers]."""
    given: Matrix
    """And take away."""

    def one(self, index: int) -> _Look:
        """One of them, as a row of its own."""
        row = slice(index, index + 1)
        return _Look(self.start[row], self.stop[row], self.taken[row], self.given[row])


class Polish:
    """One search. `best` and `value` are the best placement and its flow in the paper's capacity model."""

    def __init__(
        self, problem: Problem, flow: Callable[[Spans], float], bound: float, rng: random.Random, goal: float
    ) -> None:
        self.problem, self.bound, self.goal, self.work = problem, bound, min(goal, bound), 0
        self.best: Spans = ()
        self.value = 0.0
        self._flow = flow
        self._rng = np.random.default_rng(rng.getrandbits(63))
        self._members = np.array([i for i, peer in enumerate(problem.peers) if any(peer.layers_max)])
        longest = max(max(peer.layers_max) for peer in problem.peers)
        self._rates = np.zeros((len(problem.peers), longest + 1))
        for i in self._members:
            for k in range(1, max(problem.peers[i].layers_max) + 1):
                self._rates[i, k] = problem.peers[i].tokens_per_s(k)
        self._rooms = np.array([peer.layers_max for peer in problem.peers])
        self._links = np.minimum(problem.link_tokens_per_s, bound * 2)
        useful = np.minimum(self._rates, bound) * np.arange(longest + 1)
        good = (useful >= SHARE_MIN * useful.max(axis=1, keepdims=True)) & (self._rates > 0)
        self._lengths = [np.flatnonzero(row) for row in good]
        self._length_count = np.array([len(row) for row in self._lengths])
        width = max(1, int(self._length_count.max()))
        self._length_table = np.array([np.resize(row, width) if len(row) else np.ones(width) for row in self._lengths])
        self._length_table = self._length_table.astype(np.int64)

    def run(self, spans: Spans, hot: float, work_max: int, cancelled: Cancelled) -> None:
        """One round from `spans`: accepted losses fall from `hot`. Ends at the bound, too."""
        here = self._whole(spans)
        cost, supply = self._costs(here)
        paid = float(cost[0])
        self._remember(here, float(supply[0]))
        begun, most = self.work, self.work + work_max
        while self.work < most and self.value < self.bound * BOUND_MET and not cancelled():
            heat = hot * COLD ** ((self.work - begun) / work_max)
            looks = self._shifted(here) if self._rng.random() < SHIFTS else self._changed(here)
            cost, supply = self._costs(looks)
            chances = np.exp((min(paid, float(cost.min())) - np.append(cost, paid)) / heat)
            drawn = int(np.searchsorted(np.cumsum(chances), self._rng.random() * chances.sum()))
            if drawn < len(cost):
                here, paid = looks.one(drawn), float(cost[drawn])
                self._remember(here, float(supply[drawn]))
                if paid <= 0 and self.goal < self.bound:
                    self.goal = min(self.bound, max(self.goal, self.value) * GOAL_STEP)
                    paid = float(self._costs(here)[0][0])

    def _remember(self, look: _Look, supply: float) -> None:
        if supply <= self.value:
            return
        spans = tuple(
            Span(int(start), int(stop)) if stop > start else None
            for start, stop in zip(look.start[0], look.stop[0], strict=True)
        )
        flow = self._flow(spans)
        self.work += FLOW_CELLS + CELL * len(spans) ** 2
        if flow > self.value:
            self.best, self.value = spans, flow

    def _whole(self, spans: Spans) -> _Look:
        start = np.array([[span.start if span is not None else 0 for span in spans]])
        stop = np.array([[span.stop if span is not None else 0 for span in spans]])
        return self._linked(start, stop)

    def _linked(self, start: Ints, stop: Ints) -> _Look:
        """One placement with its links added up from the beginning."""
        joins = (start[0][None, :] <= stop[0][:, None]) & (stop[0][:, None] < stop[0][None, :])
        let = joins * self._links
        self.work += CELL * let.size
        return _Look(start, stop, let.sum(axis=0)[None], let.sum(axis=1)[None])

    def _costs(self, look: _Look) -> tuple[Matrix, Matrix]:
        """What each placement pays, infinite where a span does not fit, and the supply of its thinnest layer."""
        layers, (rows, peers) = self.problem.layers, look.start.shape
        self.work += CELL * rows * peers
        length = look.stop - look.start
        own = self._rates[np.arange(peers), np.minimum(length, self._rates.shape[1] - 1)]
        first, last = look.start == 0, look.stop == layers
        passed = np.minimum(own, np.where(first, np.inf, look.taken))
        passed = np.where(length > 0, np.minimum(passed, np.where(last, np.inf, look.given)), 0.0)
        base = np.arange(rows)[:, None] * (layers + 1)
        size = rows * (layers + 1)
        steps = np.bincount((base + look.start).ravel(), passed.ravel(), size)
        steps -= np.bincount((base + look.stop).ravel(), passed.ravel(), size)
        supply = np.cumsum(steps.reshape(rows, layers + 1), axis=1)[:, :layers]
        lack = np.maximum(0.0, 1.0 - supply / self.goal)
        lack[lack < 1e-9] = 0.0
        cost = (lack * lack + LINEAR * lack).sum(axis=1)
        fits = (length <= self._rooms[np.arange(peers), first + 2 * last]) | (length == 0)
        return np.where(fits.all(axis=1), cost, np.inf), supply.min(axis=1)

    def _changed(self, here: _Look) -> _Look:
        """Placements with one span changed, or two."""
        mover, other, starts, stops = self._draw(here)
        rows = np.arange(LOOKS)
        start, stop = np.repeat(here.start, LOOKS, axis=0), np.repeat(here.stop, LOOKS, axis=0)
        for peer, column in ((other, 1), (mover, 0)):
            start[rows, peer], stop[rows, peer] = starts[:, column], stops[:, column]
        taken, given = np.repeat(here.taken, LOOKS, axis=0), np.repeat(here.given, LOOKS, axis=0)
        for peer, counts in ((mover, 1.0), (other, (other != mover)[:, None] * 1.0)):
            outward, inward = self._links[peer], self._links[:, peer].T
            for ends, sign in (((start, stop), 1.0), ((here.start, here.stop), -1.0)):
                begins, ended = np.broadcast_to(ends[0], start.shape), np.broadcast_to(ends[1], stop.shape)
                own_start, own_stop = begins[rows, peer][:, None], ended[rows, peer][:, None]
                hands = (here.start <= own_stop) & (own_stop < here.stop)
                takes = (own_start <= here.stop) & (here.stop < own_stop)
                taken += sign * counts * hands * outward
                given += sign * counts * takes * inward
        for peer in (mover, other):  # their own sums from the beginning: both ends of their links may have moved
            own_start, own_stop = start[rows, peer][:, None], stop[rows, peer][:, None]
            taken[rows, peer] = (((own_start <= stop) & (stop < own_stop)) * self._links[:, peer].T).sum(axis=1)
            given[rows, peer] = (((start <= own_stop) & (own_stop < stop)) * self._links[peer]).sum(axis=1)
        self.work += STEP_CELLS + CELL * 8 * start.size
        return _Look(start, stop, taken, given)

    def _shifted(self, here: _Look) -> _Look:
        """Everyone behind some layer, one layer on or back; at the model's end spans are pushed back."""
        cut, step = self._rng.integers(1, max(2, self.problem.layers)), 1 if self._rng.random() < 0.5 else -1
        moves = here.start >= cut
        start, stop = here.start + step * moves, here.stop + step * moves
        over = np.maximum(0, stop - self.problem.layers)
        return self._linked(start - over, stop - over)

    def _draw(self, here: _Look) -> tuple[Ints, Ints, Ints, Ints]:
        """Who moves (twice the same if one does), and to where: starts and stops, [looks, 2]."""
        rng, layers = self._rng, self.problem.layers
        mover, other = rng.choice(self._members, LOOKS), rng.choice(self._members, LOOKS)
        start, stop = here.start[0], here.stop[0]
        length = self._drawn_length(mover)
        kept = np.maximum(1, stop[mover] - start[mover])
        kind = rng.random(LOOKS)
        slid = start[mover] + rng.integers(-4, 5, LOOKS)
        stretched = np.where(rng.random(LOOKS) < 0.5, start[mover], stop[mover] - length)
        side = rng.integers(0, 4, LOOKS)
        beside = np.where(side % 2 == 0, start[other], stop[other]) - np.where(side < 2, 0, length)
        anywhere = rng.integers(0, layers, LOOKS)
        choices = (slid, stretched, beside, anywhere)
        begin = np.select([kind < 0.3, kind < 0.55, kind < 0.7, kind < 0.75], choices, start[other])
        length = np.where(kind < 0.3, kept, length)
        swaps = kind >= 0.75
        theirs = np.where(rng.random(LOOKS) < 0.5, self._drawn_length(other), kept)
        length = np.where(swaps & (rng.random(LOOKS) < 0.5), np.maximum(1, stop[other] - start[other]), length)
        theirs_begin = np.where(swaps, start[mover], 0)
        partner = np.where(swaps, other, mover)
        begin = np.clip(begin, 0, np.maximum(0, layers - length))
        theirs_begin = np.clip(theirs_begin, 0, np.maximum(0, layers - theirs))
        same = partner == mover
        theirs_begin, theirs = np.where(same, begin, theirs_begin), np.where(same, length, theirs)
        starts = np.stack([begin, theirs_begin], axis=1)
        stops = np.minimum(starts + np.stack([length, theirs], axis=1), layers)
        return mover, partner, starts, stops

    def _drawn_length(self, peers: Ints) -> Ints:
        column = self._rng.integers(0, np.maximum(1, self._length_count[peers]))
        drawn: Ints = self._length_table[peers, column]
        return drawn

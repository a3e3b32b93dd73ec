"""How much every window of every peer would help the thinnest layers: all at once, as arrays.

The worth of a placement is here its shortage: the sum over the layers of max(0, goal - supply)^2, where the supply of a
layer is the summed T(k) of its holders. Squares make a move that raises the thinnest layers better than one that raises
others by as much. Moving a peer changes the shortage only in its windows, so sliding sums give it for all of them.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.problem import Matrix, Problem, SpanOrNone, Spans

Mask = NDArray[np.bool_]


class Windows:
    """The windows of a problem's peers, and a placement of them. Arrays are indexed [peer, length - 1, start]."""

    def __init__(self, problem: Problem, spans: Spans) -> None:
        self.layers = problem.layers
        longest = max(1, *(max(peer.layers_max) for peer in problem.peers))
        lengths, starts = np.arange(1, longest + 1)[:, None], np.arange(self.layers)[None]
        self.rates = np.array([[peer.tokens_per_s(k) for k in range(1, longest + 1)] for peer in problem.peers])
        rooms = np.array([peer.layers_max for peer in problem.peers])
        ends = (starts == 0) + 2 * (starts + lengths == self.layers)
        self._allowed: Mask = (lengths <= rooms[:, ends]) & (starts + lengths <= self.layers)
        self._stops = np.minimum(starts + lengths, self.layers)
        self._take(spans)

    def holding(self, spans: Spans) -> Windows:
        """The same windows with another placement."""
        other = copy.copy(self)
        other._take(spans)
        return other

    @property
    def cells(self) -> int:
        """Array cells that the windows of one peer take."""
        return int(self._stops.size)

    @property
    def supply(self) -> Matrix:
        """Tokens/s that each layer is supplied with."""
        total: Matrix = self.own.sum(axis=0)
        return total

    def put(self, index: int, span: SpanOrNone) -> None:
        """Give a peer another span, or none."""
        self.own[index], self._held[index] = 0.0, False
        if span is not None:
            self.own[index, span.start : span.stop] = self.rates[index, len(span) - 1]
            self._held[index, span.start : span.stop] = True

    def best(self, members: NDArray[np.intp], goal: float) -> tuple[int, Span, float] | None:
        """Which of these peers should hold which window, and how much less the shortage would be then.

        Only windows that hold whatever nobody else holds of the peer's span. None if there is no such window.
        """
        supply = self.supply
        base = supply - self.own[members]
        want = goal - base
        short = np.maximum(0.0, want) ** 2
        saved = np.full((len(members), *self._stops.shape), -np.inf)
        sums = np.zeros((len(members), self.layers + 1))
        for length in range(1, min(self.layers, saved.shape[1]) + 1):
            rest = np.maximum(0.0, want - self.rates[members, length - 1, None])
            np.cumsum(short - rest * rest, axis=1, out=sums[:, 1:])
            saved[:, length - 1, : self.layers - length + 1] = sums[:, length:] - sums[:, :-length]
        saved[~self._usable(members)] = -np.inf
        now = float((np.maximum(0.0, goal - supply) ** 2).sum())
        saved += now - short.sum(axis=1)[:, None, None]
        member, row, start = np.unravel_index(int(saved.argmax()), saved.shape)
        gain = float(saved[member, row, start])
        if not np.isfinite(gain):
            return None
        return int(members[member]), Span(int(start), int(start + row + 1)), gain

    def _take(self, spans: Spans) -> None:
        self.own = np.zeros((len(spans), self.layers))
        """What each peer supplies each layer with, tokens/s."""
        self._held = np.zeros((len(spans), self.layers), dtype=bool)
        for index, span in enumerate(spans):
            if span is not None:
                self.put(index, span)

    def _usable(self, members: NDArray[np.intp]) -> Mask:
        """Windows that fit and leave nothing uncovered that is covered now."""
        allowed = self._allowed[members]
        alone = self._held[members] & (self._held.sum(axis=0) == 1)
        for row in np.flatnonzero(alone.any(axis=1)).tolist():
            layers = np.flatnonzero(alone[row])
            allowed[row] &= (np.arange(self.layers) <= layers[0]) & (self._stops > layers[-1])
        return allowed

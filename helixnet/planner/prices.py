"""What flow is worth at each peer, guessed before a large program is solved: then most of its work is done.

Prices are the dual values of the exact model's program (flow.py). With prices near the right ones almost every edge is
known to be full or empty. They come from the last program of the same problem, whose spans were nearly the same, or
else from a coarse one in which peers with equal spans are one, with their capacities and links added up.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.problem import Matrix, Problem, Spans

COARSE_MAX = 0.6
"""With more different spans than this share of the peers, a coarse program is no quicker."""
CHANGED_MAX = 0.1
"""Prices of a placement with a larger share of other spans are worse than a coarse program's."""
LINK_MAX = 1e12
"""Tokens/s that stand for a link without limits."""
_LAST: WeakKeyDictionary[Problem, tuple[Spans, Matrix]] = WeakKeyDictionary()


def remember(problem: Problem, spans: Spans, prices: Matrix) -> None:
    """Keep the prices of a program just solved for the next one of this very problem."""
    _LAST[problem] = (spans, prices)


def known_prices(problem: Problem, spans: Spans) -> Matrix | None:
    """Those of the last program: of a token behind each peer, then of a token-layer of each peer's work.

    Peers whose span has changed get what others with the same stop have, and nothing for their work. None if too many
    have.
    """
    if problem not in _LAST:
        return None
    before, prices = _LAST[problem]
    count = len(spans)
    if sum(had != span for had, span in zip(before, spans, strict=True)) > CHANGED_MAX * count:
        return None
    behind, work = prices[:count].copy(), prices[count:].copy()
    stops = np.array([span.stop if span is not None else 0 for span in before])
    total = np.bincount(stops, behind, problem.layers + 1)
    mean = total / np.maximum(1, np.bincount(stops, minlength=problem.layers + 1))
    for index, (had, span) in enumerate(zip(before, spans, strict=True)):
        if had != span:
            behind[index], work[index] = mean[span.stop] if span is not None else 0.0, 0.0
    return np.concatenate([behind, work])


def coarse(problem: Problem, spans: Spans) -> tuple[Problem, Spans, NDArray[np.intp]] | None:
    """The problem with one peer for each different span, and whose place each peer has in it; -1 without a span.

    None if that would hardly be smaller. A coarse peer's capacity is the same whatever it holds.
    """
    held = np.array([index for index, span in enumerate(spans) if span is not None], dtype=np.intp)
    kinds = sorted({span for span in spans if span is not None})
    if len(kinds) > COARSE_MAX * len(held):
        return None
    place = {span: number for number, span in enumerate(kinds)}
    places = np.array([-1 if span is None else place[span] for span in spans], dtype=np.intp)
    links = np.minimum(_summed(problem.link_tokens_per_s, held, places[held]), LINK_MAX)
    wide = np.minimum(problem.link_tokens_per_s, LINK_MAX)
    seconds = _summed(wide * problem.link_s, held, places[held]) / np.maximum(_summed(wide, held, places[held]), 1e-12)
    capacities = np.zeros(len(kinds))
    for index in held.tolist():
        span = spans[index]
        assert span is not None, "chosen so"
        capacities[places[index]] += problem.peers[index].capacity[len(span)]
    first = {int(places[index]): problem.peers[index] for index in reversed(held.tolist())}
    peers = [
        replace(first[number], capacity=(float(capacity),) * (problem.layers + 1))
        for number, capacity in enumerate(capacities)
    ]
    whole = replace(problem, peers=tuple(peers), link_tokens_per_s=links, link_s=seconds, prompt_link_s=seconds)
    return whole, tuple(Span(span.start, span.stop) for span in kinds), places


def spread_out(prices: Matrix, places: NDArray[np.intp]) -> Matrix:
    """The prices of a coarse program for each peer of the whole one."""
    half = len(prices) // 2
    return np.concatenate([np.where(places < 0, 0.0, part[places]) for part in (prices[:half], prices[half:])])


def _summed(matrix: Matrix, held: NDArray[np.intp], places: NDArray[np.intp]) -> Matrix:
    """Entries added up by the places of their peers, [source, target]."""
    order = np.argsort(places, kind="stable")
    begins = np.searchsorted(places[order], np.arange(int(places.max()) + 1))
    rows = np.add.reduceat(matrix[np.ix_(held[order], held[order])], begins, axis=0)
    total: Matrix = np.add.reduceat(rows, begins, axis=1)
    return total

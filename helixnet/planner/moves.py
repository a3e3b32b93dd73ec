"""Steps from one placement to another: what local search tries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from helixnet.core.types import Span
from helixnet.planner.problem import Problem, SpanOrNone, Spans
from helixnet.planner.starts import chain, with_everyone

STEP_GROWTH = 0.5
"""Chance that a step is one layer longer, again and again: most steps are small, some cross the model."""
DEALT_MAX = 12
"""Larger swarms are not dealt anew: it costs as much as hundreds of steps there, and they have many ways round."""
Move = Callable[[Problem, Spans, random.Random], Spans | None]


def random_move(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """A placement near `spans` that memory allows, or None if the step drawn leads nowhere."""
    move = rng.choices(MOVES, WEIGHTS)[0]
    moved = move(problem, spans, rng)
    return moved if moved != spans else None


def neighbours(problem: Problem, spans: Spans) -> Iterator[Spans]:
    """All placements one small step away: each end of each span, each span whole, each seam, by one layer."""
    for index, span in enumerate(spans):
        if span is None:
            continue
        for low, high in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1)):
            moved = _with(problem, spans, {index: (span.start + low, span.stop + high)})
            if moved is not None:
                yield moved
    for seam in _seams(problem, spans):
        for step in (-1, 1):
            moved = _seam_to(problem, spans, seam, seam + step)
            if moved is not None:
                yield moved


def _slide(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    index, span = _draw(spans, rng)
    step = _step(problem, rng)
    return _with(problem, spans, {index: (span.start + step, span.stop + step)})


def _stretch(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    index, span = _draw(spans, rng)
    low, high = rng.choice(((1, 0), (0, 1)))
    step = _step(problem, rng)
    return _with(
        problem, spans, {index: (max(0, span.start + low * step), min(problem.layers, span.stop + high * step))}
    )


def _move_seam(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """Everyone who stops at a layer and everyone who starts there, together: keeps what is covered covered."""
    seams = _seams(problem, spans)
    if not seams:
        return None
    seam = rng.choice(seams)
    return _seam_to(problem, spans, seam, seam + _step(problem, rng))


def _swap(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    if len(spans) < 2:
        return None
    (i, a), (j, b) = _draw(spans, rng), _draw(spans, rng)
    if i == j:
        return None
    return _with(problem, spans, {i: _cut(problem, i, b), j: _cut(problem, j, a)})


def _align(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """Stop where another does (the way to a parallel stage), as long as memory allows or as it does."""
    index, span = _draw(spans, rng)
    _, other = _draw(spans, rng)
    longest = problem.room(index, False, other.stop == problem.layers)
    length = rng.choice((longest, len(span), len(other)))
    return _with(problem, spans, {index: _cut(problem, index, Span(max(0, other.stop - max(1, length)), other.stop))})


def _follow(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """Begin where another stops."""
    index, span = _draw(spans, rng)
    _, other = _draw(spans, rng)
    start = other.stop % problem.layers
    longest = problem.room(index, start == 0, False)
    length = max(1, rng.choice((longest, len(span))))
    stop = min(problem.layers, start + length)
    return _with(problem, spans, {index: (start, stop)}) or _with(problem, spans, {index: (start, stop - 1)})


def _elsewhere(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """Any span at all."""
    index, _ = _draw(spans, rng)
    start = rng.randrange(problem.layers)
    return _with(problem, spans, {index: _cut(problem, index, Span(start, rng.randint(start + 1, problem.layers)))})


def _deal_anew(problem: Problem, spans: Spans, rng: random.Random) -> Spans | None:
    """A chain of some peers in any order, the rest where they help: leaves valleys that no small step leaves.

    The peers hold as many layers as suits their speed or, every other time, any number.
    """
    members = [index for index, span in enumerate(spans) if span is not None]
    if len(members) > DEALT_MAX:
        return None
    rng.shuffle(members)
    order = members[: rng.randint(1, min(len(members), problem.layers))]
    dealt = chain(problem, order) if rng.random() < 0.5 else _cut_anywhere(problem, len(spans), order, rng)
    return with_everyone(problem, dealt) if dealt is not None else None


def _cut_anywhere(problem: Problem, count: int, order: list[int], rng: random.Random) -> Spans | None:
    seams = [0, *sorted(rng.sample(range(1, problem.layers), len(order) - 1)), problem.layers]
    ends = dict(zip(order, itertools.pairwise(seams), strict=True))
    return _with(problem, (None,) * count, ends)


MOVES: tuple[Move, ...] = (_slide, _stretch, _move_seam, _swap, _align, _follow, _elsewhere, _deal_anew)
WEIGHTS = (3, 4, 4, 1, 1, 1, 1, 1)


def _seams(problem: Problem, spans: Spans) -> list[int]:
    """The layers inside the model at which some span stops, in order."""
    return sorted({span.stop for span in spans if span is not None and span.stop < problem.layers})


def _seam_to(problem: Problem, spans: Spans, seam: int, to: int) -> Spans | None:
    changed: dict[int, tuple[int, int]] = {}
    for index, span in enumerate(spans):
        if span is not None and span.stop == seam:
            changed[index] = (span.start, to)
        elif span is not None and span.start == seam:
            changed[index] = (to, span.stop)
    return _with(problem, spans, changed)


def _with(problem: Problem, spans: Spans, changed: dict[int, tuple[int, int]]) -> Spans | None:
    """`spans` with some of them changed; None if one of those does not fit."""
    if not all(problem.fits(index, *ends) for index, ends in changed.items()):
        return None
    placed: list[SpanOrNone] = list(spans)
    for index, (start, stop) in changed.items():
        placed[index] = Span(start, stop)
    return tuple(placed)


def _cut(problem: Problem, index: int, span: Span) -> tuple[int, int]:
    """`span`, begun later where peer `index` has not room for all of it."""
    start, stop = span.start, span.stop
    while start < stop - 1 and not problem.fits(index, start, stop):
        start += 1
    return start, stop


def _draw(spans: Spans, rng: random.Random) -> tuple[int, Span]:
    """A peer that holds something. There always is one: a search starts from whole placements."""
    held = [(index, span) for index, span in enumerate(spans) if span is not None]
    return held[rng.randrange(len(held))]


def _step(problem: Problem, rng: random.Random) -> int:
    length = 1
    while length < problem.layers // 2 and rng.random() < STEP_GROWTH:
        length += 1
    return length if rng.random() < 0.5 else -length

"""Placements built in one go: every search starts from these, so there is a whole one early."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.flow import Indices
from helixnet.planner.problem import Problem, SpanOrNone, Spans, best_ends

Rooms = tuple[int, int, int, int]
"""The most layers that a peer can hold, as in PlanPeer.layers_max."""

CHAINS_MAX = 8
"""Parallel chains that are tried as a start; search makes more where they pay."""


def starts(problem: Problem) -> list[Spans]:
    """Constructed placements that cover every layer, and last what the peers hold now (which may not).

    The problem must have room for every layer (`require_room`).
    """
    ends = best_ends(problem)
    assert ends is not None, "the caller made sure that there is room"
    everyone = [i for i in range(len(problem.peers)) if any(problem.peers[i].layers_max)]
    total = sum(problem.room(i, False, False) for i in everyone)
    built = [one_chain(problem, everyone, ends)]
    for count in range(2, min(CHAINS_MAX, total // problem.layers) + 1):
        built.append(parallel_chains(problem, everyone, count))
    built.append(tuple(_still_fits(problem, i) for i in range(len(problem.peers))))
    unique = {spans: None for spans in built if spans is not None}
    return [with_everyone(problem, spans) for spans in unique]


def one_chain(problem: Problem, members: Sequence[int], ends: tuple[int, int] | None = None) -> Spans | None:
    """The members one after the other, each with layers in proportion to its speed as far as it has room.

    At most as many members as layers are used, those with most room. None if they cannot hold the model.
    """
    if ends is None:
        found = best_ends(_only(problem, members))
        if found is None:
            return None
        ends = members[found[0]], members[found[1]]
    first, last = ends
    if first == last:
        return chain(problem, [first])
    others = sorted((i for i in members if i not in ends), key=lambda i: (-problem.room(i, False, False), i))
    others = [i for i in others if problem.room(i, False, False)][: max(0, problem.layers - 2)]
    return chain(problem, [first, *_nearest_next(problem, first, others), last])


def chain(problem: Problem, order: Sequence[int], *, even: bool = False) -> Spans | None:
    """Spans one after the other in this order, water-filled; None if these peers have not room for the model.

    `even` takes all for equally fast.
    """
    rooms = [problem.room(i, n == 0, n == len(order) - 1) for n, i in enumerate(order)]
    speeds = [1.0 if even else problem.peers[i].capacity[1] for i in order]
    lengths = water_filling(speeds, rooms, problem.layers)
    if lengths is None:
        return None
    spans: list[SpanOrNone] = [None] * len(problem.peers)
    reached = 0
    for index, length in zip(order, lengths, strict=True):
        spans[index] = Span(reached, reached + length)
        reached += length
    return tuple(spans)


def parallel_chains(problem: Problem, members: Sequence[int], count: int) -> Spans | None:
    """`count` chains side by side over members dealt out evenly; None if one of them cannot hold the model."""
    dealt: list[tuple[int, int, list[int]]] = [(0, chain, []) for chain in range(count)]
    heapq.heapify(dealt)
    for index in sorted(members, key=lambda i: (-problem.room(i, False, False), i)):
        room, chain, dealt_to = heapq.heappop(dealt)
        heapq.heappush(dealt, (room + problem.room(index, False, False), chain, [*dealt_to, index]))
    spans: list[SpanOrNone] = [None] * len(problem.peers)
    for _, _, chain_members in sorted(dealt):
        chain_spans = one_chain(problem, sorted(chain_members)) if chain_members else None
        if chain_spans is None:
            return None
        for index in chain_members:
            spans[index] = chain_spans[index]
    return tuple(spans)


def water_filling(speeds: Sequence[float], rooms: Sequence[int], layers: int) -> list[int] | None:
    """How many layers each takes so that the slowest is as fast as can be; at least 1 each, at most `rooms`.

    None if the rooms do not add up to `layers`, or some have none.
    """
    if sum(rooms) < layers or min(rooms) < 1 or len(rooms) > layers:
        return None
    lengths = [1] * len(rooms)
    heap = [(2 / speed, n) for n, speed in enumerate(speeds) if rooms[n] > 1]
    heapq.heapify(heap)
    for _ in range(layers - len(rooms)):
        _, n = heapq.heappop(heap)
        lengths[n] += 1
        if lengths[n] < rooms[n]:
            heapq.heappush(heap, ((lengths[n] + 1) / speeds[n], n))
    return lengths


def with_everyone(problem: Problem, spans: Spans) -> Spans:
    """`spans`, where every peer that has room and no span gets one where the swarm is weakest."""
    placed = list(spans)
    supply = np.zeros(problem.layers)
    for index, span in enumerate(placed):
        _add_supply(problem, supply, index, span)
    for index, span in enumerate(placed):
        if span is None:
            placed[index] = weakest_window(problem, supply, index)
            _add_supply(problem, supply, index, placed[index])
    return tuple(placed)


def weakest_window(problem: Problem, supply: NDArray[np.float64], index: int) -> SpanOrNone:
    """The longest span that peer `index` can hold where others supply least; None if it has no room.

    An uncovered layer counts before all speed: nothing flows without it.
    """
    windows = _longest_windows(problem.layers, problem.peers[index].layers_max)
    if not len(windows.starts):
        return None
    there = np.where(windows.inside, supply[windows.layers], 0.0)
    uncovered = windows.lengths - np.count_nonzero(there > 0, axis=0)
    mean = there.sum(axis=0) / windows.lengths
    weakest = int(np.argmin(np.where(uncovered == uncovered.max(), mean, np.inf)))
    start = int(windows.starts[weakest])
    return Span(start, start + int(windows.lengths[weakest]))


@dataclass(frozen=True, slots=True, eq=False)
class _Windows:
    """The longest span from each layer on from which there is one."""

    starts: Indices
    lengths: Indices
    layers: Indices
    """[offset, window]: summed up window by window in the order of layers, whatever the lengths."""
    inside: NDArray[np.bool_]
    """Whether that is a layer of the window."""


@lru_cache(maxsize=1024)
def _longest_windows(layers: int, rooms: Rooms) -> _Windows:
    every = np.array([_longest_within(layers, rooms, start) for start in range(layers)], dtype=np.intp)
    starts = np.flatnonzero(every)
    lengths = every[starts]
    offsets = np.arange(lengths.max(initial=0))[:, None]
    return _Windows(starts, lengths, np.minimum(starts + offsets, layers - 1), offsets < lengths)


def longest_from(problem: Problem, index: int, start: int) -> int:
    """The most layers that peer `index` can hold from layer `start` on; 0 if it has no room for one there."""
    return _longest_within(problem.layers, problem.peers[index].layers_max, start)


def _longest_within(layers: int, rooms: Rooms, start: int) -> int:
    length = min(layers - start, rooms[start == 0])
    reaches_end = start + length == layers
    return length - 1 if reaches_end and length > rooms[(start == 0) + 2] else length


def _add_supply(problem: Problem, supply: NDArray[np.float64], index: int, span: SpanOrNone) -> None:
    if span is not None:
        supply[span.start : span.stop] += problem.peers[index].tokens_per_s(len(span))


def _still_fits(problem: Problem, index: int) -> SpanOrNone:
    held = problem.peers[index].held
    return held if held is not None and problem.fits(index, held.start, held.stop) else None


def _nearest_next(problem: Problem, first: int, others: Sequence[int]) -> list[int]:
    """The others in an order in which each is near the one before."""
    order: list[int] = []
    here, left = first, sorted(others)
    while left:
        here = min(left, key=lambda i: (float(problem.link_s[here, i]), i))
        left.remove(here)
        order.append(here)
    return order


def _only(problem: Problem, members: Sequence[int]) -> Problem:
    """The same problem with these peers alone; its matrices still count all."""
    return replace(problem, peers=tuple(problem.peers[i] for i in members))

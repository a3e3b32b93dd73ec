"""How other systems would place layers on the same problem, for comparison: their published rules, our own code.

Every function gives a placement that covers all layers within memory, or None where its rule finds none. Each is
a placement alone: `compare` routes all of them alike, with partial inference and across pipelines, which is more
than some of these systems do. Systems that keep the embedding and the head elsewhere are charged for them here,
like everyone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from helixnet.core.types import Span
from helixnet.planner.problem import Problem, SpanOrNone, Spans
from helixnet.planner.starts import chain, longest_from

JOIN_SEED = 0
"""Of the order in which `petals` lets peers join."""
PIPELINES_MAX = 64
"""Numbers of pipelines that `parallax` tries; swarms that could form more are far larger than we plan for."""


def petals(problem: Problem, order: Sequence[int] | None = None) -> Spans | None:
    """Petals (arXiv 2209.01188, 2312.08361 appendix D): peers join one after another, in any order.

    Each takes as many layers as it has room for, where the windows' layers, from the least served on, have least
    throughput, counting T(k) of everyone who joined before. Nobody moves later: real servers do when that promises
    a good deal more, but Helix's adaptation (arXiv 2406.01566, section 6) leaves it out too. `order` is who joins
    when; by default it is shuffled by one seed, with which every stored placement of that paper comes out the same.
    """
    spans: list[SpanOrNone] = [None] * len(problem.peers)
    supply = [0.0] * problem.layers
    shuffled = list(range(len(spans)))
    random.Random(JOIN_SEED).shuffle(shuffled)
    for index in order if order is not None else shuffled:
        windows = _widest_windows(problem, index)
        if not windows:
            continue
        longest = max(len(window) for window in windows)
        weakness = {
            # A window that is shorter than others, for the embedding or the head, must be weaker to be preferred.
            window: [*sorted(supply[window.start : window.stop]), *[float("inf")] * (longest - len(window))]
            for window in windows
        }
        chosen = min(windows, key=lambda window: (weakness[window], window.start))
        spans[index] = chosen
        for layer in chosen.layers():
            supply[layer] += problem.peers[index].tokens_per_s(len(chosen))
    return tuple(spans) if min(supply) > 0 else None


def swarm(problem: Problem) -> Spans | None:
    """SWARM parallelism (arXiv 2301.11913) as Helix adapts it: equal stages, each served by equally much.

    The model is cut into as few stages as the weakest peer can still hold one of, or more where nobody would have
    room for an end. Peers, fastest first (of equally fast the last first), go to the stage with the least throughput
    so far. Where there are fewer peers than stages, the weakest are left out. Helix fixes the number of stages by
    hand, so that it divides the layers; here stages may differ by a layer.
    """
    rooms = [room for room in _inner_rooms(problem) if room]
    if not rooms:
        return None
    fewest = -(-problem.layers // min(rooms))
    counts = [*range(fewest, min(len(rooms), problem.layers) + 1), *range(fewest - 1, 0, -1)]
    tried = (_staged(problem, count) for count in counts)
    return next((spans for spans in tried if spans is not None), None)


def separate(problem: Problem) -> Spans | None:
    """Helix's "separate pipelines" (arXiv 2406.01566, section 6): machines of a kind serve the model among themselves.

    Kinds that cannot hold the model alone are left out. In a measured swarm every peer is a kind of its own.
    """
    pipelines = separate_pipelines(problem)
    return _merged(problem, pipelines) if pipelines else None


def separate_pipelines(problem: Problem) -> list[Spans]:
    """The pipelines of `separate`, each whole: layers even over its members, as many for each kind as it can fill."""
    kinds: dict[tuple[tuple[float, ...], tuple[int, ...]], list[int]] = {}
    for index, peer in enumerate(problem.peers):
        if any(peer.layers_max):
            kinds.setdefault((peer.capacity, peer.layers_max), []).append(index)
    found: list[Spans] = []
    for (_, rooms), members in kinds.items():
        for count in range(min(len(members), len(members) * rooms[0] // problem.layers), 0, -1):
            bounds = [len(members) * n // count for n in range(count + 1)]
            whole = _all(chain(problem, members[a:b][: problem.layers]) for a, b in pairwise(bounds))
            if whole is not None:
                found += whole
                break
    return found


def uniform(problem: Problem) -> Spans | None:
    """What a plain pipeline does: one pipeline of everyone as they come, in equal shares as far as there is room.

    The first peer with room for the embedding is the entry, the last with room for the head the exit.
    """
    members = [index for index, room in enumerate(_inner_rooms(problem)) if room]
    if problem.layers == 1:
        members = [index for index in members if problem.room(index, True, True)][:1]
    if len(members) <= 1:
        return chain(problem, members) if members else None
    entry = next((index for index in members if problem.room(index, True, False)), None)
    leave = next((index for index in reversed(members) if index != entry and problem.room(index, False, True)), None)
    if entry is None or leave is None:
        return None
    inner = [index for index in members if index not in (entry, leave)]
    return chain(problem, [entry, *inner[: problem.layers - 2], leave], even=True)


def parallax(problem: Problem) -> Spans | None:
    """Parallax (arXiv 2509.26182, phase 1): pipelines that share no peer, layers by compute, links ignored.

    Peers, those with most room first, are dealt to the pipeline with least room; within one, layers go to the
    members in proportion to their speed (water-filling). Of all numbers of pipelines the one with the largest sum
    of slowest members is taken, and the larger of equally good ones; Parallax itself weighs their number against
    the stages of each.
    """
    most = min(PIPELINES_MAX, len(problem.peers), sum(_inner_rooms(problem)) // problem.layers)
    dealt = (_dealt(problem, count) for count in range(1, most + 1))
    found = [pipelines for pipelines in dealt if pipelines is not None]

    def worth(pipelines: list[Spans]) -> tuple[float, int]:
        return round(sum(_slowest(problem, spans) for spans in pipelines), 6), len(pipelines)

    best = max(found, key=worth, default=None)
    return _merged(problem, best) if best is not None else None


BASELINES: dict[str, Callable[[Problem], Spans | None]] = {
    "petals": petals,
    "swarm": swarm,
    "separate": separate,
    "uniform": uniform,
    "parallax": parallax,
}
"""By the names that tables give them."""


def _inner_rooms(problem: Problem) -> list[int]:
    return [problem.room(index, False, False) for index in range(len(problem.peers))]


def _widest_windows(problem: Problem, index: int) -> list[Span]:
    """The spans that peer `index` can hold and not enlarge."""
    windows: list[Span] = []
    for start in range(problem.layers):
        stop = start + longest_from(problem, index, start)
        if stop > max(start, windows[-1].stop if windows else 0):
            windows.append(Span(start, stop))
    return windows


def _staged(problem: Problem, count: int) -> Spans | None:
    """Peers dealt to so many equal stages; None if one is left empty."""
    bounds = [problem.layers * n // count for n in range(count + 1)]
    stages = [Span(a, b) for a, b in pairwise(bounds)]
    longest = max(len(stage) for stage in stages)
    usable = [index for index, room in enumerate(_inner_rooms(problem)) if room >= longest]
    fitting = {i: [n for n, s in enumerate(stages) if problem.fits(i, s.start, s.stop)] for i in usable}
    # Where throughput is equal, a stage that few have room for (the model's ends) comes first.
    scarcity = [sum(n in choices for choices in fitting.values()) for n in range(count)]
    supply = [0.0] * count
    spans: list[SpanOrNone] = [None] * len(problem.peers)
    for index in sorted(usable, key=lambda i: (problem.peers[i].tokens_per_s(longest), i), reverse=True):
        if not fitting[index]:
            continue
        stage = min(fitting[index], key=lambda n: (supply[n], scarcity[n], n))
        spans[index] = stages[stage]
        supply[stage] += problem.peers[index].tokens_per_s(len(stages[stage]))
    return tuple(spans) if min(supply) > 0 else None


def _dealt(problem: Problem, count: int) -> list[Spans] | None:
    """So many pipelines over all peers, most room first; None if one of them cannot hold the model."""
    rooms = _inner_rooms(problem)
    pipelines: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for index in sorted((i for i, room in enumerate(rooms) if room), key=lambda i: (-rooms[i], i)):
        pipeline = min(range(count), key=lambda n: (held[n], n))
        pipelines[pipeline].append(index)
        held[pipeline] += rooms[index]
    return _all(_pipeline(problem, members) for members in pipelines)


def _pipeline(problem: Problem, members: Sequence[int]) -> Spans | None:
    """The members one after the other, most room first but for the ends, layers in proportion to speed.

    The ends are given to those who lose least room by it. A member may hold everything if no such chain does.
    """

    def lost(index: int, first: bool) -> int:
        return problem.room(index, False, False) - problem.room(index, first, not first)

    spans = None
    if len(members) > 1:
        entry = min(members, key=lambda index: lost(index, True))
        leave = min((index for index in members if index != entry), key=lambda index: lost(index, False))
        inner = [index for index in members if index not in (entry, leave)]
        spans = chain(problem, [entry, *inner[: max(0, problem.layers - 2)], leave])
    alone = (chain(problem, [index]) for index in members)
    return spans if spans is not None else next((whole for whole in alone if whole is not None), None)


def _all(pipelines: Iterable[Spans | None]) -> list[Spans] | None:
    """The pipelines, or None as soon as there is one that cannot be."""
    whole: list[Spans] = []
    for spans in pipelines:
        if spans is None:
            return None
        whole.append(spans)
    return whole


def _slowest(problem: Problem, spans: Spans) -> float:
    held = [(index, span) for index, span in enumerate(spans) if span is not None]
    return min(problem.peers[index].tokens_per_s(len(span)) for index, span in held)


def _merged(problem: Problem, pipelines: Iterable[Spans]) -> Spans:
    spans: list[SpanOrNone] = [None] * len(problem.peers)
    for pipeline in pipelines:
        for index, span in enumerate(pipeline):
            spans[index] = span if span is not None else spans[index]
    return tuple(spans)

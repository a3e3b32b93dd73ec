"""Proven upper bounds on the flow of any placement, valid in both capacity models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helixnet.planner.problem import PlanPeer, Problem

BISECTIONS = 60
ROUNDING = 1e-9
"""Where all peers just fit, both sides are equal but for rounding, and the bound must not fall below what is held."""
LINK_PEERS_MAX = 100
"""Beyond this the link-aware program, with a column for each pair of peers, takes more than seconds where links are
narrow: 4 s with 100 peers, two minutes with 250."""
Floats = NDArray[np.float64]


def proven_bound(problem: Problem) -> float:
    """Tokens/s that no placement can exceed in either capacity model, links included; 0 if nothing can be held."""
    return min(coverage_bound(problem), link_bound(problem))


def coverage_bound(problem: Problem) -> float:
    """Tokens/s that no placement can exceed, whatever the links; 0 if nothing can be held.

    For a flow F each layer is run F times a second. A peer that holds k layers contributes at most F to each
    of them, and at most its capacity to all together (in the paper's model: at most T(k) to each), so the
    largest F with sum_i max_k min(capacity_i(k), k F) >= layers * F bounds both capacity models.
    """
    members = [index for index, peer in enumerate(problem.peers) if any(peer.layers_max)]
    return _covered(problem, members, [np.inf] * len(members))


def link_bound(problem: Problem) -> float:
    """Tokens/s that no placement can exceed, from compute and links together; at most the coverage bound.

    Up to LINK_PEERS_MAX peers a linear program over the flows between all of them (linkbound.py); beyond, the coverage
    bound where no peer passes more than all its links together let through.
    """
    members = [index for index, peer in enumerate(problem.peers) if any(peer.layers_max)]
    bound = _covered(problem, members, _through(problem, members))
    if bound <= 0 or len(members) > LINK_PEERS_MAX:
        return bound
    from helixnet.planner.linkbound import program_bound

    return max(0.0, program_bound(problem, members, bound))


def envelope(peer: PlanPeer, most: float) -> list[tuple[float, float]]:
    """(slope, intercept) of lines that lie above what a peer runs when it passes x <= `most` tokens/s, in any span.

    With k layers it runs at most k x token-layers/s, and at most its capacity: the concave hull of the points
    (T(k), k T(k)), level beyond the highest. (In the paper's model it falls there; in the exact model a peer may pass
    more than T(k) tokens that run few layers each.)
    """
    points = [(0.0, 0.0)]
    for k in range(1, max(peer.layers_max) + 1):
        rate = min(peer.tokens_per_s(k), most)
        points.append((rate, k * rate))
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and hull[-1][0] == x:
            hull.pop()  # sorted: this one is higher
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    lines = [(0.0, max(y for _, y in hull))]
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if y1 > y0:
            slope = (y1 - y0) / (x1 - x0)
            lines.append((slope, y0 - slope * x0))
    return lines


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def _covered(problem: Problem, members: Sequence[int], through: Sequence[float]) -> float:
    """The largest F with sum_i max_k min(capacity_i(k), k min(through_i, F)) >= layers * F, from above."""
    if sum(max(problem.peers[index].layers_max) for index in members) < problem.layers:
        return 0.0
    options = []
    for index, most in zip(members, through, strict=True):
        peer = problem.peers[index]
        options.append([(k, min(peer.capacity[k], k * most)) for k in range(1, max(peer.layers_max) + 1)])

    def carried(flow: float) -> float:
        return sum(max(min(capacity, k * flow) for k, capacity in choices) for choices in options)

    low, high = 0.0, sum(max(capacity for _, capacity in choices) for choices in options) / problem.layers
    if carried(high) >= problem.layers * high * (1 - ROUNDING):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if carried(middle) >= problem.layers * middle * (1 - ROUNDING):
            low = middle
        else:
            high = middle
    return high


def _through(problem: Problem, members: Sequence[int]) -> list[float]:
    """Tokens/s that the links of each peer let through it, clients' included.

    A request that enters at a peer without room for all layers must leave it over a link, and one that leaves the
    swarm there came over a link.
    """
    links = problem.link_tokens_per_s[np.ix_(members, members)].copy()
    np.fill_diagonal(links, 0.0)
    through = []
    for index, inward, outward in zip(members, links.sum(axis=0).tolist(), links.sum(axis=1).tolist(), strict=True):
        if problem.room(index, True, True):
            through.append(np.inf)
            continue
        first, last = problem.room(index, True, False) > 0, problem.room(index, False, True) > 0
        passed = inward + outward if first and last else outward if first else inward if last else min(inward, outward)
        through.append(float(passed))
    return through

"""Proven upper bounds on the flow of any placement."""

from __future__ import annotations

from helixnet.planner.problem import Problem

BISECTIONS = 60
ROUNDING = 1e-9
"""Where all peers just fit, both sides are equal but for rounding, and the bound must not fall below what is held."""


def coverage_bound(problem: Problem) -> float:
    """Tokens/s that no placement can exceed, whatever the links; 0 if nothing can be held.

    For a flow F each layer is run F times a second. A peer that holds k layers contributes at most F to each
    of them, and at most its capacity to all together (in the paper's model: at most T(k) to each), so the
    largest F with sum_i max_k min(capacity_i(k), k F) >= layers * F bounds both capacity models.
    """
    peers = [peer for peer in problem.peers if any(peer.layers_max)]
    options = [[(k, peer.capacity[k]) for k in range(1, max(peer.layers_max) + 1)] for peer in peers]
    if not options:
        return 0.0

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

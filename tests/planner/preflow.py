"""The paper's max flow with networkx, edge by edge: slow, the reference that `fastflow` is tested against."""

from __future__ import annotations

from fractions import Fraction

import networkx as nx
from networkx.algorithms.flow import preflow_push

from helixnet.planner.problem import Problem, Spans

SOURCE, SINK = ("source", -1), ("sink", -1)
Node = tuple[str, int]


def reference_flow(problem: Problem, spans: Spans) -> float:
    """The max flow when a peer that holds k layers passes T(k) tokens/s, however many layers they run there.

    Each peer is split in two, with its capacity between the halves (arXiv 2406.01566, section 4.3). Capacities are
    fractions: where sums are rounded, networkx sometimes finds excess that is not there, and fails.
    """
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    held = [(index, span) for index, span in enumerate(spans) if span is not None]
    for i, span in held:
        graph.add_edge(("in", i), ("out", i), capacity=Fraction(problem.peers[i].tokens_per_s(len(span))))
        if span.start == 0:
            graph.add_edge(SOURCE, ("in", i))  # clients do not limit; no capacity is no limit
        if span.stop == problem.layers:
            graph.add_edge(("out", i), SINK)
        for j, other in held:
            if other.start <= span.stop < other.stop:
                graph.add_edge(("out", i), ("in", j), capacity=Fraction(float(problem.link_tokens_per_s[i, j])))
    return float(preflow_push(graph, SOURCE, SINK).graph["flow_value"])

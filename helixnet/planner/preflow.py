"""The paper's max flow with networkx: the reference, and the final flows under the paper's capacity model."""

from __future__ import annotations

import networkx as nx
from networkx.algorithms.flow import preflow_push

from helixnet.planner.flow import NOTHING, OUTSIDE, Edge, Routing, edges_of, routing
from helixnet.planner.problem import Problem, Spans

SOURCE, SINK = ("source", -1), ("sink", -1)
Node = tuple[str, int]


def paper_flow(problem: Problem, spans: Spans) -> Routing:
    """The max flow when a peer that holds k layers passes T(k) tokens/s, however many layers they run there.

    Each peer is split in two, with its capacity between the halves (arXiv 2406.01566, section 4.3).
    """
    edges = edges_of(problem, spans)
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    for index, span in enumerate(spans):
        if span is not None:
            graph.add_edge(("in", index), ("out", index), capacity=problem.peers[index].tokens_per_s(len(span)))
    for edge in edges:
        tail, head = _ends(edge)
        if OUTSIDE in edge:
            graph.add_edge(tail, head)  # clients do not limit; no capacity is no limit
        else:
            graph.add_edge(tail, head, capacity=float(problem.link_tokens_per_s[edge]))
    residual = preflow_push(graph, SOURCE, SINK)
    total = residual.graph["flow_value"]
    if total <= 0:
        return NOTHING
    flows = {edge: max(0.0, float(residual[_ends(edge)[0]][_ends(edge)[1]]["flow"])) for edge in edges}
    return routing(problem, spans, flows, _cut(problem, spans, graph))


def _ends(edge: Edge) -> tuple[Node, Node]:
    source, target = edge
    return (
        SOURCE if source == OUTSIDE else ("out", source),
        SINK if target == OUTSIDE else ("in", target),
    )


def _cut(problem: Problem, spans: Spans, graph: nx.DiGraph[Node]) -> tuple[tuple[Edge, float], ...]:
    """The minimum cut: which peers and links together bound the flow, with their shares of it."""
    value, (reached, _) = nx.minimum_cut(graph, SOURCE, SINK)
    shares: list[tuple[Edge, float]] = []
    for tail, head, data in graph.edges(data=True):
        if tail in reached and head not in reached:
            shares.append(((tail[1], head[1]), data["capacity"] / value))
    return tuple(sorted(shares, key=lambda pair: (-pair[1], pair[0])))

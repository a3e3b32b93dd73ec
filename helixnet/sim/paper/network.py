"""Links of the paper's system: one transmission at a time, first come first served, then the latency.

The authors' machines also share their network cards: a flow-planned link gets the share of the card that its flow has
of all flow there, the others an equal share of the sender's. A receiving card that is full does not delay here: that
would take ten senders at once at the cards' 10 GB/s.
"""

from __future__ import annotations

from collections.abc import Mapping

from helixnet.planner.flow import Edge
from helixnet.sim.paper.instance import Instance
from helixnet.sim.paper.sessions import Session

SHARE_MIN = 0.05
"""An edge with a smaller share of the flow out of its tail is not routed along (authors' scheduler_core)."""


class Link:
    """What an edge's transmissions queue for."""

    __slots__ = ("bytes_per_s", "free_s", "latency_s", "token_bytes", "tokens")

    def __init__(self, bytes_per_s: float, latency_s: float, token_bytes: float) -> None:
        self.bytes_per_s, self.latency_s, self.token_bytes = bytes_per_s, latency_s, token_bytes
        self.free_s = 0.0
        self.tokens = 0
        """Sent so far."""

    def send(self, session: Session, now: float) -> float:
        """Queue what a session's iteration carries; returns when it arrives."""
        tokens = 1 if session.in_decode else session.input
        begins = self.free_s if self.free_s > now else now
        session.sent_s = begins
        self.free_s = begins + tokens * self.token_bytes / self.bytes_per_s
        self.tokens += tokens
        return self.free_s + self.latency_s


def links_of(instance: Instance, flows: Mapping[Edge, float], by_flow: bool) -> dict[Edge, Link]:
    """A link for every edge; `by_flow`: network cards are shared as the flow is, else equally by a sender's edges."""
    out: dict[int, list[Edge]] = {}
    into: dict[int, list[Edge]] = {}
    for edge in flows:
        out.setdefault(edge[0], []).append(edge)
        into.setdefault(edge[1], []).append(edge)
    used = {edge: flow * instance.bytes_per_token(edge) for edge, flow in flows.items()}

    def share(edge: Edge, among: list[Edge]) -> float:
        total = sum(used[other] for other in among)
        return used[edge] / total if total > 0 else 0.0

    links = {}
    for edge in flows:
        rate, latency_s = instance.link(edge)
        sender, receiver = instance.cards_out[edge[0]], instance.cards_in[edge[1]]
        if by_flow and used[edge] > 0:
            rate = min(rate, sender * share(edge, out[edge[0]]), receiver * share(edge, into[edge[1]]))
        elif not by_flow:
            rate = min(rate, sender / len(out[edge[0]]), receiver)
        links[edge] = Link(rate, latency_s, instance.bytes_per_token(edge))
    return links

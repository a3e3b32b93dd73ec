"""A plan: who holds which span, and how many tokens/s should flow over each edge."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from helixnet.core.types import PeerId, Span

PEERS_MAX = 4096


class PlanNumber(NamedTuple):
    """Plans are totally ordered by (term, epoch); a smaller number never replaces a larger."""

    term: int
    epoch: int


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """One peer's span."""

    peer: PeerId
    span: Span


class Flow(msgspec.Struct, frozen=True, array_like=True):
    """Tokens/s that should go from one peer to the next; None stands for the clients (before entry, after exit)."""

    source: PeerId | None
    target: PeerId | None
    tokens_per_s: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner expects of a plan."""

    tokens_per_s: float
    """Swarm-wide decode tokens/s at saturation."""
    bound_tokens_per_s: float
    """A proven upper bound on the max flow, in the same unit as the flow."""
    ttft_s: float
    tpot_s: float
    bottleneck: str = ""
    """The peer or link that limits the flow, in words."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's answer, not yet numbered. Assignments sorted by peer, flows by (source, target)."""

    assignments: tuple[Assignment, ...]
    flows: tuple[Flow, ...]
    prediction: Prediction


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A numbered placement, as broadcast."""

    term: int
    epoch: int
    coordinator: PeerId
    manifest_hash: str
    layers: int
    placement: Placement
    whole: bool = True
    """False where it was cut to what one peer needs to follow it."""

    @property
    def number(self) -> PlanNumber:
        return PlanNumber(self.term, self.epoch)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the encoded plan, as named in the DHT pointer."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()

    def part_of(self, peer: PeerId) -> Plan:
        """What `peer` needs to follow the plan: its own span, and the number."""
        mine = tuple(a for a in self.placement.assignments if a.peer == peer)
        return msgspec.structs.replace(
            self, whole=False, placement=msgspec.structs.replace(self.placement, assignments=mine, flows=())
        )

    def span_of(self, peer: PeerId) -> Span | None:
        """The span assigned to `peer`, or None if it has none."""
        return next((a.span for a in self.placement.assignments if a.peer == peer), None)


def uncovered(spans: list[Span], layers: int) -> list[Span]:
    """The gaps of `[0, layers)` that no span covers, in order."""
    gaps: list[Span] = []
    reached = 0
    for span in sorted(spans):
        if span.start > reached:
            gaps.append(Span(reached, span.start))
        reached = max(reached, span.stop)
    if reached < layers:
        gaps.append(Span(reached, layers))
    return gaps

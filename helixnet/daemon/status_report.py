"""A swarm's view as the rows that `helixnet status` shows: typed, and the same as JSON.

The JSON (`helixnet status --json`) is part of the public interface. `version` counts incompatible changes.
"""

from __future__ import annotations

import msgspec

from helixnet.core.plan.plan import Plan
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import MemberView, View
from helixnet.daemon.wording import printable

VERSION = 1
CLIENTS = "clients"


class PeerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One member. Rates are of one layer, as measured; null before that."""

    id: str
    name: str
    state: str
    """joining, active, suspect, draining or dead."""
    coordinator: bool
    held: list[tuple[int, int]]
    """Half-open spans of layers that it can run now."""
    planned: tuple[int, int] | None
    """The span that the plan gives it."""
    device: str | None
    memory_bytes: int | None
    matmul_flops: float | None
    memory_bandwidth: float | None
    """Bytes/s."""
    decode_tokens_per_s: float | None
    """One at a time."""
    decode_batch_tokens_per_s: float | None
    """At the largest batch that was measured."""
    prefill_tokens_per_s: float | None
    tokens_per_s: float
    """Observed lately, prompts included."""
    sessions: int
    kv_free: float
    """Share of its KV pages, 0 to 1."""
    uptime_s: float


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measured link."""

    source: str
    target: str
    round_trip_s: float
    bandwidth: float
    """Bytes/s; 0 while only the round trip is known."""


class FlowRow(msgspec.Struct, frozen=True, kw_only=True):
    """One edge of the plan, or one that carries tokens although it is not in the plan."""

    source: str
    """A peer id, or `clients`."""
    target: str
    planned_tokens_per_s: float
    observed_tokens_per_s: float | None
    """What the target saw lately; null towards clients, which report nothing."""


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that is followed."""

    term: int
    epoch: int
    active: bool
    coordinator: str
    predicted_tokens_per_s: float
    observed_tokens_per_s: float
    """Tokens/s that clients brought lately, prompts included."""
    flow_tokens_per_s: float
    """Max flow of the placement."""
    bound_tokens_per_s: float
    """No placement of these peers can carry more flow."""
    share_of_bound: float | None
    predicted_ttft_s: float
    predicted_tpot_s: float
    bottleneck: str


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `helixnet status` knows."""

    version: int
    network: str
    model: str
    manifest_hash: str
    layers: int
    context_tokens: int
    term: int
    coordinator: str | None
    serving: bool
    """Whether a plan is active."""
    problem: str
    """Why not, in words; may also name what keeps the next plan back."""
    plan: PlanRow | None
    peers: list[PeerRow]
    links: list[LinkRow]
    flows: list[FlowRow]


def report(view: View, network: str) -> StatusReport:
    """The rows of `view`, in the order of layers (peers, flows) and of ids (links)."""
    records = {row.record.peer: row.record for row in view.members}
    peers = sorted((_peer_row(row, view) for row in view.members), key=_by_layers)
    order = {row.id: index for index, row in enumerate(peers)}
    links = [
        LinkRow(source=peer, target=link.target, round_trip_s=link.round_trip_s, bandwidth=link.bandwidth)
        for peer, record in sorted(records.items(), key=lambda item: order[item[0]])
        for link in sorted(record.links, key=lambda measure: order.get(measure.target, len(order)))
        if link.target in records
    ]
    return StatusReport(
        version=VERSION,
        network=network,
        model=printable(view.model),
        manifest_hash=view.manifest_hash,
        layers=view.layers,
        context_tokens=view.context_tokens,
        term=view.term,
        coordinator=view.coordinator,
        serving=view.plan is not None and view.active,
        problem=printable(view.problem),
        plan=_plan_row(view.plan, view.active, records) if view.plan else None,
        peers=peers,
        links=links,
        flows=_flow_rows(view.plan, records, order),
    )


def _by_layers(row: PeerRow) -> tuple[int, int, str]:
    start, stop = row.planned or next(iter(row.held), (1 << 20, 0))
    return start, stop, row.id


def _peer_row(row: MemberView, view: View) -> PeerRow:
    record, capability = row.record, row.record.capability
    planned = view.plan.span_of(record.peer) if view.plan else None
    batch = capability.decode[-1] if capability else None
    return PeerRow(
        id=record.peer,
        name=printable(record.name),
        state=row.state,
        coordinator=record.peer == view.coordinator,
        held=[(span.start, span.stop) for span in sorted(record.held)],
        planned=(planned.start, planned.stop) if planned else None,
        device=printable(capability.device) if capability else None,
        memory_bytes=capability.memory_bytes if capability else None,
        matmul_flops=capability.matmul_flops if capability else None,
        memory_bandwidth=capability.memory_bandwidth if capability else None,
        decode_tokens_per_s=capability.decode_tokens_per_s(1) if capability else None,
        decode_batch_tokens_per_s=batch.tokens / batch.seconds if batch else None,
        prefill_tokens_per_s=max(p.tokens / p.seconds for p in capability.prefill) if capability else None,
        tokens_per_s=record.tokens_per_s,
        sessions=record.sessions,
        kv_free=record.kv_free,
        uptime_s=record.uptime_s,
    )


def _plan_row(plan: Plan, active: bool, records: dict[PeerId, PeerRecord]) -> PlanRow:
    prediction = plan.placement.prediction
    flow = sum(edge.tokens_per_s for edge in plan.placement.flows if edge.source is None)
    bound = prediction.bound_tokens_per_s
    brought = [
        observed.tokens_per_s
        for _, record in sorted(records.items())
        for observed in record.observed
        if observed.source is None
    ]
    return PlanRow(
        term=plan.term,
        epoch=plan.epoch,
        active=active,
        coordinator=plan.coordinator,
        predicted_tokens_per_s=prediction.tokens_per_s,
        observed_tokens_per_s=sum(brought),
        flow_tokens_per_s=flow,
        bound_tokens_per_s=bound,
        share_of_bound=flow / bound if bound > 0 else None,
        predicted_ttft_s=prediction.ttft_s,
        predicted_tpot_s=prediction.tpot_s,
        bottleneck=printable(prediction.bottleneck),
    )


def _flow_rows(plan: Plan | None, records: dict[PeerId, PeerRecord], order: dict[str, int]) -> list[FlowRow]:
    """Planned edges and observed ones; clients come first as a source, last as a target."""
    planned = {(edge.source, edge.target): edge.tokens_per_s for edge in plan.placement.flows} if plan else {}
    seen: dict[tuple[PeerId | None, PeerId | None], float] = {
        (observed.source, peer): observed.tokens_per_s
        for peer, record in sorted(records.items())
        for observed in record.observed
        if observed.tokens_per_s > 0
    }
    rows = [
        FlowRow(
            source=source or CLIENTS,
            target=target or CLIENTS,
            planned_tokens_per_s=planned.get((source, target), 0.0),
            observed_tokens_per_s=seen.get((source, target), 0.0) if target is not None else None,
        )
        for source, target in {**planned, **seen}
    ]
    last = len(order)
    return sorted(
        rows, key=lambda row: (order.get(row.source, -1), order.get(row.target, last), row.source, row.target)
    )

"""The plan that a simulation ended with, as the picture that `helixnet plan` draws.

The strongly coloured part of a bar is the simulated load of its device.
"""

from __future__ import annotations

from helixnet.core.plan.plan import Flow
from helixnet.core.types import PeerId, Span
from helixnet.daemon.plan_picture import drawing
from helixnet.daemon.plan_report import EdgeLine, PeerLine, PlanReport
from helixnet.planner.cluster_file import CLIENTS
from helixnet.sim.report import LIMITING, Report
from helixnet.sim.simulation import Simulation
from helixnet.sim.world import machine_of

PEERS_MAX = 100
"""Larger swarms make a picture that nobody can read."""


def flow_picture(simulation: Simulation, report: Report, regions: dict[PeerId, str] | None = None) -> str | None:
    """The picture as an SVG file; None where there is no plan or too many peers. `regions` are of machines."""
    plan = simulation.sampler.plan
    if plan is None or len(plan.placement.assignments) > PEERS_MAX:
        return None
    flows = plan.placement.flows
    spans = {assigned.peer: assigned.span for assigned in plan.placement.assignments}
    loads = {use.peer: use.load for use in report.peers}
    told = plan.placement.prediction
    peers = [_peer(peer, span, flows, (simulation, loads, regions)) for peer, span in spans.items()]
    edges = [_edge(flow, spans) for flow in flows]
    shown = PlanReport(
        model=report.model,
        layers=report.layers,
        objective="simulated",
        flow=sum(flow.tokens_per_s for flow in flows if flow.source is None),
        flow_per_token=1.0,
        bound=told.bound_tokens_per_s,
        tokens_per_s=told.tokens_per_s,
        ttft_s=told.ttft_s,
        tpot_s=told.tpot_s,
        bottleneck=told.bottleneck,
        seconds=0.0,
        peers=tuple(sorted(peers, key=lambda line: (line.region, line.span or Span(0, 1), line.name))),
        edges=tuple(sorted(edges, key=lambda line: (line.stop, line.source, line.target))),
        prompt_tokens=0,
        output_tokens=0,
    )
    return drawing(shown)


Looks = tuple[Simulation, dict[PeerId, float], dict[PeerId, str] | None]


def _peer(peer: PeerId, span: Span, flows: tuple[Flow, ...], looks: Looks) -> PeerLine:
    simulation, loads, regions = looks
    machine = machine_of(peer)
    capability = simulation.setup.world.machines[machine]
    share = loads.get(peer, 0.0)
    return PeerLine(
        name=peer,
        region=regions[machine] if regions is not None else machine.rpartition("-")[0] or "machines",
        device=capability.device,
        rates="simulated",
        memory_bytes=capability.memory_bytes,
        span=span,
        tokens_per_s=sum(flow.tokens_per_s for flow in flows if flow.target == peer),
        busy=share,
        limits=share >= LIMITING,
    )


def _edge(flow: Flow, spans: dict[PeerId, Span]) -> EdgeLine:
    return EdgeLine(
        source=flow.source or CLIENTS,
        target=flow.target or CLIENTS,
        tokens_per_s=flow.tokens_per_s,
        stop=spans[flow.source].stop if flow.source is not None else 0,
        share=None,
        limits=False,
    )

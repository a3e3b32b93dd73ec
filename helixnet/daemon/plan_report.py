"""What `helixnet plan` says of a cluster: a placement with the numbers that people and programs ask for."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from helixnet.core.types import Span
from helixnet.daemon.plan_moves import Moves
from helixnet.daemon.wording import percent
from helixnet.planner.case import Case
from helixnet.planner.cluster import CATALOGUE
from helixnet.planner.cluster_file import CLIENTS
from helixnet.planner.flow import OUTSIDE, CapacityModel, Edge, Routing
from helixnet.planner.objective import Objective
from helixnet.planner.predict import forecast, predict
from helixnet.planner.problem import Problem, Spans
from helixnet.planner.served import planned_routing
from helixnet.planner.survival import Survival


class PeerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One peer in the plan."""

    name: str
    region: str
    device: str
    rates: str
    """Where its rates come from: catalogue, given, measured or published."""
    memory_bytes: int
    span: Span | None
    tokens_per_s: float
    """Through this peer."""
    busy: float
    """Share of its compute that the flow takes, 0 to 1."""
    limits: bool
    """Whether the plan could carry more if this peer could."""


class EdgeLine(msgspec.Struct, frozen=True, kw_only=True):
    """Flow from one peer to the next."""

    source: str
    target: str
    tokens_per_s: float
    stop: int
    """The layer at which it changes hands: 0 from the clients, all layers to them."""
    share: float | None
    """Of what the plan may send over this link; None at the clients."""
    limits: bool


class Survives(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of the flow when any one peer leaves and nobody moves."""

    share: float
    asked: float
    without: str
    """The peer whose departure leaves least."""
    estimated: bool
    """By the supply of each layer, links aside: the swarm is too large for a flow per departure."""
    reached: bool
    room: int
    """Layers that the peers have room for together, at most."""
    needed: int
    """Room for two holders of each layer."""

    def missed(self) -> str:
        """What to tell who asked for more than there is."""
        said = (
            f"the plan keeps {percent(self.share)} of its flow if {self.without} leaves, not the {percent(self.asked)} "
            "asked for."
        )
        if self.room < self.needed:
            return (
                f"{said} The peers have room for {self.room} layers, and two holders of each take {self.needed}: "
                "add peers or memory."
            )
        return f"{said} Ask for less, search longer with --seconds, or add peers."


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. Peers by region and first layer, edges by layer."""

    model: str
    layers: int
    objective: str
    flow: float
    flow_per_token: float
    """Tokens of flow for each answered one: more than 1 where prompt tokens count too."""
    bound: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    bottleneck: str
    seconds: float
    """What the planning took."""
    peers: tuple[PeerLine, ...]
    edges: tuple[EdgeLine, ...]
    prompt_tokens: int
    output_tokens: int
    survives: Survives | None = None
    """None unless asked for."""

    @property
    def share_of_bound(self) -> float:
        """Flow as a share of the proven bound."""
        return self.flow / self.bound if self.bound > 0 else 0.0

    @property
    def from_catalogue(self) -> int:
        """How many peers' rates are only those of a data sheet."""
        return sum(peer.rates == CATALOGUE for peer in self.peers)

    def as_json(self) -> dict[str, object]:
        """What `--json` prints."""
        return {
            "model": self.model,
            "layers": self.layers,
            "objective": self.objective,
            "placement": {peer.name: [peer.span.start, peer.span.stop] for peer in self.by_name() if peer.span},
            "edges": [[edge.source, edge.target, edge.tokens_per_s] for edge in self.edges],
            "flow": self.flow,
            "flow_per_token": self.flow_per_token,
            "bound": self.bound,
            "prediction": {
                "tokens_per_s": self.tokens_per_s,
                "ttft_s": self.ttft_s,
                "tpot_s": self.tpot_s,
                "bottleneck": self.bottleneck,
            },
            "rates": {peer.name: peer.rates for peer in self.by_name()},
            "seconds": self.seconds,
        } | ({} if self.survives is None else {"survives": self.survives})

    def by_name(self) -> list[PeerLine]:
        """The peers in the order of their names."""
        return sorted(self.peers, key=lambda peer: peer.name)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What adding and removing peers does."""

    before: PlanReport | None
    """None if there was no plan before."""
    problem: str
    """Why there was none."""
    unmoved_tokens_per_s: float
    """What would be served afterwards if every span stayed where it was."""
    moved_peers: int
    """Of those that stay, how many get another span."""
    migration: Moves
    """What has to be loaded for it, by those who stay and by those who are new."""

    def as_json(self) -> dict[str, object]:
        """What `--json` adds."""
        return {
            "before": self.before.as_json() if self.before is not None else None,
            "problem_before": self.problem,
            "unmoved_tokens_per_s": self.unmoved_tokens_per_s,
            "moved_peers": self.moved_peers,
            "moved_bytes": self.migration.bytes,
            "migration": self.migration.as_json(),
        }


@dataclass(frozen=True, slots=True)
class _Solved:
    """A placement as the planner's own numbers."""

    problem: Problem
    spans: Spans
    routing: Routing
    limits: frozenset[Edge]


def report(case: Case, spans: Spans, objective_name: str, objective: Objective, seconds: float) -> PlanReport:
    """The report of a placement in its case; `seconds` is what finding it took."""
    problem, work = case.problem, case.workload
    routing = planned_routing(problem, spans, objective.model)
    told = predict(problem, spans, routing)
    solved = _Solved(problem, spans, routing, _limits(problem, spans, routing))
    return PlanReport(
        model=problem.model,
        layers=problem.layers,
        objective=objective_name,
        flow=routing.tokens_per_s,
        flow_per_token=problem.flow_per_token,
        bound=told.bound_tokens_per_s,
        tokens_per_s=told.tokens_per_s,
        ttft_s=told.ttft_s,
        tpot_s=told.tpot_s,
        bottleneck=told.bottleneck,
        seconds=seconds,
        peers=_peer_lines(case, solved, objective.model),
        edges=_edge_lines(solved),
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
    )


def with_survival(report: PlanReport, problem: Problem, left: Survival, asked: float) -> PlanReport:
    """The report with what the worst departure leaves."""
    survives = Survives(
        share=left.share,
        asked=asked,
        without=problem.peers[left.peer].peer,
        estimated=left.estimated,
        reached=left.reaches(asked),
        room=sum(max(peer.layers_max) for peer in problem.peers),
        needed=2 * problem.layers,
    )
    return msgspec.structs.replace(report, survives=survives)


def changed(before: PlanReport | None, problem: str, moves: Moves, unmoved: float) -> Change:
    """What the change from one plan to the next costs."""
    moved = sum(move.held is not None for move in moves.moves)
    return Change(before=before, problem=problem, unmoved_tokens_per_s=unmoved, moved_peers=moved, migration=moves)


def _limits(problem: Problem, spans: Spans, routing: Routing) -> frozenset[Edge]:
    outlook = forecast(problem, spans, routing)
    if outlook.kv_limited:
        return frozenset({(outlook.tightest, outlook.tightest)})
    return frozenset(edge for edge, _ in routing.limits)


def _peer_lines(case: Case, solved: _Solved, model: CapacityModel) -> tuple[PeerLine, ...]:
    lines = []
    for index, (peer, machine) in enumerate(zip(solved.problem.peers, case.machines, strict=True)):
        span = solved.spans[index]
        through = sum(rate for (_, target), rate in solved.routing.edges.items() if target == index)
        load = through * len(span) if span and model is CapacityModel.PAPER else solved.routing.loads[index]
        lines.append(
            PeerLine(
                name=peer.peer,
                region=machine.region,
                device=machine.device,
                rates=machine.rates,
                memory_bytes=machine.memory_bytes,
                span=span,
                tokens_per_s=through,
                busy=min(1.0, load / peer.capacity[len(span)]) if span else 0.0,
                limits=(index, index) in solved.limits,
            )
        )
    end = Span(solved.problem.layers - 1, solved.problem.layers)
    return tuple(sorted(lines, key=lambda line: (line.region, line.span is None, line.span or end, line.name)))


def _edge_lines(solved: _Solved) -> tuple[EdgeLine, ...]:
    lines = []
    problem = solved.problem
    for edge, rate in solved.routing.edges.items():
        source, target = edge
        before = None if source == OUTSIDE else solved.spans[source]
        inner = OUTSIDE not in edge
        lines.append(
            EdgeLine(
                source=CLIENTS if source == OUTSIDE else problem.peers[source].peer,
                target=CLIENTS if target == OUTSIDE else problem.peers[target].peer,
                tokens_per_s=rate,
                stop=before.stop if before is not None else 0,
                share=min(1.0, rate / float(problem.link_tokens_per_s[edge])) if inner else None,
                limits=inner and edge in solved.limits,
            )
        )
    return tuple(sorted(lines, key=lambda line: (line.stop, line.source, line.target)))

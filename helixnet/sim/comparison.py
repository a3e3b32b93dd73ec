"""One instance of the paper served in several ways, so that one sees what each part of ours brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import CapacityModel, Edge
from helixnet.planner.objective import THROUGHPUT
from helixnet.planner.problem import LINK_SHARE, PREFILL_CHUNK_TOKENS, PlanPeer, Problem, Spans
from helixnet.planner.served import planned_routing
from helixnet.planner.solve import Budget, place
from helixnet.sim.paper.admission import OFFLINE
from helixnet.sim.paper.feeder import FillKv, Lengths, lengths_of
from helixnet.sim.paper.instance import Instance, flows_of, read_instance
from helixnet.sim.paper.run import Setup, Windows, simulate
from helixnet.sim.side_by_side import Served, Serving, kv_sessions, our_setup, serve
from helixnet.sim.simulation import Load
from helixnet.sim.workload import Recorded

STORED = "helix-milp"
KV_SHARE = 0.75
"""Requests always in flight, as a share of those that KV has room for. The authors fill theirs to 0.8; with more than
this some find no room at first, and that counts as time to the first token."""
CLIENTS = 8
FIRST_GUESS_S = 240.0
"""Of a request's life, to find out how long it really is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds what, and how much should flow where."""

    spans: Spans
    flows: dict[Edge, float]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of serving an instance, and what came of it."""

    title: str
    served: Served


class Comparison:
    """One instance with one model. Windows are `lifetimes` mean lives of a request, after one to warm up."""

    def __init__(self, artifact: Artifact, instance: str, model: str, lifetimes: float, seed: int) -> None:
        self.instance: Instance = read_instance(artifact, instance, model)
        self._artifact, self._name, self._model = artifact, instance, model
        self._lengths: Lengths = lengths_of(artifact.trace())
        self._lifetimes, self._seed = lifetimes, seed

    def stored(self) -> Plan:
        """The authors' own placement, with the flow that they sent through each machine."""
        spans = self._artifact.stored(self._name, self._model)[STORED]
        through = self._artifact.stored_flow(self._name, self._model, STORED)
        return Plan(spans, flows_of(self.instance.problem, spans, through))

    def ours(self, budget: Budget | None = None) -> Plan:
        """Placed for predicted serving in our own way, with slow links planned at a part of what they carry."""
        problem = in_our_mode(self._artifact.problem(self._name, self._model, LINK_SHARE), self._artifact)
        spans = place(problem, self._seed, budget, THROUGHPUT)
        return Plan(spans, planned_routing(problem, spans, CapacityModel.EXACT).edges)

    def in_their_way(self, plan: Plan, whole: bool = False) -> Served:
        """In paper mode, its KV filled as the authors fill it; `whole`: with a max flow instead of the plan's own."""
        flows = flows_of(self.instance.problem, plan.spans) if whole else plan.flows
        setup = Setup(self.instance, plan.spans, flows, "iwrr", FillKv(self._lengths), OFFLINE)

        def run(warm_s: float, seconds: float) -> Served:
            outcome = simulate(replace(setup, windows=Windows(warm_s, seconds)), self._seed)
            return Served(
                decode_tokens_per_s=outcome.decode_tokens_per_s,
                ttft_s=outcome.ttft_s.mean,
                tpot_s=outcome.tpot_s.mean,
                stages=outcome.hops_mean,
                in_flight=round(outcome.in_flight_mean),
                finished=outcome.finished,
                lost=outcome.impossible,
                retries=0,
                seconds=seconds,
                events=outcome.events,
            )

        return self._long_enough(run)

    def in_our_way(self, plan: Plan, serving: Serving | None = None) -> Served:
        """By our protocol on the real machines of the core."""
        tokens = sum(sum(lengths) for lengths in self._lengths) / len(self._lengths)
        in_flight = int(KV_SHARE * kv_sessions(self.instance, plan.spans, tokens))
        if in_flight < 1:
            raise UsageError(f"No layer of {self.instance.name} has KV room for one request in this placement.")
        load = Load(lengths=Recorded(self._lengths), in_flight=in_flight, clients=CLIENTS)

        def run(warm_s: float, seconds: float) -> Served:
            setup = our_setup(self.instance, plan.spans, plan.flows, load, warm_s + seconds, serving, self._seed)
            return serve(setup, warm_s)

        return self._long_enough(run)

    def _long_enough(self, run: Callable[[float, float], Served]) -> Served:
        """A short run tells how long requests live, the second lasts as many lives as it should."""
        output = sum(tokens for _, tokens in self._lengths) / len(self._lengths)
        first = run(FIRST_GUESS_S / 2, FIRST_GUESS_S)
        life_s = first.ttft_s + output * first.tpot_s
        return run(life_s, self._lifetimes * life_s)


def in_our_mode(problem: Problem, artifact: Artifact) -> Problem:
    """The paper's machines as our stages run them: prompts in pieces that hold nobody up, and batches as large as ours.

    The authors' T(k) stands for what a machine does in their system; ours does what its timed batches allow, in such
    batches as its KV room lets it count on (`planner.problem.from_snapshot` plans our own peers by the same rule).
    """
    peers = tuple(replace(peer, capacity=_capacity(problem, peer)) for peer in problem.peers)
    pieces = max(1.0, artifact.constants.AVG_INPUT_LEN / PREFILL_CHUNK_TOKENS)
    return replace(problem, peers=peers, chunks=pieces, convoys=False)


def _capacity(problem: Problem, peer: PlanPeer) -> tuple[float, ...]:
    """Token-layers/s by layers held, prompt tokens counted."""
    most = min(Serving().decode_batch_max, len(peer.batch_rate))
    batches = [min(most, max(1, room // (problem.session_tokens * problem.layers))) for room in peer.kv_token_layers]
    return tuple([problem.flow_per_token * peer.batch_rate[batch - 1] for batch in batches])

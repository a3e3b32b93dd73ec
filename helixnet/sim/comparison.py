"""One instance of the paper served in several ways, so that one sees what each part of ours brings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helixnet.core.errors import UsageError
from helixnet.core.stage.batch import PREFILL_CHUNK_TOKENS
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import CapacityModel, Edge
from helixnet.planner.objective import THROUGHPUT
from helixnet.planner.predict import forecast
from helixnet.planner.problem import (
    LINK_SHARE,
    PlanPeer,
    Problem,
    Spans,
    batch_rates,
    capacity,
    met_together,
)
from helixnet.planner.served import planned_routing
from helixnet.planner.solve import Budget, place
from helixnet.sim.compute import Tables
from helixnet.sim.paper.admission import OFFLINE
from helixnet.sim.paper.feeder import FillKv, Lengths, lengths_of
from helixnet.sim.paper.instance import Instance, Profile, flows_of, read_instance
from helixnet.sim.paper.run import Setup, Windows, simulate
from helixnet.sim.side_by_side import Served, Serving, our_setup, serve
from helixnet.sim.simulation import Load
from helixnet.sim.workload import Recorded

STORED = "helix-milp"
KV_SHARE = 0.77
"""Of the KV room of the tightest machine that requests in flight take; more of them give more tokens/s and later first
tokens. The authors fill theirs to 0.8; with as much, first tokens of ours come later than theirs on cluster42."""
CLIENTS = 8
FIRST_GUESS_S = 240.0
"""Of a request's life in their way, to find out how long it really is."""


class Comparison:
    """One instance with one model. Windows are `lifetimes` mean lives of a request, after one to warm up."""

    def __init__(self, artifact: Artifact, instance: str, model: str, lifetimes: float, seed: int) -> None:
        self.instance: Instance = read_instance(artifact, instance, model)
        self._artifact, self._name, self._model = artifact, instance, model
        self._lengths: Lengths = lengths_of(artifact.trace())
        self._lifetimes, self._seed = lifetimes, seed

    def stored(self) -> Spans:
        """The authors' own placement."""
        return self._artifact.stored(self._name, self._model)[STORED]

    def stored_flows(self) -> dict[Edge, float]:
        """Its flows: what they sent through each machine."""
        through = self._artifact.stored_flow(self._name, self._model, STORED)
        return flows_of(self.instance.problem, self.stored(), through)

    def ours(self, budget: Budget | None = None) -> Spans:
        """Placed for predicted serving in our own way."""
        return place(self._in_our_mode(), self._seed, budget, THROUGHPUT)

    def in_their_way(self, spans: Spans, flows: dict[Edge, float] | None = None) -> Served:
        """In paper mode, its KV filled as the authors fill it; a max flow where no flows are given.

        A short run tells how long requests live, the second lasts as many lives as it should.
        """
        flows = flows or flows_of(self.instance.problem, spans)
        setup = Setup(self.instance, spans, flows, "iwrr", FillKv(self._lengths), OFFLINE)

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

        first = run(FIRST_GUESS_S / 2, FIRST_GUESS_S)
        life_s = first.ttft_s + self._output_tokens * first.tpot_s
        return run(life_s, self._lifetimes * life_s)

    def in_our_way(self, spans: Spans, serving: Serving | None = None) -> Served:
        """By our protocol on the real machines of the core, with the flows that we plan for these spans.

        Lives are as long as predicted: at less than that rate, the window has fewer of them.
        """
        problem = self._in_our_mode()
        routing = planned_routing(problem, spans, CapacityModel.EXACT)
        outlook = forecast(replace(problem, session_tokens=round(self._in_flight_tokens)), spans, routing)
        in_flight = int(KV_SHARE * outlook.sessions)
        if in_flight < 1:
            raise UsageError(f"Some stage of {self.instance.name} has no KV room for one request in this placement.")
        life_s = in_flight * self._output_tokens / outlook.tokens_per_s
        load = Load(lengths=Recorded(self._lengths), in_flight=in_flight, begin_s=life_s, clients=CLIENTS)
        seconds = (1 + self._lifetimes) * life_s
        return serve(our_setup(self.instance, spans, routing.edges, load, seconds, serving, self._seed), life_s)

    def _in_our_mode(self) -> Problem:
        """Slow links are planned at a part of what they carry."""
        problem = self._artifact.problem(self._name, self._model, LINK_SHARE)
        return in_our_mode(problem, self.instance, self._artifact.constants.AVG_INPUT_LEN)

    @property
    def _in_flight_tokens(self) -> float:
        """Of a mean request under way: the longer an answer, the longer it is there."""
        output = sum(answer for _, answer in self._lengths)
        return sum((prompt + answer) * answer for prompt, answer in self._lengths) / output

    @property
    def _output_tokens(self) -> float:
        return sum(tokens for _, tokens in self._lengths) / len(self._lengths)


def in_our_mode(problem: Problem, instance: Instance, prompt_tokens: int) -> Problem:
    """The paper's machines as our stages run them: prompts in pieces that hold nobody up, and batches as large as ours.

    The authors' T(k) stands for what a machine does in their system; ours does what its timed batches allow, in such
    batches as its KV room lets it count on (`planner.problem.from_snapshot` plans our own peers by the same rule).
    """
    pieces = max(1.0, prompt_tokens / PREFILL_CHUNK_TOKENS)
    timed = zip(problem.peers, (instance.profiles[kind] for kind in instance.kinds), strict=True)
    peers = tuple(_timed(problem, peer, profile, pieces) for peer, profile in timed)
    return replace(problem, peers=peers, chunks=pieces, convoys=False)


def _timed(problem: Problem, peer: PlanPeer, profile: Profile, pieces: float) -> PlanPeer:
    """A machine with rates by its timed batches, each decode step with its share of a prompt."""
    timing = Tables(profile.decode_s, profile.prompt_s)
    piece_s = timing.prefill_s(PREFILL_CHUNK_TOKENS)
    prefill_s = pieces * piece_s
    largest = min(Serving().decode_batch_max, len(profile.decode_s) - 1)
    ratio = pieces * PREFILL_CHUNK_TOKENS / problem.output_tokens
    met = met_together(largest, ratio, PREFILL_CHUNK_TOKENS)
    extra_s = ratio * np.array([timing.prefill_s(round(tokens)) for tokens in met.tolist()]) / met
    rates = batch_rates(profile.decode_s[1 : largest + 1], extra_s)
    decoded = capacity(rates, peer.kv_token_layers, problem.session_tokens * problem.layers)
    flow = tuple(problem.flow_per_token * rate for rate in decoded)
    return replace(peer, capacity=flow, batch_rate=rates, prefill_s=prefill_s, piece_s=piece_s)

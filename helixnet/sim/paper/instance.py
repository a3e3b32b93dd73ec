"""One of the paper's instances with one model, in the numbers that its system is simulated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact
from helixnet.planner.artifact_file import Curve, TypeData
from helixnet.planner.artifact_links import ClusterLinks
from helixnet.planner.fastflow import paper_routing
from helixnet.planner.flow import OUTSIDE, Edge, edges_of
from helixnet.planner.problem import PlanPeer, Problem, Spans

SOURCE_NODE, SINK_NODE = "SourceNode", "SinkNode"
"""The coordinator's two ends, as profiles.json calls their network cards."""
SAME_FLOW = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch takes at most (authors' InferenceSettings)."""

    prompts: int
    prompt_tokens: int
    decodes: int
    context: int
    """Tokens that the decode steps look back on."""


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """One type of machine with one model."""

    prompt_s: tuple[float, ...]
    """One layer, by prompt tokens in the batch."""
    decode_s: tuple[float, ...]
    """One layer, by decode steps in the batch."""
    limits: tuple[BatchLimits, ...]
    """By layers held, from 1; for more, those of the most."""

    def limits_for(self, layers: int) -> BatchLimits:
        """With so many layers held."""
        return self.limits[min(layers, len(self.limits)) - 1]


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """Machines by their number in the cluster, links by edge; OUTSIDE is the coordinator."""

    name: str
    problem: Problem
    """For layers, KV room and max flow."""
    kinds: tuple[str, ...]
    profiles: Mapping[str, Profile]
    links: ClusterLinks
    activation_bytes: float
    token_bytes: float
    cards_out: Mapping[int, float]
    """Bytes/s that a machine's network card sends."""
    cards_in: Mapping[int, float]

    def link(self, edge: Edge) -> tuple[float, float]:
        """Bytes/s and seconds of latency."""
        tail, head = edge
        if tail == OUTSIDE:
            return self.links.entry[head], self.links.entry_s[head]
        if head == OUTSIDE:
            return self.links.exit[tail], self.links.exit_s[tail]
        return float(self.links.bandwidth[edge]), float(self.links.latency_s[edge])

    def bytes_per_token(self, edge: Edge) -> float:
        """Only token ids pass to and from the coordinator."""
        return self.token_bytes if OUTSIDE in edge else self.token_bytes + self.activation_bytes

    def kv_token_layers(self, machine: int, layers: int) -> int:
        """KV room of a machine that holds so many layers."""
        return self.problem.peers[machine].kv_token_layers[layers]


def read_instance(artifact: Artifact, instance: str, model: str) -> Instance:
    """Raises UsageError: something is missing or malformed."""
    kinds = artifact.cluster(instance).node_types
    shape = artifact.model(model)
    cards = {kind: artifact.hardware(kind) for kind in sorted(set(kinds))}
    ends = artifact.hardware(SOURCE_NODE), artifact.hardware(SINK_NODE)
    return Instance(
        name=f"{instance} {model}",
        problem=artifact.problem(instance, model),
        kinds=kinds,
        profiles={kind: _profile(artifact.profile(model, kind), f"{model}, {kind}") for kind in cards},
        links=artifact.links(instance),
        activation_bytes=shape.activation_bytes_per_token,
        token_bytes=shape.token_size_bytes,
        cards_out={OUTSIDE: ends[0].outbound_nic_speed}
        | {number: cards[kind].outbound_nic_speed for number, kind in enumerate(kinds)},
        cards_in={OUTSIDE: ends[1].inbound_nic_speed}
        | {number: cards[kind].inbound_nic_speed for number, kind in enumerate(kinds)},
    )


def flows_of(problem: Problem, spans: Spans, through: Mapping[int, float] | None = None) -> dict[Edge, float]:
    """Every edge that the authors would connect, with its part of the max flow (tokens/s), prompt tokens counted.

    Requests enter spans in the middle only where the flow would be smaller otherwise; that agrees with the links of the
    authors' own simulations of every stored placement, but for those that pruning took away. A max flow is not unique,
    which matters: some other of the same size served 9 % less on 3cluster24. So where it is known how much of it
    passes `through` each machine (`Artifact.stored_flow`), no more does here.
    """
    edges = edges_of(problem, spans)
    straight = [edge for edge in edges if OUTSIDE in edge or _meet(spans, edge)]
    if through is not None:
        problem = replace(problem, peers=tuple(_limited(peer, through.get(n)) for n, peer in enumerate(problem.peers)))
    passes = np.zeros_like(problem.link_tokens_per_s)
    for edge in straight:
        if OUTSIDE not in edge:
            passes[edge] = problem.link_tokens_per_s[edge]
    whole = paper_routing(problem, spans, limits=False)
    without = paper_routing(replace(problem, link_tokens_per_s=passes), spans, limits=False)
    if without.tokens_per_s >= whole.tokens_per_s * SAME_FLOW:
        whole, edges = without, straight
    if not whole.edges:
        raise UsageError(
            "No request can pass through this placement: some layer is held nowhere, or links are missing."
        )
    return {edge: whole.edges.get(edge, 0.0) for edge in edges}


def _limited(peer: PlanPeer, tokens_per_s: float | None) -> PlanPeer:
    """A machine that lets no more tokens pass, whatever it holds."""
    if tokens_per_s is None:
        return peer
    return replace(peer, capacity=tuple(tokens_per_s * max(1, held) for held in range(len(peer.capacity))))


def _meet(spans: Spans, edge: Edge) -> bool:
    """Whether the one span begins where the other ends."""
    tail, head = spans[edge[0]], spans[edge[1]]
    return tail is not None and head is not None and tail.stop == head.start


def _profile(data: TypeData, where: str) -> Profile:
    tables = (data.prompt_max_requests, data.prompt_max_tokens, data.decode_max_tokens, data.decode_max_context)
    held_max = min(max(table, default=0) for table in tables)
    if not held_max or any(held not in table for table in tables for held in range(1, held_max + 1)):
        raise UsageError(f"profiles.json: {where} lacks limits of batches: prompt_max_requests and the three like it.")
    limits = tuple(BatchLimits(*(table[held] for table in tables)) for held in range(1, held_max + 1))
    decode = _by_count(data.decode_bs2time_ms_per_layer, max(2, *(each.decodes for each in limits)))
    decode[1] = decode[2]  # a step alone takes as long as two (authors' get_inference_statistics)
    prompt = _by_count(data.prompt_bs2time_ms_per_layer, max(each.prompt_tokens for each in limits))
    return Profile(tuple(prompt), tuple(decode), limits)


def _by_count(curve: Curve, most: int) -> list[float]:
    """Seconds for 0, 1, ... tokens, in straight lines between the points measured."""
    points = sorted(curve)
    counts, times = [count for count, _ in points], [ms / 1000 for _, ms in points]
    values: list[float] = np.interp(np.arange(most + 1), counts, times).tolist()
    return [0.0, *values[1:]]

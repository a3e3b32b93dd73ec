"""Our swarm on the paper's machines: its profiles, links and KV rooms, any placement, our protocol on real peers.

The placement is given, not solved for: what is compared is what a placement serves. Flow counts prompt tokens there;
only the shares of flows matter to routers, so they are handed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from helixnet.core.model import Manifest
from helixnet.core.peer import PeerConfig
from helixnet.core.plan.plan import Assignment, Flow, Placement, Prediction
from helixnet.core.stage.batch import PREFILL_BUDGET_TOKENS, PREFILL_CHUNK_TOKENS
from helixnet.core.stage.entry import EntryConfig
from helixnet.core.stage.stage import StageConfig
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.planner.flow import OUTSIDE, Edge
from helixnet.planner.problem import Spans
from helixnet.sim.compute import Tables
from helixnet.sim.paper.instance import Instance
from helixnet.sim.scenarios import PATIENT
from helixnet.sim.simulation import Load, Setup, Simulation
from helixnet.sim.solving import always
from helixnet.sim.swarm import SimConfig
from helixnet.sim.world import Link, World

KV_BYTES = 4_096
"""Of one token in one layer; only how many tokens fit matters here."""
LAYER_BYTES = 1 << 30
HIDDEN_BYTES = 2
SESSIONS_MAX = 4_096
"""The authors' machines admit what their KV holds; so do ours here."""
UNCHUNKED_TOKENS = 2_048
"""Their longest prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How our stages run: the product's own way, unless something is left out to see what it brings."""

    chunked: bool = True
    decode_batch_max: int = 256
    weighted: bool = True
    """Whether routers follow the shares of flows; otherwise all next peers of a peer have their turns alike."""

    def config(self) -> PeerConfig:
        """Of every peer."""
        budget = PREFILL_BUDGET_TOKENS if self.chunked else UNCHUNKED_TOKENS
        chunk = PREFILL_CHUNK_TOKENS if self.chunked else UNCHUNKED_TOKENS
        return PeerConfig(
            stage=StageConfig(
                sessions_max=SESSIONS_MAX, decode_batch_max=self.decode_batch_max, prefill_budget_tokens=budget
            ),
            entry=EntryConfig(sessions_max=SESSIONS_MAX, prefill_chunk_tokens=chunk),
        )


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one run in its window, in the paper's words: decode tokens/s, seconds to and between tokens."""

    decode_tokens_per_s: float
    ttft_s: float
    """Mean, from asking; waiting for room counts."""
    tpot_s: float
    stages: float
    """Of an average request."""
    in_flight: int
    finished: int
    lost: int
    retries: int
    seconds: float
    """Simulated, of the window."""
    events: int


def serve(setup: Setup, warm_s: float) -> Served:
    """Run a setup; what happens before `warm_s` of load does not count."""
    simulation = Simulation(setup)
    tally = simulation.run()
    begins, ends = simulation.began_at + warm_s, simulation.ends_at
    counted = [request for request in tally.requests if request.finish and begins <= request.asked_at < ends]
    count = max(1, len(counted))
    return Served(
        decode_tokens_per_s=tally.decoded_between(begins, ends) / (ends - begins),
        ttft_s=sum(request.ttft_s for request in counted) / count,
        tpot_s=sum(request.tpot_s for request in counted) / count,
        stages=sum(request.stages for request in counted) / count,
        in_flight=setup.load.in_flight,
        finished=len(counted),
        lost=tally.lost,
        retries=tally.retries,
        seconds=ends - begins,
        events=simulation.engine.events,
    )


def name_of(machine: int) -> PeerId:
    """What we call a machine of the paper."""
    return PeerId(f"m{machine:02d}")


def our_setup(
    instance: Instance,
    spans: Spans,
    flows: Mapping[Edge, float],
    load: Load,
    seconds: float,
    serving: Serving | None = None,
    seed: int = 0,
) -> Setup:
    """A swarm of ours that holds `spans` and routes by `flows`, under `load` for so many seconds."""
    manifest = _manifest(instance)
    held = [number for number, span in enumerate(spans) if span is not None]
    serving = serving or Serving()
    world = World(
        manifest=manifest,
        machines={name_of(number): _capability(instance, spans, number, manifest) for number in held},
        between=Between(instance),
        client_link=_client_link(instance, held),
        timings={name_of(number): _tables(instance, number) for number in held},
        load_bytes_per_s=1e15,
        hop_s=0.0,
    )
    return Setup(
        world=world,
        peers=tuple(world.machines),
        load=load,
        seconds=seconds,
        seed=seed,
        config=SimConfig(peer=serving.config(), checked=False),
        request=PATIENT,
        solving=always(_placement(spans, flows if serving.weighted else _alike(flows))),
    )


def _manifest(instance: Instance) -> Manifest:
    return Manifest(
        name=instance.name,
        architecture="",
        layers=instance.problem.layers,
        hidden_size=int(instance.activation_bytes) // HIDDEN_BYTES,
        vocab_size=1,
        context_tokens=1 << 16,
        kv_heads=1,
        head_dim=KV_BYTES // 4,
        dtype="float16",
        layer_bytes=LAYER_BYTES,
        embedding_bytes=0,
        head_bytes=0,
        source_format="",
        config_sha256="",
        tokenizer_sha256="",
        weights_sha256="",
    )


def _capability(instance: Instance, spans: Spans, number: int, manifest: Manifest) -> Capability:
    """Memory for exactly the span and the KV room that the profile gives beside it."""
    span = spans[number]
    assert span is not None, "only machines that hold something are peers"
    tables = _tables(instance, number)
    room = instance.kv_token_layers(number, len(span))
    return Capability(
        device=instance.kinds[number],
        matmul_flops=1.0,
        memory_bandwidth=1.0,
        decode=(RatePoint(1, tables.decode_s(1)),),
        prefill=(RatePoint(128, tables.prefill_s(128)),),
        memory_bytes=len(span) * LAYER_BYTES + room * manifest.kv_bytes,
    )


def _tables(instance: Instance, number: int) -> Tables:
    profile = instance.profiles[instance.kinds[number]]
    return Tables(profile.decode_s, profile.prompt_s)


class Between:
    """Links between the paper's machines; where the data has none, as slow as the slowest."""

    def __init__(self, instance: Instance) -> None:
        self._links = instance.links
        self._slowest = Link(float(instance.links.latency_s.max()), float(_positive_min(instance)))

    def __call__(self, source: PeerId, target: PeerId) -> Link:
        """The link of two machines, by name."""
        edge = int(source[1:]), int(target[1:])
        bandwidth = float(self._links.bandwidth[edge])
        return Link(float(self._links.latency_s[edge]), bandwidth) if bandwidth > 0 else self._slowest


def _positive_min(instance: Instance) -> float:
    bandwidth = instance.links.bandwidth
    return float(bandwidth[bandwidth > 0].min())


def _client_link(instance: Instance, held: Sequence[int]) -> Link:
    """Clients sit where the authors' coordinator does: the middle one of its links."""
    ways = sorted((instance.link((OUTSIDE, number))[1], instance.link((OUTSIDE, number))[0]) for number in held)
    latency_s, bandwidth = ways[len(ways) // 2]
    return Link(latency_s, bandwidth)


def _alike(flows: Mapping[Edge, float]) -> dict[Edge, float]:
    """The same edges, as if all carried as much."""
    return {edge: float(rate > 0) for edge, rate in flows.items()}


def _placement(spans: Spans, flows: Mapping[Edge, float]) -> Placement:
    def end(number: int) -> PeerId | None:
        return None if number == OUTSIDE else name_of(number)

    routed = [Flow(end(tail), end(head), rate) for (tail, head), rate in flows.items() if rate > 0]
    return Placement(
        assignments=tuple(Assignment(name_of(n), span) for n, span in enumerate(spans) if span is not None),
        flows=tuple(sorted(routed, key=lambda flow: (flow.source or "", flow.target or ""))),
        prediction=Prediction(tokens_per_s=1.0, bound_tokens_per_s=1.0, ttft_s=1.0, tpot_s=1.0),
    )

"""Whether what the planner predicts is what a swarm serves: random clusters, saturated and alone, both simulated."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec

from helixnet.core.errors import UsageError
from helixnet.core.plan.plan import Placement
from helixnet.core.presets import LAN
from helixnet.planner.flow import CapacityModel
from helixnet.planner.predict import forecast
from helixnet.planner.problem import Workload
from helixnet.planner.served import planned_routing
from helixnet.planner.solve import place, to_placement
from helixnet.sim.random_clusters import BUDGET, DRAWS_MAX, MODEL, NEAR, Drawn, Ranges, clusters
from helixnet.sim.scenarios import PATIENT
from helixnet.sim.side_by_side import Served, serve
from helixnet.sim.simulation import Load, Setup
from helixnet.sim.solving import always
from helixnet.sim.swarm import SimConfig
from helixnet.sim.workload import Fixed
from helixnet.sim.world import World, world_in

RANGES = Ranges(peers=(10, 24), prompt_tokens=(64, 512), output_tokens=(64, 256))
ALONE = 100
"""Requests one after the other, so that rare ways are among them."""
LIVES = 4.0
"""Of a request, in the saturated window."""
CROWD, IN_FLIGHT_MAX = 1.1, 1_500
"""Requests in flight, as a multiple of those that KV has room for; but no more than this."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster: what was predicted, what was simulated."""

    seed: int
    peers: int
    bottleneck: str
    tokens_per_s: tuple[float, float]
    """Saturated: predicted, simulated."""
    ttft_s: tuple[float, float]
    """Alone."""
    tpot_s: tuple[float, float]
    """Alone."""

    def errors(self) -> tuple[float, float, float]:
        """Simulated over predicted, less one: of throughput, TTFT and TPOT."""
        throughput, ttft, tpot = (seen / said - 1.0 for said, seen in (self.tokens_per_s, self.ttft_s, self.tpot_s))
        return throughput, ttft, tpot


def check(seed: int) -> Check:
    """One random cluster, planned, then run with one request at a time and with more than it can take.

    Raises:
        UsageError: none of many has room for the model.
    """
    drawn = _drawn(seed)
    land, workload, problem = drawn.land, drawn.workload, drawn.problem
    spans = place(problem, seed, BUDGET)
    placement = to_placement(problem, spans, CapacityModel.EXACT)
    sessions = forecast(problem, spans, planned_routing(problem, spans, CapacityModel.EXACT)).sessions
    world = replace(world_in(land, NEAR), uplinks={}, load_bytes_per_s=1e15)
    said = placement.prediction
    alone_s = ALONE * (said.ttft_s + workload.output_tokens * said.tpot_s)
    alone = _run(world, placement, workload, 1, alone_s, seed)
    life_s = alone.ttft_s + workload.output_tokens * alone.tpot_s
    in_flight = max(2, min(IN_FLIGHT_MAX, round(CROWD * sessions)))
    loaded_s = max(life_s, in_flight * workload.output_tokens / said.tokens_per_s)
    crowded = _run(world, placement, workload, in_flight, (1 + LIVES) * loaded_s, seed)
    return Check(
        seed=seed,
        peers=len(land.capabilities),
        bottleneck=said.bottleneck,
        tokens_per_s=(said.tokens_per_s, crowded.decode_tokens_per_s),
        ttft_s=(said.ttft_s, alone.ttft_s),
        tpot_s=(said.tpot_s, alone.tpot_s),
    )


def _drawn(seed: int) -> Drawn:
    """The first of the clusters drawn that has room for the model."""
    seeds = (seed + (draw << 16) for draw in range(DRAWS_MAX))
    drawn = next(clusters(random.Random(f"prediction {seed}"), seeds, RANGES), None)
    if drawn is None:
        raise UsageError(f"None of {DRAWS_MAX} clusters has room for {MODEL}.")
    return drawn


def _run(world: World, placement: Placement, workload: Workload, in_flight: int, seconds: float, seed: int) -> Served:
    warm_s = seconds / (1 + LIVES)
    lengths = Fixed(workload.prompt_tokens, workload.output_tokens)
    setup = Setup(
        world=world,
        peers=tuple(world.machines),
        load=Load(lengths=lengths, in_flight=in_flight, begin_s=warm_s if in_flight > 1 else 0.0),
        seconds=seconds,
        seed=seed,
        config=SimConfig(peer=LAN.peer, checked=False),
        request=PATIENT,
        solving=always(placement),
    )
    return serve(setup, warm_s)

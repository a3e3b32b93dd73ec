"""Whether IWRR makes of a plan what the plan says: the flow as a whole, and each peer's share of the work.

Random mixed clusters under our own protocol, saturated. Their placements are planned for the memory that they have;
then all get so much more that KV room limits nothing, and flow is what compute and links allow. Links carry what is
planned over them: half of what is measured, as if others had the rest. Otherwise the swarm would serve more than the
plan says, and whoever computes at its limit could not keep its share of that. A token is run by every
layer once, wherever that is held; so a peer's share of all token-layers is its planned load over all planned loads,
whatever the rate that is reached.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import msgspec

from helixnet.core.errors import UsageError
from helixnet.core.plan.plan import Placement
from helixnet.core.presets import LAN
from helixnet.core.stage.batch import DECODE_BATCH_MAX
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId
from helixnet.planner.flow import CapacityModel, Routing
from helixnet.planner.predict import forecast
from helixnet.planner.problem import LINK_SHARE, Workload, from_snapshot
from helixnet.planner.random_swarm import Geography
from helixnet.planner.served import planned_routing
from helixnet.planner.solve import place, to_placement
from helixnet.sim.evaluation.cells import Cell, Data, Ended, Row, Target
from helixnet.sim.random_clusters import BUDGET, DRAWS_MAX, MODEL, NEAR, Ranges, clusters
from helixnet.sim.scenarios import PATIENT
from helixnet.sim.simulation import Load, Setup, Simulation
from helixnet.sim.solving import always
from helixnet.sim.swarm import SimConfig
from helixnet.sim.workload import Fixed
from helixnet.sim.world import Link, world_in

FLOW_SHARE = 0.9
"""Of the plan's max flow that has to be reached."""
WITHIN = 0.05
"""Of each peer's share of the work."""
CLUSTERS, QUICK_CLUSTERS = 8, 2
RANGES = Ranges(peers=(8, 16), prompt_tokens=(16, 64), output_tokens=(32, 64))
ROOMY_BYTES = 1 << 40
"""What each peer gets on top of its memory."""
SESSIONS_MAX = 4_096
"""What stages and entries admit: nobody is to be turned away."""
CROWD = 3.0
"""Requests in flight, as a multiple of what fills the largest batch of every stage that they pass."""
CHOICES_MIN = 3
"""Places where requests go on to several peers: along a single chain IWRR has nothing to do."""
REQUESTS = 2_000
"""In the window, as planned: a peer with a hundredth of them can still be told from its share."""
WARM_LIVES, LIVES = 3.0, 2.0
"""Of a request, before the window and at least in it."""


class SharesRow(Row, frozen=True, kw_only=True):
    """One cluster."""

    peers: int
    limits: str
    """What bounds the flow, in the planner's words."""
    flow: float
    """Decoded tokens/s, the plan's max flow."""
    served: float
    in_flight: int
    requests: int
    lost: int
    retries: int
    planned: dict[str, float]
    """Share of all token-layers, by peer."""
    run: dict[str, float]
    """What each really ran in the window."""
    busy: dict[str, float]
    """Share of the window that each peer computed."""
    events: int

    def deviations(self) -> dict[str, float]:
        """What a peer ran over its share, less one."""
        return {peer: self.run[peer] / planned - 1.0 for peer, planned in self.planned.items()}


class Cluster(Cell, frozen=True, kw_only=True, tag="shares"):
    """One random mixed cluster."""

    row: ClassVar[type[Row]] = SharesRow
    seed: int

    def title(self) -> str:
        """See Cell."""
        return f"shares: cluster {self.seed}"

    def run(self, data: Data) -> SharesRow:
        """See Cell."""
        return shares_of(planned(self.seed), self.seed)


@dataclass(frozen=True, slots=True)
class Planned:
    """A cluster, and what is planned there."""

    land: Geography
    """With memory to spare."""
    workload: Workload
    placement: Placement
    routing: Routing
    stages: float
    """Of an average token."""


def planned(seed: int) -> Planned:
    """The first of the clusters drawn that has room for the model and whose plan leaves IWRR choices.

    Raises:
        UsageError: there is none.
    """
    rng = random.Random(f"shares {seed}")
    seeds = (rng.randrange(1 << 30) for _ in range(DRAWS_MAX))
    for drawn in clusters(rng, seeds, RANGES):
        land, workload = drawn.land, drawn.workload
        spans = place(drawn.problem, seed, BUDGET)
        roomy = replace(land, capabilities={peer: _roomy(one) for peer, one in land.capabilities.items()})
        problem = replace(from_snapshot(roomy.snapshot(), workload), sessions_max=SESSIONS_MAX)
        routing = planned_routing(problem, spans, CapacityModel.EXACT)
        onward = Counter(source for source, _ in routing.edges)
        if sum(count > 1 for count in onward.values()) >= CHOICES_MIN:
            stages = forecast(problem, spans, routing).hops
            return Planned(roomy, workload, to_placement(problem, spans, CapacityModel.EXACT), routing, stages)
    raise UsageError(f"None of {DRAWS_MAX} clusters has room for {MODEL} and choices of ways.")


def _roomy(capability: Capability) -> Capability:
    return msgspec.structs.replace(capability, memory_bytes=capability.memory_bytes + ROOMY_BYTES)


def shares_of(plan: Planned, seed: int) -> SharesRow:
    """Run it, saturated."""
    work, flow = plan.workload, plan.routing.tokens_per_s
    in_flight = min(SESSIONS_MAX, round(CROWD * DECODE_BATCH_MAX * plan.stages))
    life_s = in_flight * work.output_tokens / flow
    counted_s = max(LIVES * life_s, REQUESTS * work.output_tokens / flow)
    seconds = WARM_LIVES * life_s + counted_s
    peer = msgspec.structs.replace(
        LAN.peer,
        stage=msgspec.structs.replace(LAN.peer.stage, sessions_max=SESSIONS_MAX),
        entry=msgspec.structs.replace(LAN.peer.entry, sessions_max=SESSIONS_MAX),
    )
    world = world_in(plan.land, NEAR)
    setup = Setup(
        world=replace(world, between=_as_planned(world.between), uplinks={}, load_bytes_per_s=1e15),
        peers=tuple(plan.land.capabilities),
        load=Load(lengths=Fixed(work.prompt_tokens, work.output_tokens), in_flight=in_flight, begin_s=life_s),
        seconds=seconds,
        seed=seed,
        config=SimConfig(peer=peer, checked=False),
        request=PATIENT,
        solving=always(plan.placement),
    )
    simulation = Simulation(setup)
    window = _Window(simulation, WARM_LIVES * life_s / seconds)
    tally = simulation.run(window.look)
    loads = {peer: load for peer, load in zip(plan.land.capabilities, plan.routing.loads, strict=True) if load > 0}
    ran = {peer: window.ran[peer] for peer in loads}
    return SharesRow(
        peers=len(loads),
        limits=plan.placement.prediction.bottleneck,
        flow=flow,
        served=tally.decoded_between(window.begins, window.ends) / (window.ends - window.begins),
        in_flight=in_flight,
        requests=len(tally.requests),
        lost=tally.lost,
        retries=tally.retries,
        planned=_of_all(loads),
        run=_of_all(ran),
        busy={peer: window.busy_s[peer] / (window.ends - window.begins) for peer in loads},
        events=simulation.engine.events,
    )


def _as_planned(between: Callable[[PeerId, PeerId], Link]) -> Callable[[PeerId, PeerId], Link]:
    """Links that carry what is planned over them and no more."""

    def scarce(source: PeerId, target: PeerId) -> Link:
        link = between(source, target)
        return Link(link.latency_s, LINK_SHARE * link.bandwidth)

    return scarce


class _Window:
    """What devices run between the end of the warm-up and the end of the load."""

    def __init__(self, simulation: Simulation, warm_share: float) -> None:
        self.begins = self.ends = 0.0
        self.ran: dict[PeerId, float] = {}
        self.busy_s: dict[PeerId, float] = {}
        self._simulation, self._warm_share = simulation, warm_share
        self._before: dict[PeerId, tuple[int, float]] = {}

    def look(self, share: float) -> None:
        """The simulation has come so far."""
        now, peers = self._simulation.engine.now, self._simulation.swarm.peers
        counts = {peer: (one.device.layer_tokens, one.device.busy_s) for peer, one in sorted(peers.items())}
        if share < self._warm_share or not self._before:
            self.begins, self._before = now, counts
        self.ends = now
        self.ran = {peer: float(counts[peer][0] - before[0]) for peer, before in self._before.items()}
        self.busy_s = {peer: counts[peer][1] - before[1] for peer, before in self._before.items()}


def _of_all(loads: Mapping[PeerId, float]) -> dict[str, float]:
    total = sum(loads.values())
    return {str(peer): load / total for peer, load in loads.items()}


def cells(quick: bool) -> tuple[Cell, ...]:
    """The first so many seeds, none left out."""
    return tuple(Cluster(seed=seed) for seed in range(QUICK_CLUSTERS if quick else CLUSTERS))


def rows_of(ended: Sequence[Ended]) -> list[tuple[int, SharesRow]]:
    """By seed."""
    return [
        (one.cell.seed, one.row) for one in ended if isinstance(one.cell, Cluster) and isinstance(one.row, SharesRow)
    ]


def targets(ended: Sequence[Ended]) -> tuple[Target, ...]:
    """On every cluster: FLOW_SHARE of the flow, each peer within WITHIN of its share, nothing lost."""
    asked = sum(isinstance(one.cell, Cluster) for one in ended)
    rows = [row for _, row in rows_of(ended)]
    reached = [row.served / row.flow for row in rows]
    worst = [max(map(abs, row.deviations().values())) for row in rows]
    flowing, even = sum(each >= FLOW_SHARE for each in reached), sum(each <= WITHIN for each in worst)
    lost = sum(row.lost for row in rows)
    return (
        Target(
            f"IWRR reaches {FLOW_SHARE:.0%} of the plan's max flow under saturation, on each of {asked} clusters",
            f"{flowing} of {asked}; least {min(reached, default=0.0):.1%}; {lost} requests lost",
            0 < flowing == asked and not lost,
        ),
        Target(
            f"each peer within {WITHIN:.0%} of its share of the work, on each of {asked} clusters",
            f"{even} of {asked}; worst {max(worst, default=0.0):.1%} off",
            0 < even == asked,
        ),
    )

"""Named worlds with their load and their troubles, and a world of one's own from a cluster file."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from helixnet.core.plan.snapshot import PeerView, Snapshot
from helixnet.core.presets import HOME, LAN, WAN, Preset
from helixnet.core.route.request import RequestConfig
from helixnet.core.types import PeerId
from helixnet.planner.catalogue import GPUS, roofline
from helixnet.planner.cluster import MBIT, manifest_of
from helixnet.planner.cluster_file import ModelEntry
from helixnet.planner.problem import Workload
from helixnet.planner.random_swarm import geography
from helixnet.sim.faults import Fault, Kind, churn
from helixnet.sim.simulation import Crowd, Load, Setup
from helixnet.sim.solving import planner
from helixnet.sim.swarm import SimConfig
from helixnet.sim.workload import Conversation, Fixed, Lengths
from helixnet.sim.world import Link, World, world_in, world_of

LAN_LINK = Link(0.0002, 1_000 * MBIT)
HOME_CLIENT = Link(0.015, 100 * MBIT)
"""Between a client at home and any peer: half of a round trip of 30 ms."""
PATIENT = RequestConfig(patience_s=1_800.0, unserved_s=1_800.0, too_long_s=1_800.0, attempts_max=100_000)
"""Who measures saturation, or what a swarm that comes and goes loses, waits as long as it takes."""
CONVERSATION = Workload(prompt_tokens=763, output_tokens=232)
"""The mean request of the conversation trace."""
CHURN_SESSION_S = 1_800.0
CHURN_REGIONS = 20
CHURN_SPARE = 0.2
"""Machines that are not there at first, as a share of those that are."""
CROWD, CROWD_AT_S = 100, 300.0
LARGE_PEERS = 200
"""With more peers their machines are ticked once a second, not four times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person may change; None leaves the scenario's own."""

    seed: int = 0
    peers: int | None = None
    seconds: float | None = None
    per_s: float | None = None
    in_flight: int | None = None
    workers: Executor | None = None
    """What plans, beside the simulation; None: it plans in line."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world with its load and its troubles."""

    name: str
    about: str
    build: Callable[[Options], Setup]


def of_cluster(snapshot: Snapshot, workload: Workload, options: Options) -> Setup:
    """The swarm of a cluster file under a load of its typical requests; clients sit at home."""
    lengths = Fixed(workload.prompt_tokens, workload.output_tokens)
    return _setup(world_of(snapshot, HOME_CLIENT), WAN, _load(options, lengths, per_s=0.5), workload, options, 1_800.0)


def lan(options: Options) -> Setup:
    """Gaming machines on one switch."""
    manifest = manifest_of(ModelEntry(name="llama-3.1-8b"))
    gpus = ("rtx3060", "rtx3070", "rtx3080", "rtx3060", "rtx4060ti", "rtx3070")
    views = tuple(
        PeerView(peer=PeerId(f"pc-{n + 1:02d}"), capability=roofline(GPUS[gpus[n % len(gpus)]], manifest))
        for n in range(options.peers or 6)
    )
    world = world_of(Snapshot(manifest=manifest, peers=views))
    world.between = lambda source, target: LAN_LINK
    world.client_link = LAN_LINK
    return _setup(world, LAN, _load(options, Conversation(), per_s=0.5), CONVERSATION, options, 600.0)


def three_continents(options: Options) -> Setup:
    """Rented machines in three regions of the world."""
    world = world_in(geography(options.seed, options.peers or 24, 3, homes=0.0), HOME_CLIENT)
    return _setup(world, WAN, _load(options, Conversation(), per_s=0.5), CONVERSATION, options, 1_200.0)


def home_uplinks(options: Options) -> Setup:
    """Volunteers' machines behind home lines in five regions; each line carries all that its peer sends."""
    world = world_in(geography(options.seed, options.peers or 60, 5, homes=1.0), HOME_CLIENT)
    return _setup(world, HOME, _load(options, Conversation(), per_s=0.2), CONVERSATION, options, 1_800.0)


def churning(options: Options) -> Setup:
    """Volunteers who come and go: half an hour each on average, from twenty regions."""
    count = options.peers or 100
    spare = max(2, round(count * CHURN_SPARE))
    world = world_in(geography(options.seed, count + spare, CHURN_REGIONS), HOME_CLIENT)
    load = _load(options, Conversation(), per_s=max(0.02, 0.25 * count / 1_000))
    setup = _setup(world, HOME, load, CONVERSATION, options, 3_600.0)
    machines = list(world.machines)
    rng = random.Random(f"churn {options.seed}")
    faults = tuple(churn(rng, machines[:count], machines[count:], CHURN_SESSION_S, setup.seconds))
    return replace(setup, peers=tuple(machines[:count]), faults=faults, request=PATIENT)


def flash_crowd(options: Options) -> Setup:
    """A hundred requests at once into a quiet swarm; a minute later its coordinator dies."""
    setup = three_continents(options)
    load = replace(setup.load, crowds=(Crowd(CROWD_AT_S, CROWD),))
    dies = Fault(at_s=CROWD_AT_S + 60.0, kind=Kind.COORDINATOR)
    return replace(setup, load=load, faults=(dies,), request=PATIENT)


SCENARIOS = {
    name: Scenario(name, (build.__doc__ or "").strip(), build)
    for name, build in (
        ("lan", lan),
        ("three-continents", three_continents),
        ("home-uplinks", home_uplinks),
        ("churn", churning),
        ("flash-crowd", flash_crowd),
    )
}


def _load(options: Options, lengths: Lengths, per_s: float) -> Load:
    if options.in_flight:
        return Load(lengths=lengths, in_flight=options.in_flight)
    return Load(lengths=lengths, per_s=per_s if options.per_s is None else options.per_s)


def _setup(world: World, preset: Preset, load: Load, workload: Workload, options: Options, seconds: float) -> Setup:
    large = len(world.machines) > LARGE_PEERS
    return Setup(
        world=world,
        peers=tuple(world.machines),
        load=load,
        seconds=seconds if options.seconds is None else options.seconds,
        seed=options.seed,
        config=SimConfig(peer=preset.peer, read_s=preset.read_s, tick_s_max=1.0 if large else 0.25),
        request=PATIENT if load.in_flight else RequestConfig(),
        solving=planner(workload, workers=options.workers),
    )

"""Random small swarms with random faults: every seed is a story, every broken invariant comes back by its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from helixnet.core.model import Manifest
from helixnet.core.peer import PeerConfig
from helixnet.core.plan.coordinator import CoordinatorConfig
from helixnet.core.route.request import RequestConfig
from helixnet.core.stage.stage import StageConfig
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.planner.cluster import manifest_of
from helixnet.planner.cluster_file import ModelEntry
from helixnet.planner.problem import Workload
from helixnet.sim.faults import Fault, Kind
from helixnet.sim.invariants import InvariantBroken
from helixnet.sim.simulation import Load, Setup, Simulation
from helixnet.sim.solving import first_fit
from helixnet.sim.swarm import SimConfig
from helixnet.sim.workload import Fixed, Topical
from helixnet.sim.world import Link, World

PEERS = (3, 8)
LAYERS = (4, 10)
FAULTS_MAX = 8
SECONDS = 20.0
"""Of load; faults fall into it."""
PROMPT, OUTPUT = (1, 300), (1, 40)
PER_S = (0.2, 2.0)
ROOM = (0.6, 1.6)
"""Memory of a device, as a share of the model: any two peers can hold it, with a little KV."""
TOPICS_SHARE, TOPICS_MAX = 0.5, 3
"""Of stories: prompts begin alike there, and share what is computed."""
TIGHT_SHARE, TIGHT_KV_HEADS, TIGHT_LOAD = 0.3, 64, 2.0
"""Of stories: KV memory is so short there, for a load so many times as large, that requests make room for others."""
WORKLOAD = Workload(prompt_tokens=100, output_tokens=30)


@dataclass(frozen=True, slots=True)
class Failure:
    """A story that went wrong, with as few faults as still make it do so."""

    seed: int
    what: str
    faults: tuple[Fault, ...]


def story(seed: int) -> Setup:
    """The swarm, its load and its faults for a seed."""
    rng = random.Random(seed)
    layers, tight = rng.randint(*LAYERS), random.Random(f"kv {seed}").random() < TIGHT_SHARE
    manifest = manifest_of(
        ModelEntry(
            name="fuzz",
            layers=layers,
            hidden_size=512,
            kv_heads=TIGHT_KV_HEADS if tight else 2,
            head_dim=64,
            layer_mb=50,
            context_tokens=2048,
        )
    )
    names = [PeerId(f"m{n}") for n in range(rng.randint(*PEERS))]
    machines = {name: _device(rng, manifest) for name in names}
    links = {(a, b): _link(rng) for a in names for b in names if a != b}
    return Setup(
        world=World(
            manifest=manifest,
            machines=machines,
            between=lambda source, target: links[source, target],
            client_link=_link(rng),
            loss=rng.choice((0.0, 0.0, 0.01)),
            load_bytes_per_s=rng.choice((50e6, 500e6)),
        ),
        peers=tuple(names[: max(2, len(names) - rng.randint(0, 2))]),
        load=_topical(_load(rng, tight), random.Random(f"topics {seed}")),
        seconds=SECONDS,
        faults=tuple(sorted(_faults(rng, names), key=lambda fault: fault.at_s)),
        seed=seed,
        config=SimConfig(peer=_bounds(random.Random(f"bounds {seed}"))),
        request=RequestConfig(patience_s=900.0, unserved_s=900.0, too_long_s=900.0, attempts_max=10_000),
        solving=first_fit(WORKLOAD),
    )


def _load(rng: random.Random, tight: bool) -> Load:
    lengths, per_s, clients = Fixed(rng.randint(*PROMPT), rng.randint(*OUTPUT)), rng.uniform(*PER_S), rng.randint(1, 3)
    if tight:
        # No longer than what is planned for: whatever the plan, there is room for one.
        lengths = Fixed(min(lengths.prompt_tokens, WORKLOAD.prompt_tokens), WORKLOAD.output_tokens)
    return Load(lengths=lengths, per_s=per_s * (TIGHT_LOAD if tight else 1.0), clients=clients)


def _topical(load: Load, rng: random.Random) -> Load:
    """Maybe with prompts that begin alike."""
    if rng.random() >= TOPICS_SHARE:
        return load
    return replace(load, lengths=Topical(load.lengths, rng.randint(1, TOPICS_MAX)))


def _bounds(rng: random.Random) -> PeerConfig:
    """Small swarms with the bounds that only large ones meet: few in the front, few who know whole plans."""
    return PeerConfig(
        front_max=rng.choice((1, 2, 16)),
        coordinator=CoordinatorConfig(offer_s=30.0, deputies=rng.choice((0, 1, 4))),
        stage=StageConfig(ahead_tokens=rng.choice((1, 8, 64)), full_share=rng.choice((0.95, 1.0))),
    )


def _device(rng: random.Random, manifest: Manifest) -> Capability:
    layer_s = rng.uniform(0.0005, 0.01)
    return Capability(
        device="fuzz",
        matmul_flops=1e12,
        memory_bandwidth=1e11,
        decode=(RatePoint(1, layer_s), RatePoint(16, 2 * layer_s), RatePoint(64, 5 * layer_s)),
        prefill=(RatePoint(16, 2 * layer_s), RatePoint(256, 12 * layer_s)),
        memory_bytes=int(manifest.layer_bytes * manifest.layers * rng.uniform(*ROOM)),
    )


def _link(rng: random.Random) -> Link:
    return Link(rng.choice((0.0005, 0.01, 0.08)), rng.choice((1e6, 10e6, 100e6)))


def _faults(rng: random.Random, names: list[PeerId]) -> list[Fault]:
    """Some of every kind; what goes away comes back, so that every request can end."""
    faults: list[Fault] = []
    for number in range(rng.randint(0, FAULTS_MAX)):
        at_s, peer, other = rng.uniform(0, SECONDS), *rng.sample(names, 2)
        kind = rng.choice(list(Kind))
        factor = {Kind.SLOW: 5.0, Kind.THIN: 0.1, Kind.SKEW: rng.uniform(0.98, 1.02), Kind.LIE: 4.0}.get(kind, 1.0)
        faults.append(Fault(at_s=at_s, kind=kind, peer=peer, other=other, seconds=rng.uniform(2, 15), factor=factor))
        if kind in (Kind.CRASH, Kind.VANISH, Kind.LEAVE, Kind.COORDINATOR):
            faults.append(Fault(at_s=at_s + rng.uniform(1, 10), kind=Kind.JOIN, peer=PeerId(f"{peer}+{number}")))
    return faults


def play(setup: Setup) -> str:
    """What went wrong in a story, in words; empty if nothing did."""
    simulation = Simulation(setup)
    try:
        tally = simulation.run()
    except InvariantBroken as error:
        return str(error)
    if tally.lost:
        return next(request.problem for request in tally.requests if request.problem)
    still = sum(len(client.running) for client in simulation.clients)
    return f"{still} requests never ended" if still else ""


def shrink(setup: Setup, what: Callable[[Setup], str] = play) -> Setup:
    """The same story with faults left out one by one, as long as something still goes wrong."""
    faults = list(setup.faults)
    for fault in list(faults):
        fewer = [other for other in faults if other is not fault]
        if what(replace(setup, faults=tuple(fewer))):
            faults = fewer
    return replace(setup, faults=tuple(faults))


def fuzz(seeds: range, progress: Callable[[int], None] | None = None) -> list[Failure]:
    """What goes wrong in the stories of these seeds."""
    failures = []
    for seed in seeds:
        setup = story(seed)
        if play(setup):
            small = shrink(setup)
            failures.append(Failure(seed, play(small), small.faults))
        if progress is not None:
            progress(seed)
    return failures

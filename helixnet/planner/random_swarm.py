"""Random swarms spread over the globe, for benchmarks: people's graphics cards and some data-centre GPUs.

Devices come from the catalogue, distances from points on a sphere, uplinks from what homes and data centres rent.
The same seed gives the same swarm.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixnet.core.model import Manifest
from helixnet.core.plan.snapshot import Link, PeerView, Snapshot
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.planner.catalogue import GPUS, Gpu, roofline
from helixnet.planner.cluster import MBIT, manifest_of
from helixnet.planner.cluster_file import ModelEntry

HOMES = 0.85
HOME_GPUS = (
    *("rtx3060", "rtx3070", "rtx3080", "rtx3090", "rtx4060ti", "rtx4070", "rtx4070ti", "rtx4080", "rtx4090"),
    *("rtx5070ti", "rtx5080", "rtx5090", "rx7900xtx", "m2-max", "m4-max"),
)
DATA_CENTRE_GPUS = ("t4", "v100", "v100-32gb", "a10g", "l4", "l40s", "a6000", "a100-40gb", "a100", "h100")
SPEED = (0.8, 1.2)
"""Of what the catalogue promises: cooling, drivers, what else the machine does."""
LENT = (0.7, 1.0)
"""Share of its memory that a device lends."""
HOME_UPLINK, DATA_CENTRE_UPLINK = (100.0, 1_000.0), (1_000.0, 10_000.0)
"""Mbit/s, evenly over the logarithms."""
HOME_DOWNLINK = (1.0, 4.0)
"""Downlinks of homes, as multiples of their uplinks; those of data centres are equal."""
HOME_ROUND_TRIP_S, DATA_CENTRE_ROUND_TRIP_S = (0.002, 0.010), (0.0003, 0.001)
"""What a peer's own line adds to each round trip."""
NOISE = (0.5, 1.0)
"""Of the bandwidth that both ends have, what is measured between them."""
INSIDE = 4.0
"""Two peers of one region have so much more between them than across the world."""
EARTH_KM, KM_PER_S = 6371.0, 200_000.0
"""Radius, and the speed of light in glass."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Line:
    """A peer's way into the network."""

    region: int
    up: float
    """Bytes/s."""
    down: float
    round_trip_s: float


@dataclass(frozen=True, slots=True)
class Geography:
    """Peers and what lies between any two; matrices are indexed [source, target], their diagonals mean nothing."""

    manifest: Manifest
    capabilities: dict[PeerId, Capability]
    bandwidth: Floats
    """Bytes/s."""
    round_trip_s: Floats
    uplinks: dict[PeerId, float]
    """Bytes/s that a peer can send to all others together."""

    def snapshot(self) -> Snapshot:
        """The swarm with a measured link between any two peers, both ways."""
        ids = list(self.capabilities)
        links = [
            Link(source=source, target=target, round_trip_s=seconds, bandwidth=rate)
            for source, rates, delays in zip(ids, self.bandwidth.tolist(), self.round_trip_s.tolist(), strict=True)
            for target, rate, seconds in zip(ids, rates, delays, strict=True)
            if source is not target
        ]
        views = tuple(PeerView(peer=peer, capability=capability) for peer, capability in self.capabilities.items())
        return Snapshot(manifest=self.manifest, peers=views, links=tuple(links))


def geo_swarm(seed: int, peers: int, regions: int, homes: float = HOMES, model: str = "llama-3.1-70b") -> Snapshot:
    """So many peers anywhere in so many regions, with a measured link between any two, both ways.

    `homes` is the share of peers behind home lines; the others stand in data centres.

    Raises:
        UsageError: the model is not known by its name.
    """
    return geography(seed, peers, regions, homes, model).snapshot()


def geography(seed: int, peers: int, regions: int, homes: float = HOMES, model: str = "llama-3.1-70b") -> Geography:
    """The same swarm before anybody has measured it.

    Raises:
        UsageError: the model is not known by its name.
    """
    rng = random.Random(seed)
    manifest = manifest_of(ModelEntry(name=model))
    ids = [PeerId(f"peer-{n:04d}") for n in range(peers)]
    capabilities: dict[PeerId, Capability] = {}
    lines = []
    for peer in ids:
        home = rng.random() < homes
        gpu = GPUS[rng.choice(HOME_GPUS if home else DATA_CENTRE_GPUS)]
        capabilities[peer] = _capability(gpu, manifest, rng)
        lines.append(_line(rng.randrange(regions), home, rng))
    bandwidth, round_trip_s = _pairs(lines, _distances_km(regions, rng), np.random.default_rng(seed))
    uplinks = {peer: line.up for peer, line in zip(ids, lines, strict=True)}
    return Geography(manifest, capabilities, bandwidth, round_trip_s, uplinks)


def _capability(gpu: Gpu, manifest: Manifest, rng: random.Random) -> Capability:
    """What is measured on a device that is a little faster or slower than its sheet, and partly lent."""
    promised = roofline(gpu, manifest)
    speed, lent = rng.uniform(*SPEED), rng.uniform(*LENT)

    def slower(curve: tuple[RatePoint, ...]) -> tuple[RatePoint, ...]:
        return tuple(RatePoint(point.tokens, point.seconds / speed) for point in curve)

    return Capability(
        device=promised.device,
        matmul_flops=promised.matmul_flops * speed,
        memory_bandwidth=promised.memory_bandwidth * speed,
        decode=slower(promised.decode),
        prefill=slower(promised.prefill),
        memory_bytes=int(promised.memory_bytes * lent),
    )


def _line(region: int, home: bool, rng: random.Random) -> _Line:
    low, high = HOME_UPLINK if home else DATA_CENTRE_UPLINK
    up = low * (high / low) ** rng.random() * MBIT
    down = up * (rng.uniform(*HOME_DOWNLINK) if home else 1.0)
    return _Line(region, up, down, rng.uniform(*(HOME_ROUND_TRIP_S if home else DATA_CENTRE_ROUND_TRIP_S)))


def _distances_km(regions: int, rng: random.Random) -> Floats:
    """Great circles between points drawn evenly from a sphere; nothing inside a region."""
    drawn = np.array([[rng.gauss(0.0, 1.0) for _ in range(3)] for _ in range(regions)]).reshape(regions, 3)
    points = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    angles: Floats = np.arccos(np.clip(points @ points.T, -1.0, 1.0))
    np.fill_diagonal(angles, 0.0)
    return EARTH_KM * angles


def _pairs(lines: list[_Line], distances_km: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Bytes/s and seconds there and back of every ordered pair, [source, target]; the diagonal means nothing."""
    region = np.array([line.region for line in lines], dtype=np.intp)
    up, down, own = (np.array([getattr(line, key) for line in lines]) for key in ("up", "down", "round_trip_s"))
    low, high = NOISE
    noise = low + (high - low) * rng.random((len(lines), len(lines)))
    inside = np.where(region[:, None] == region, INSIDE, 1.0)
    bandwidth = np.minimum(up[:, None], down) * inside * noise
    round_trip_s = own[:, None] + own + 2 * distances_km[np.ix_(region, region)] / KM_PER_S
    return bandwidth, round_trip_s

"""What is true of the simulated machines and the links between them, whatever anybody has measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from helixnet.core.model import Manifest
from helixnet.core.plan.snapshot import Snapshot
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId
from helixnet.planner.problem import HOP_S
from helixnet.planner.random_swarm import Geography
from helixnet.sim.compute import Curves, Timing
from helixnet.sim.network import Path

LIFE = "+"
"""Between a machine's name and the number of its life: who comes back after a crash is another peer."""
CLIENT = "client-"


@dataclass(frozen=True, slots=True)
class Link:
    """One way between two machines."""

    latency_s: float
    bandwidth: float


LOOPBACK = Link(0.00005, 5e9)
"""Between two peers on one machine, as when one starts again before the other is forgotten."""


def machine_of(peer: PeerId) -> PeerId:
    """The machine that a peer runs on."""
    return PeerId(peer.partition(LIFE)[0])


@dataclass(slots=True)
class World:
    """Machines by name, and what lies between any two of them."""

    manifest: Manifest
    machines: Mapping[PeerId, Capability]
    between: Callable[[PeerId, PeerId], Link]
    client_link: Link
    """Between any client and any machine, both ways."""
    uplinks: Mapping[PeerId, float] = field(default_factory=dict)
    """Bytes/s of machines all of whose links share one line out."""
    loss: float = 0.0
    """Share of frames of which a packet is lost."""
    timings: Mapping[PeerId, Timing] = field(default_factory=dict)
    """Of machines that are timed by something else than their capability."""
    load_bytes_per_s: float = 500e6
    """How fast weights are read or fetched."""
    hop_s: float = HOP_S
    """What a hop costs two machines besides the link, as the planner takes it."""

    def timing(self, peer: PeerId) -> Timing:
        """How fast a peer's machine really is."""
        machine = machine_of(peer)
        return self.timings.get(machine) or Curves(self.machines[machine])

    def link(self, source: PeerId, target: PeerId) -> Link:
        """The link between two peers or clients."""
        if source.startswith(CLIENT) or target.startswith(CLIENT):
            return self.client_link
        here, there = machine_of(source), machine_of(target)
        return self.between(here, there) if here != there else LOOPBACK

    def path(self, source: PeerId, target: PeerId) -> Path:
        """The way of a frame, for the network."""
        link = self.link(source, target)
        machine = machine_of(source)
        uplink = self.uplinks.get(machine)
        latency_s = link.latency_s + self.hop_s
        if uplink is None:
            return Path(latency_s, link.bandwidth, (source, target), self.loss)
        return Path(latency_s, min(uplink, link.bandwidth), machine, self.loss)


def world_of(snapshot: Snapshot, client_link: Link | None = None) -> World:
    """The world in which a snapshot is exactly true."""
    default = Link(snapshot.default_round_trip_s / 2, snapshot.default_bandwidth)
    links = {(link.source, link.target): Link(link.round_trip_s / 2, link.bandwidth) for link in snapshot.links}
    return World(
        manifest=snapshot.manifest,
        machines={view.peer: view.capability for view in snapshot.peers},
        between=lambda source, target: links.get((source, target), default),
        client_link=client_link or default,
    )


def world_in(geography: Geography, client_link: Link) -> World:
    """The world of a random swarm spread over the globe; each peer's links share its line out."""
    index = {peer: number for number, peer in enumerate(geography.capabilities)}

    def between(source: PeerId, target: PeerId) -> Link:
        pair = index[source], index[target]
        return Link(float(geography.round_trip_s[pair]) / 2, float(geography.bandwidth[pair]))

    return World(
        manifest=geography.manifest,
        machines=geography.capabilities,
        between=between,
        client_link=client_link,
        uplinks=geography.uplinks,
    )

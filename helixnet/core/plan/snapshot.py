"""What the planner sees: the swarm at one moment, as plain numbers."""

from __future__ import annotations

import math

import msgspec

from helixnet.core.model import Manifest
from helixnet.core.swarm.capability import Capability
from helixnet.core.types import PeerId, Span


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A directed pair of peers with measured round trip and bandwidth."""

    source: PeerId
    target: PeerId
    round_trip_s: float
    bandwidth: float
    """Bytes/s from source to target."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.round_trip_s) and self.round_trip_s >= 0):
            raise ValueError(f"round trip must be finite and not negative, not {self.round_trip_s}")
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth must be finite and positive, not {self.bandwidth}")


class PeerView(msgspec.Struct, frozen=True, kw_only=True):
    """One peer as the planner sees it."""

    peer: PeerId
    capability: Capability
    held: Span | None = None
    """What it holds now, if anything: moving away from it costs a load."""
    draining: bool = False


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Peers sorted by id, links sorted by (source, target); pairs without a link use `default_link`."""

    manifest: Manifest
    peers: tuple[PeerView, ...]
    links: tuple[Link, ...] = ()
    default_round_trip_s: float = 0.05
    default_bandwidth: float = 12.5e6

    def __post_init__(self) -> None:
        ids = [view.peer for view in self.peers]
        if ids != sorted(set(ids)):
            raise ValueError("peers of a snapshot must be sorted by id, without duplicates")

"""How a member reports to its coordinator: its whole record where that is needed, otherwise a short heartbeat."""

from __future__ import annotations

from dataclasses import dataclass

from helixnet.core.swarm.capability import Capability
from helixnet.core.swarm.records import LinkMeasure, PeerRecord, links_differ
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import BEAT_OBSERVED_MAX, Beat


@dataclass(frozen=True, slots=True)
class Told:
    """What a coordinator was told of us that heartbeats do not say."""

    coordinator: PeerId
    addresses: tuple[str, ...]
    capability: Capability | None
    links: tuple[LinkMeasure, ...]

    def still_says(self, now: Told) -> bool:
        """Whether the same coordinator would learn nothing that matters from another record."""
        same = self.coordinator == now.coordinator and self.capability is now.capability
        return same and self.addresses == now.addresses and not links_differ(self.links, now.links)


def beat_of(record: PeerRecord) -> Beat:
    """The heartbeat of a member with this record: what changes all the time, and its largest flows."""
    largest = sorted(record.observed, key=lambda rate: -rate.tokens_per_s)[:BEAT_OBSERVED_MAX]
    return Beat(
        state=record.state,
        term=record.term,
        uptime_s=record.uptime_s,
        held=record.held,
        plan=record.plan,
        plan_active=record.plan_active,
        plan_whole=record.plan_whole,
        sessions=record.sessions,
        kv_free=record.kv_free,
        tokens_per_s=record.tokens_per_s,
        observed=tuple(largest),
    )

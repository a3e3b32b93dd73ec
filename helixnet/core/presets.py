"""Timing that suits one kind of network: the same for real peers and for simulated ones."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from helixnet.core.peer import PeerConfig
from helixnet.core.plan.coordinator import CoordinatorConfig
from helixnet.core.swarm.election import LeaseConfig
from helixnet.core.swarm.membership import MembershipConfig


class Preset(msgspec.Struct, frozen=True):
    """Timing of a peer, and of what it reads."""

    peer: PeerConfig
    read_s: float
    """How often the directory is read."""


LAN = Preset(PeerConfig(), 2.0)
"""One machine or one switch: round trips below a millisecond, so silence is noticed in seconds."""
WAN = Preset(
    PeerConfig(
        heartbeat_s=3.0,
        publish_s=15.0,
        record_lifetime_s=60.0,
        membership=MembershipConfig(suspect_s=10.0, dead_s=20.0),
        lease=LeaseConfig(settle_s=4.0, duration_s=12.0, renew_s=3.0, drift_margin_s=1.0, claim_stagger_s=2.0),
        coordinator=CoordinatorConfig(
            resolve_s=120.0,
            quiet_s=3.0,
            quiet_s_max=15.0,
            offer_s=900.0,
            default_round_trip_s=0.06,
            default_bandwidth=12.5e6,
        ),
    ),
    5.0,
)
"""Good links across a continent: patience for a lost packet or two."""
HOME = Preset(
    PeerConfig(
        heartbeat_s=5.0,
        publish_s=25.0,
        record_lifetime_s=100.0,
        membership=MembershipConfig(suspect_s=20.0, dead_s=45.0),
        lease=LeaseConfig(settle_s=8.0, duration_s=25.0, renew_s=5.0, drift_margin_s=2.0, claim_stagger_s=4.0),
        coordinator=CoordinatorConfig(
            resolve_s=300.0,
            quiet_s=5.0,
            quiet_s_max=30.0,
            offer_s=1800.0,
            default_round_trip_s=0.08,
            default_bandwidth=2.5e6,
        ),
    ),
    10.0,
)
"""Home lines that stall when somebody watches a film."""
PRESETS: Mapping[str, Preset] = {"lan": LAN, "wan": WAN, "home": HOME}

"""Control traffic of a simulated swarm, counted: what peers send each other to run the swarm, by kind.

A kind is the name of a message, or what was done with the directory. What a coordinator sends and receives while it
coordinates is counted apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from helixnet.core.types import PeerId


@dataclass(slots=True)
class Traffic:
    """Bytes so far."""

    sent: Counter[PeerId] = field(default_factory=Counter)
    """By each peer."""
    kinds: Counter[str] = field(default_factory=Counter)
    """By all peers."""
    coordinator_sent: Counter[str] = field(default_factory=Counter)
    coordinator_received: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Traffic:
        """As it is now."""
        return Traffic(
            self.sent.copy(), self.kinds.copy(), self.coordinator_sent.copy(), self.coordinator_received.copy()
        )

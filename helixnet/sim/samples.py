"""What is looked at while a simulation runs, for its report: every BIN_S, and at both ends of what the report counts.

Looking changes nothing: no machine is touched and no chance drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from helixnet.core.plan.plan import Plan
from helixnet.core.types import PeerId
from helixnet.sim.swarm import SimPeer, Swarm
from helixnet.sim.tally import BIN_S, Tally
from helixnet.sim.traffic import Traffic

ROUNDING_S = 1e-6
"""Times are sums of floats."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The swarm at one moment."""

    at: float
    tokens: int
    """That have reached clients so far."""
    prompt_tokens: int
    """Whose first answer token has come so far."""
    in_flight: int
    peers: int
    kv_used: int
    """Pages."""
    kv_capacity: int
    predicted_tokens_per_s: float
    """By the plan that is active; 0 if none is."""


@dataclass(slots=True)
class Kv:
    """How full one peer's KV room was, at the samples at which it had any."""

    samples: int = 0
    total: float = 0.0
    share_max: float = 0.0

    def add(self, share: float) -> None:
        """One more sample."""
        self.samples += 1
        self.total += share
        self.share_max = max(self.share_max, share)

    @property
    def share(self) -> float:
        """On average."""
        return self.total / max(1, self.samples)


@dataclass(frozen=True, slots=True)
class Totals:
    """Everything that only grows, at one moment; what lies between two of them is what a report counts."""

    at: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    gaps: int = 0
    in_flight: int = 0
    busy_s: dict[PeerId, float] = field(default_factory=dict)
    layer_tokens: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    """All of them, and those decoded."""
    layers_loaded: int = 0
    """By all peers."""
    traffic: Traffic = field(default_factory=Traffic)
    lines: dict[Hashable, tuple[float, int]] = field(default_factory=dict)
    """Seconds busy and bytes."""


class Sampler:
    """Looks at a swarm. `opened` and `closed` are the two ends of what the report counts."""

    def __init__(self, swarm: Swarm, tally: Tally, in_flight: Callable[[], int]) -> None:
        self.samples: list[Sample] = []
        """From the beginning of the load, every BIN_S."""
        self.kv: dict[PeerId, Kv] = {}
        self.opened = Totals()
        self.closed = Totals()
        self.plan: Plan | None = None
        """That was active last, before `closed`."""
        self.problem = ""
        """Why none was active then, as its coordinator says it."""
        self._swarm = swarm
        self._engine = swarm.engine
        self._tally = tally
        self._in_flight = in_flight
        self._counting = False

    def begin(self, opens_at: float, closes_at: float) -> None:
        """Look from now on."""
        self._engine.at(opens_at, self._open)
        self._look(closes_at)
        self._engine.at(closes_at, self._close)

    def everybody(self) -> dict[PeerId, SimPeer]:
        """All peers that ever were, by id."""
        return dict(sorted((self._swarm.gone | self._swarm.peers).items()))

    def _open(self) -> None:
        self.opened = self._totals()
        self._counting = True

    def _close(self) -> None:
        self.closed = self._totals()
        self._counting = False
        coordinator = self._swarm.coordinator()
        if self.plan is None and coordinator is not None:
            self.problem = self._swarm.peers[coordinator].peer.coordinator.problem

    def _totals(self) -> Totals:
        peers = self.everybody()
        return Totals(
            at=self._engine.now,
            tokens=sum(self._tally.decoded.values()),
            prompt_tokens=sum(self._tally.prompted.values()),
            gaps=len(self._tally.gaps_s),
            in_flight=self._in_flight(),
            busy_s={name: one.device.busy_s for name, one in peers.items()},
            layer_tokens={
                name: (one.device.layer_tokens, one.device.decode_layer_tokens) for name, one in peers.items()
            },
            layers_loaded=sum(one.device.layers_loaded for one in peers.values()),
            traffic=self._swarm.traffic.copy(),
            lines={name: (line.busy_s, line.bytes) for name, line in self._swarm.network.lines.items()},
        )

    def _look(self, closes_at: float) -> None:
        used = capacity = 0
        active: Plan | None = None
        for name, one in self._swarm.peers.items():
            pool, follower = one.peer.stage.ledger, one.peer.follower
            if pool.capacity:
                used, capacity = used + pool.used, capacity + pool.capacity
                if self._counting:
                    self.kv.setdefault(name, Kv()).add(pool.used / pool.capacity)
            plan = follower.whole_plan
            if follower.active and plan and (active is None or plan.number > active.number):
                active = plan
        self.plan = active or self.plan
        self.samples.append(
            Sample(
                at=self._engine.now,
                tokens=sum(self._tally.decoded.values()),
                prompt_tokens=sum(self._tally.prompted.values()),
                in_flight=self._in_flight(),
                peers=len(self._swarm.peers),
                kv_used=used,
                kv_capacity=capacity,
                predicted_tokens_per_s=active.placement.prediction.tokens_per_s if active else 0.0,
            )
        )
        if self._engine.now + BIN_S <= closes_at + ROUNDING_S:
            self._engine.after(BIN_S, self._look, closes_at)

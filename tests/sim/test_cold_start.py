"""Many peers that start within the same moment: one of them coordinates, and few are in the front."""

from __future__ import annotations

from functools import partial

import pytest

from helixnet.core.machine import Event, Solve, Solved
from helixnet.core.presets import HOME, LAN, Preset
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.planner.cluster import manifest_of
from helixnet.planner.cluster_file import ModelEntry
from helixnet.sim.engine import Engine
from helixnet.sim.swarm import Answer, SimConfig, Swarm
from helixnet.sim.world import Link, World

PEERS, SECONDS = 150, 40.0
CLAIMS_MAX = 3
"""Two that claim at the same moment, and one that then claims above both."""


class ColdStart:
    """A swarm whose planner never answers, and who claimed the lease when."""

    def __init__(self, preset: Preset, seed: int) -> None:
        model = ModelEntry(
            name="cold", layers=4, hidden_size=512, kv_heads=2, head_dim=64, layer_mb=50, context_tokens=2048
        )
        rates = (RatePoint(1, 0.001),)
        device = Capability(
            device="cold", matmul_flops=1e12, memory_bandwidth=1e11, decode=rates, prefill=rates, memory_bytes=10**9
        )
        names = [PeerId(f"p{n:03d}") for n in range(PEERS)]
        link = Link(0.01, 10e6)
        world = World(
            manifest=manifest_of(model),
            machines=dict.fromkeys(names, device),
            between=lambda source, target: link,
            client_link=link,
        )
        self.engine = Engine(seed)
        self.swarm = Swarm(self.engine, world, SimConfig(peer=preset.peer, read_s=preset.read_s, checked=False), _never)
        self.swarm.on_event = self._happened
        self.claims: list[tuple[float, PeerId]] = []
        for name in names:
            self.swarm.join(name)

    def _happened(self, now: float, peer: PeerId, event: Event) -> None:
        if event.kind == "coordinator.changed" and event.data["coordinator"] == peer:
            self.claims.append((now, peer))


def _never(effect: Solve) -> tuple[Answer, float]:
    return partial(Solved, None, None, "nobody asked for a plan"), 1e9


# With HOME's timing leases may be claimed before anybody has looked twice.
@pytest.mark.parametrize("preset", [LAN, HOME], ids=["lan", "home"])
def test_a_swarm_that_starts_all_at_once_soon_has_one_coordinator(preset: Preset) -> None:
    cold = ColdStart(preset, seed=0)
    cold.engine.run(SECONDS)
    assert 1 <= len(cold.claims) <= CLAIMS_MAX, cold.claims
    peers = [one.peer for one in cold.swarm.peers.values()]
    assert {peer.election.holder for peer in peers} == {cold.swarm.coordinator()}
    assert sum(peer.reading.resides for peer in peers) <= preset.peer.front_max

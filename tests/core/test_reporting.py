"""What a member tells its coordinator: its record once, then heartbeats; and what a large swarm's bounds change."""

from __future__ import annotations

import pytest

from helixnet.core.machine import Effect, Send
from helixnet.core.peer import Peer, PeerConfig, PeerFacts
from helixnet.core.plan.coordinator import CoordinatorConfig
from helixnet.core.swarm.directory import front_key
from helixnet.core.swarm.records import LinkMeasure
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from tests.virtual_swarm import MANIFEST, VirtualSwarm, capability, toy_output

ME, BOSS, OTHER = PeerId("me"), PeerId("zz-boss"), PeerId("other")
LEASE = wire.Lease(term=1, coordinator=BOSS, stability=5, duration_s=30.0)
FEW = PeerConfig(front_max=1, coordinator=CoordinatorConfig(deputies=1))
"""The bounds of a large swarm, for a small one."""
PROMPT = tuple(range(1, 40))


def told(effects: list[Effect], to: PeerId = BOSS) -> list[str]:
    return [type(effect.message).__name__ for effect in effects if isinstance(effect, Send) and effect.to == to]


@pytest.fixture
def member() -> Peer:
    """A peer that follows BOSS and has announced itself."""
    facts = PeerFacts(peer=ME, name="me", network="n", manifest=MANIFEST, memory_bytes=10**9)
    peer = Peer(facts, PeerConfig(), 0.0)
    peer.measured(capability(10**9), 0.0)
    peer.tick(0.0)
    assert told(peer.receive(BOSS, LEASE, 0.5)) == ["Announce"]
    return peer


def test_heartbeats_are_short_until_something_else_changes(member: Peer) -> None:
    assert told(member.tick(1.5)) == ["Beat"]
    member.links = (LinkMeasure(OTHER, 0.1, 1e6),)
    assert told(member.tick(2.5)) == ["Announce"]
    member.links = (LinkMeasure(OTHER, 0.105, 1.1e6),)
    assert told(member.tick(3.5)) == ["Beat"], "the same link, measured again"
    member.addresses = ("/ip4/1.2.3.4",)
    assert told(member.tick(4.5)) == ["Announce"]


def test_a_coordinator_that_does_not_know_us_asks(member: Peer) -> None:
    assert told(member.receive(BOSS, wire.GetRecord(), 1.0)) == ["Announce"]
    assert told(member.receive(OTHER, wire.GetRecord(), 1.0), OTHER) == [], "it is not our coordinator"


def test_a_new_coordinator_is_told_everything(member: Peer) -> None:
    member.tick(1.5)
    later = wire.Lease(term=2, coordinator=OTHER, stability=0, duration_s=4.0)
    assert told(member.receive(OTHER, later, 2.0), OTHER) == ["Announce"]


def test_a_coordinator_asks_whom_it_does_not_know() -> None:
    swarm = VirtualSwarm(seed=1)
    boss = swarm.join("boss", 6)
    swarm.run_until(lambda: boss.coordinator.term > 0)
    beat = wire.Beat(state="active", term=1, uptime_s=1.0)
    assert told(boss.receive(OTHER, beat, swarm.now), OTHER) == ["GetRecord"]


def large(seed: int, peers: int = 6) -> VirtualSwarm:
    """A swarm of six that has only one in its front and one deputy, with its plan active."""
    swarm = VirtualSwarm(seed, FEW)
    for name in "abcdef"[:peers]:
        swarm.join(name, 6)
    swarm.run_until(lambda: is_settled(swarm))
    return swarm


def is_settled(swarm: VirtualSwarm) -> bool:
    """Whether all follow one coordinator and one active plan that has a span for each."""
    holders = {peer.election.holder for peer in swarm.peers.values()}
    plans = {peer.follower.number for peer in swarm.peers.values()}
    active = all(peer.follower.active and peer.follower.target is not None for peer in swarm.peers.values())
    return active and len(holders) == 1 and None not in holders and len(plans) == 1


def holder(swarm: VirtualSwarm) -> PeerId:
    (found,) = {peer.election.holder for peer in swarm.peers.values()}
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(4))
def test_only_the_deputy_knows_the_whole_plan_and_requests_are_answered(seed: int) -> None:
    swarm = large(seed)
    swarm.run_for(12.0)
    boss = holder(swarm)
    whole = {name for name, peer in swarm.peers.items() if peer.follower.whole_plan is not None}
    assert boss in whole and len(whole) >= 2
    request = swarm.ask("client", PROMPT, 20)
    swarm.run_until(lambda: request.over)
    assert request.error is None and request.tokens == toy_output(PROMPT, 20)


@pytest.mark.parametrize("seed", range(4))
def test_when_coordinator_and_deputies_die_at_once_another_takes_over(seed: int) -> None:
    swarm = large(seed)
    boss = holder(swarm)
    dead = {boss, *swarm.peers[boss].coordinator._deputies}
    term = swarm.peers[boss].election.term
    for name in sorted(dead):
        swarm.kill(name)
    swarm.run_until(lambda: is_settled(swarm) and holder(swarm) not in dead)
    assert swarm.peers[holder(swarm)].election.term > term


@pytest.mark.parametrize("seed", range(4))
def test_two_sides_of_a_large_swarm_merge_when_it_is_mended(seed: int) -> None:
    swarm = large(seed)
    for left in "abc":
        for right in "def":
            swarm.cut(left, right)
    swarm.run_for(60.0)
    sides = [{swarm.peers[PeerId(name)].election.holder for name in side} for side in ("abc", "def")]
    assert all(len(side) == 1 for side in sides) and sides[0] != sides[1]
    swarm.cuts.clear()
    swarm.run_until(lambda: is_settled(swarm))


@pytest.mark.parametrize("seed", range(4))
def test_newcomers_find_a_large_swarm(seed: int) -> None:
    swarm = large(seed)
    swarm.run_for(30.0)
    swarm.join("new", 6)
    swarm.run_until(lambda: is_settled(swarm), 20.0)


def test_the_front_holds_few_however_many_there_are_and_however_old_they_get() -> None:
    swarm = VirtualSwarm(3, PeerConfig(front_max=3))
    for number in range(20):
        swarm.join(f"p{number:02d}", 6)
    key, sizes = front_key("test"), []
    swarm.run_for(60.0)
    for _ in range(20):
        swarm.run_for(10.0)
        sizes.append(sum(expires > swarm.now for expires, _ in swarm.directory[key].values()))
    assert min(sizes) >= 3 and max(sizes) <= 6, sizes
    assert all(peer.election.holder is not None for peer in swarm.peers.values())

"""Stories of a whole swarm, told to the real machines in virtual time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from helixnet.core.route.request import RequestConfig
from helixnet.core.types import PeerId
from tests.virtual_swarm import MANIFEST, VirtualSwarm, toy_output

PROMPT = tuple(range(1, 40))


def plan_is_active(swarm: VirtualSwarm, peers: int) -> bool:
    """Whether every live peer follows one active plan that uses so many peers."""
    numbers = {peer.follower.number for peer in swarm.peers.values()}
    active = all(peer.follower.active for peer in swarm.peers.values())
    sizes = {len(p.follower.plan.placement.assignments) for p in swarm.peers.values() if p.follower.plan}
    return active and len(numbers) == 1 and sizes == {peers}


@pytest.fixture
def swarm() -> VirtualSwarm:
    """Three peers that cover the six layers with a bit to spare, plan active."""
    swarm = VirtualSwarm(seed=1)
    for name, room in (("a", 2), ("b", 3), ("c", 4)):
        swarm.join(name, room)
    swarm.run_until(lambda: plan_is_active(swarm, 3))
    return swarm


def test_three_peers_elect_one_coordinator_and_answer(swarm: VirtualSwarm) -> None:
    holders = {peer.election.holder for peer in swarm.peers.values()}
    assert len(holders) == 1
    request = swarm.ask("client", PROMPT, 20)
    swarm.run_until(lambda: request.over)
    assert request.error is None
    assert request.tokens == toy_output(PROMPT, 20)
    assert request.finish == "length"


def test_nothing_is_left_of_a_session_that_ended(swarm: VirtualSwarm) -> None:
    request = swarm.ask("client", PROMPT, 5)
    swarm.run_until(lambda: request.over)
    swarm.run_for(1.0)
    for peer in swarm.peers.values():
        assert peer.stage.sessions == {} and peer.entry.sessions == {} and peer.stage.ledger.used == 0
    assert all(engine.kv == {} for engine in swarm.engines.values())


def test_a_fourth_peer_appears_in_the_next_plan(swarm: VirtualSwarm) -> None:
    swarm.join("d", 6)
    swarm.run_until(lambda: plan_is_active(swarm, 4))


def test_when_a_peer_is_killed_in_mid_answer_the_stream_ends_with_the_same_tokens(swarm: VirtualSwarm) -> None:
    swarm.join("d", 6)
    swarm.run_until(lambda: plan_is_active(swarm, 4))
    for victim in ("c", "b"):
        _answer_survives(swarm, victim)


def _answer_survives(swarm: VirtualSwarm, victim: str) -> None:
    request = swarm.ask(f"client-{victim}", PROMPT, 30)
    swarm.run_until(lambda: len(request.tokens) >= 7)
    swarm.kill(victim)
    swarm.run_until(lambda: request.over)
    assert request.error is None
    assert request.tokens == toy_output(PROMPT, 30)


def test_when_the_coordinator_dies_another_takes_over_with_a_higher_term(swarm: VirtualSwarm) -> None:
    swarm.join("d", 6)
    swarm.run_until(lambda: plan_is_active(swarm, 4))
    old = next(iter(swarm.peers.values())).election
    holder, term = old.holder, old.term
    assert holder is not None
    swarm.kill(holder)
    swarm.run_until(lambda: all(p.election.holder not in (None, holder) for p in swarm.peers.values()))
    assert all(p.election.term > term for p in swarm.peers.values())
    swarm.run_until(lambda: plan_is_active(swarm, 3))
    assert next(iter(swarm.peers.values())).follower.number.term > term


def test_a_request_waits_for_a_plan_when_layers_are_uncovered_and_goes_on(swarm: VirtualSwarm) -> None:
    request = swarm.ask("client", PROMPT, 30)
    swarm.run_until(lambda: len(request.tokens) >= 5)
    swarm.kill("c")
    swarm.run_for(3.0)
    assert not request.over
    swarm.join("e", 4)
    swarm.run_until(lambda: request.over)
    assert request.error is None and request.tokens == toy_output(PROMPT, 30)


def test_a_request_that_nobody_can_serve_ends_with_a_sentence(swarm: VirtualSwarm) -> None:
    swarm.kill("c")
    request = swarm.ask("client", PROMPT, 5, RequestConfig(patience_s=10.0))
    swarm.run_until(lambda: request.over)
    assert request.error is not None and "giving up" in str(request.error)


def test_a_partition_elects_two_coordinators_and_the_healed_swarm_keeps_one() -> None:
    swarm = VirtualSwarm(seed=2)
    for name in "abcd":
        swarm.join(name, 6)
    swarm.run_until(lambda: plan_is_active(swarm, 4))
    for left in "ab":
        for right in "cd":
            swarm.cut(left, right)
    swarm.run_until(lambda: len({p.election.holder for p in swarm.peers.values()} - {None}) == 2)
    swarm.run_for(20.0)
    sides = [{swarm.peers[PeerId(name)].election.holder for name in side} for side in ("ab", "cd")]
    assert all(len(side) == 1 for side in sides) and sides[0] != sides[1]
    swarm.cuts.clear()
    swarm.run_until(lambda: len({p.election.holder for p in swarm.peers.values()}) == 1)
    swarm.run_until(lambda: plan_is_active(swarm, 4))


def test_a_peer_that_leaves_finishes_what_it_has_and_is_not_planned_again(swarm: VirtualSwarm) -> None:
    swarm.join("d", 6)
    swarm.run_until(lambda: plan_is_active(swarm, 4))
    request = swarm.ask("client", PROMPT, 40)
    swarm.run_until(lambda: len(request.tokens) >= 3)
    leaver = request.pipelines[0][-1].peer
    swarm._apply(leaver, swarm.peers[leaver].leave(swarm.now))
    swarm.run_until(lambda: request.over)
    assert request.error is None and request.tokens == toy_output(PROMPT, 40)
    assert len(request.pipelines) == 1, "a drain does not disturb sessions in flight"
    swarm.run_until(lambda: swarm.peers[leaver].may_stop(swarm.now))
    others = [peer for name, peer in swarm.peers.items() if name != leaver]

    def left_out() -> bool:
        plans = [peer.follower.plan for peer in others]
        return all(plan is not None and plan.span_of(leaver) is None for plan in plans)

    swarm.run_until(left_out)


def test_many_clients_together_get_their_own_answers(swarm: VirtualSwarm) -> None:
    requests = {n: swarm.ask(f"client-{n}", (*PROMPT, n), 12) for n in range(8)}
    swarm.run_until(lambda: all(request.over for request in requests.values()))
    for n, request in requests.items():
        assert request.tokens == toy_output((*PROMPT, n), 12)


def trace(seed: int) -> str:
    """Everything that happens in a small story, as one digest."""
    swarm = VirtualSwarm(seed)
    for name, room in (("a", 2), ("b", 3), ("c", 4), ("d", 6)):
        swarm.join(name, room)
    request = swarm.ask("client", PROMPT, 20)
    swarm.run_until(lambda: len(request.tokens) >= 5)
    swarm.kill("b")
    swarm.run_until(lambda: request.over)
    lines = [f"{at:.6f} {who} {event.kind} {event.data}" for at, who, event in swarm.events]
    return hashlib.sha256("\n".join([*lines, str(request.tokens), str(request.pipelines)]).encode()).hexdigest()


def test_the_same_seed_gives_the_same_trace_whatever_the_order_of_sets() -> None:
    program = "from tests.core.test_swarm_stories import trace; print(trace(5), trace(6))"
    said = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        said.append(ended.stdout.split())
    assert said[0] == said[1] and said[0][0] != said[0][1]


def test_a_prompt_longer_than_the_context_is_refused_at_once(swarm: VirtualSwarm) -> None:
    with pytest.raises(Exception, match=f"context is {MANIFEST.context_tokens} tokens"):
        swarm.ask("client", tuple(range(600)), 5)

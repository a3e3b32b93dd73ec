"""Random swarms with random deaths, joins and departures: answers are right or fail in words, and nothing leaks."""

from __future__ import annotations

import random

import pytest

from helixnet.core.route.request import Request
from tests.virtual_swarm import WORDS, VirtualSwarm, toy_output

PEERS_LEFT_MIN = 3
FEW_WORDS = 2


def disturb(swarm: VirtualSwarm, rng: random.Random, number: int) -> None:
    """Let time pass, then kill somebody; perhaps somebody joins, perhaps somebody leaves."""
    swarm.run_for(rng.uniform(0.1, 4))
    if len(swarm.peers) > PEERS_LEFT_MIN:
        swarm.kill(rng.choice(sorted(swarm.peers)))
    if rng.random() < 0.3:
        swarm.join(f"n{number}", 6)
    if rng.random() < 0.2:
        leaver = rng.choice(sorted(swarm.peers))
        swarm._apply(leaver, swarm.peers[leaver].leave(swarm.now))


def check(request: Request, words: int) -> None:
    """What came is right, whole, or explained."""
    assert request.tokens == toy_output(request.spec.prompt, len(request.tokens), words=words)
    assert request.error is not None or len(request.tokens) == request.spec.tokens_max


@pytest.mark.parametrize("seed", range(20))
def test_whatever_dies_answers_are_right_and_nothing_leaks(seed: int) -> None:
    """Half of the swarms have a model that says little else than what it said before: drafts come true there."""
    words = FEW_WORDS if seed % 2 else WORDS
    rng, swarm = random.Random(seed), VirtualSwarm(seed, words=words)
    for name in "abcdef":
        swarm.join(name, rng.choice([3, 4, 6]))
    swarm.run_until(lambda: all(peer.follower.active for peer in swarm.peers.values()))
    requests = []
    for number in range(4):
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 200)))
        requests.append(swarm.ask(f"client-{number}", prompt, rng.randrange(1, 60), drafts=rng.choice([0, 4, 15])))
    for number in range(rng.randrange(4)):
        disturb(swarm, rng, number)
    swarm.run_until(lambda: all(request.over for request in requests), 200)
    for request in requests:
        check(request, words)
    swarm.run_for(3)
    for name, peer in swarm.peers.items():
        assert not peer.stage.sessions and not peer.entry.sessions and peer.stage.ledger.used == 0, name
        assert swarm.engines[name].kv == {}, name

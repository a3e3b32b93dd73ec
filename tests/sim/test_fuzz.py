"""Random stories on the real machines: nothing lost, repeated or left behind, and the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helixnet.core.peer import Peer
from helixnet.core.route.request import Request
from helixnet.core.stage.stage import StageMachine
from helixnet.core.types import SessionId
from helixnet.sim.fuzz import fuzz, play, shrink, story
from helixnet.sim.simulation import Simulation

SEEDS, SEEDS_SLOW = 16, 200


def test_random_faults_cost_no_request_and_no_token() -> None:
    assert fuzz(range(SEEDS)) == []


@pytest.mark.slow
def test_many_random_faults_cost_no_request_and_no_token() -> None:
    assert fuzz(range(SEEDS, SEEDS + SEEDS_SLOW)) == []


def test_the_stories_are_stories() -> None:
    """They serve, things go wrong in them, requests live through that, and plans change."""
    tallies = [Simulation(story(seed)).run() for seed in range(6)]
    assert all(tally.requests and all(r.tokens == r.output_tokens for r in tally.requests) for tally in tallies)
    assert sum(tally.retries for tally in tallies) > 0
    assert sum(tally.events.get("plan.active", 0) for tally in tallies) > len(tallies)


def test_ticks_that_are_left_out_would_have_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests() -> list[str]:
        simulations = [Simulation(story(seed)) for seed in range(4)]
        for simulation in simulations:
            simulation.run()
        return [simulation.engine.digest() for simulation in simulations]

    sparing = digests()
    monkeypatch.setattr(Peer, "_is_due", lambda self, now: True)
    assert digests() == sparing


def _digest_elsewhere(hash_seed: int) -> str:
    code = (
        "from helixnet.sim.fuzz import story\n"
        "from helixnet.sim.simulation import Simulation\n"
        "simulation = Simulation(story(3))\n"
        "tally = simulation.run()\n"
        "print(simulation.engine.digest(), sum(tally.gaps_s))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_same_seed_is_the_same_story_in_any_process() -> None:
    assert _digest_elsewhere(1) == _digest_elsewhere(2)


def test_a_token_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a client that takes tokens twice is caught by the very first answer."""
    honest = Request._take

    def twice(self: Request, message: object, now: float) -> object:
        effects = honest(self, message, now)  # type: ignore[arg-type]
        self.tokens.append(self.tokens[-1])
        return effects

    monkeypatch.setattr(Request, "_take", twice)
    assert "undisturbed model" in play(story(0))


def test_a_leak_is_noticed_and_its_story_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that forgets pages when sessions end is caught, with no more faults than it takes."""
    honest = StageMachine.release

    def leaky(self: StageMachine, session: SessionId) -> object:
        pages = self.ledger.used
        effects = honest(self, session)
        self.ledger.used = pages
        return effects

    monkeypatch.setattr(StageMachine, "release", leaky)
    setup = story(1)
    assert "KV pages" in play(setup)
    assert shrink(setup).faults == ()

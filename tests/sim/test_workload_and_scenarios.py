"""Loads have the statistics they claim; scenarios set up what they say."""

from __future__ import annotations

import random
import statistics

import pytest

from helixnet.core.errors import UsageError
from helixnet.core.types import PeerId
from helixnet.sim.faults import Kind, churn
from helixnet.sim.scenarios import SCENARIOS, Options
from helixnet.sim.workload import Conversation, arrivals
from helixnet.sim.world import machine_of

DRAWN = 4_000


def test_conversations_have_the_published_lengths() -> None:
    """Azure 2023 as the Helix paper uses it: 763 prompt and 232 answer tokens on average, correlated by 0.51."""
    rng = random.Random(0)
    asks = [Conversation().draw(rng) for _ in range(DRAWN)]
    prompts, outputs = [a.prompt_tokens for a in asks], [a.output_tokens for a in asks]
    assert statistics.mean(prompts) == pytest.approx(763, rel=0.05)
    assert statistics.mean(outputs) == pytest.approx(232, rel=0.05)
    assert statistics.median(prompts) == pytest.approx(947, rel=0.05)
    assert statistics.correlation(prompts, outputs) == pytest.approx(0.51, abs=0.1)
    assert max(prompts) <= 2047 and min(outputs) >= 7


def test_arrivals_come_at_their_rate_and_not_at_all_at_none() -> None:
    times = list(arrivals(random.Random(0), 2.0, 1_000.0))
    assert len(times) == pytest.approx(2_000, rel=0.1) and times == sorted(times) and times[-1] < 1_000.0
    with pytest.raises(UsageError, match="positive"):
        list(arrivals(random.Random(0), 0.0, 10.0))


def test_whoever_goes_is_replaced_and_comes_back_as_another_peer() -> None:
    machines = [PeerId(f"m{n}") for n in range(12)]
    faults = list(churn(random.Random(0), machines[:10], machines[10:], session_s=100.0, until_s=1_000.0))
    left = [fault for fault in faults if fault.kind is not Kind.JOIN]
    joined = [fault for fault in faults if fault.kind is Kind.JOIN]
    assert len(left) == len(joined) == pytest.approx(100, rel=0.4), "ten peers, ten sessions each"
    assert {machine_of(fault.peer) for fault in joined} <= set(machines)
    names = [fault.peer for fault in joined]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_a_scenario_is_the_same_for_the_same_seed_and_takes_what_a_person_asks(name: str) -> None:
    options = Options(seed=3, peers=8, seconds=90.0, per_s=0.25)
    one, other = SCENARIOS[name].build(options), SCENARIOS[name].build(options)
    assert one.peers == other.peers and len(one.peers) == 8 and one.faults == other.faults
    assert one.seconds == 90.0 and one.load.per_s == 0.25 and SCENARIOS[name].about
    ours, theirs = one.world.path(*one.peers[:2]), other.world.path(*one.peers[:2])
    assert ours == theirs and ours.bandwidth > 0

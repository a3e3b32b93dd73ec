"""Parts of paper mode by themselves: loads, routers, what is read of the artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import OUTSIDE
from helixnet.sim.paper.feeder import Arrival, Constant, FillKv, Trace, arrivals_of
from helixnet.sim.paper.instance import BatchLimits, flows_of, read_instance
from helixnet.sim.paper.run import Windows, simulate
from tests.planner.small_artifact import write
from tests.sim.tiny_paper import LENGTHS, SQUARE, STAGES, artifact, files, instance, setup


def test_a_constant_load_keeps_its_number_under_way(tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, Constant(LENGTHS, 6), windows=Windows(5.0, 55.0)), 0)
    assert 4.0 < outcome.in_flight_mean <= 6.0  # each is followed by the next a tenth of a second later
    assert outcome.finished < outcome.launched <= outcome.finished + 6


def test_a_filling_load_stops_where_memory_is_expected_to_be_full_enough(tmp_path: Path) -> None:
    low, high = (simulate(setup(tmp_path, FillKv(LENGTHS, 4, share)), 0) for share in (0.5, 3.0))
    assert low.in_flight_mean < high.in_flight_mean
    assert low.decode_tokens_per_s > 0


def test_online_arrivals_average_what_was_asked_for(tmp_path: Path) -> None:
    trace = artifact(tmp_path).trace()
    arrivals = arrivals_of(trace, 100.0, 3000.0, 0)
    assert sum(each.input_tokens + each.output_tokens for each in arrivals) / 3000 == pytest.approx(100, rel=0.05)
    assert [each.at_s for each in arrivals] == sorted(each.at_s for each in arrivals)
    assert arrivals == arrivals_of(trace, 100.0, 3000.0, 0) != arrivals_of(trace, 100.0, 3000.0, 1)
    with pytest.raises(UsageError, match="sorted"):
        Trace((Arrival(1.0, 1, 1), Arrival(0.0, 1, 1)))


def test_profiles_are_read_by_tokens_and_layers_held(tmp_path: Path) -> None:
    read = instance(tmp_path)
    profile = read.profiles["BIG"]
    assert profile.prompt_s[30] == pytest.approx(0.003)
    assert profile.decode_s[:5] == pytest.approx((0.0, 0.004, 0.004, 0.005, 0.006))
    assert profile.limits_for(9) == BatchLimits(prompts=2, prompt_tokens=40, decodes=4, context=150)
    assert read.link((OUTSIDE, 0)) == read.link((2, OUTSIDE)) == (100_000, 0.001)
    assert read.link((0, 2)) == (1_000_000, 0.002)
    assert read.bytes_per_token((OUTSIDE, 0)) == 2
    assert read.bytes_per_token((0, 2)) == 102
    assert read.kv_token_layers(0, 3) == 960


def test_a_profile_without_limits_of_batches_gets_a_sentence(tmp_path: Path) -> None:
    made = files()
    del made["profiles.json"]["models"]["tiny"]["types"]["BIG"]["decode_max_tokens"]
    with pytest.raises(UsageError, match="limits of batches"):
        read_instance(Artifact(write(tmp_path, made)), "square", "tiny")


def test_the_flow_is_the_largest_and_can_be_held_to_what_passed_each_machine(tmp_path: Path) -> None:
    problem = instance(tmp_path).problem
    flows = flows_of(problem, STAGES)
    assert set(flows) == set(SQUARE)
    assert sum(flow for (tail, _), flow in flows.items() if tail == OUTSIDE) == pytest.approx(60.0)
    held = flows_of(problem, STAGES, {0: 30.0, 1: 10.0, 2: 25.0, 3: 15.0})
    assert held[OUTSIDE, 0] == pytest.approx(30.0)
    assert held[3, OUTSIDE] == pytest.approx(15.0)


def test_swarm_and_least_latency_turn_to_the_machine_that_answers_sooner(tmp_path: Path) -> None:
    slow = setup(tmp_path, Constant(LENGTHS, 8), router="swarm", windows=Windows(0.0, 120.0))
    slow.instance.links.entry_s[1] = 0.5
    for router in ("swarm", "min_latency"):
        outcome = simulate(replace(slow, router=router), 0)
        assert outcome.hop_tokens[OUTSIDE, 0] > 2 * outcome.hop_tokens[OUTSIDE, 1] > 0
    even = simulate(replace(slow, router="random"), 0)
    assert even.hop_tokens[OUTSIDE, 0] == pytest.approx(even.hop_tokens[OUTSIDE, 1], rel=0.15)

"""The paper's system on a made-up instance: times checked by hand, nothing lost, memory kept, shares followed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helixnet.core.errors import UsageError
from helixnet.core.types import Span
from helixnet.planner.flow import OUTSIDE
from helixnet.sim.paper.admission import Admission
from helixnet.sim.paper.feeder import Arrival, Constant, FillKv, Trace
from helixnet.sim.paper.machines import CONCATENATES_BYTES_PER_S, COPIES_BYTES_PER_S
from helixnet.sim.paper.routers import ROUTERS
from helixnet.sim.paper.run import Windows, simulate
from tests.sim.tiny_paper import CHAIN, KV_TOKENS, LENGTHS, SQUARE, requests, setup

UNPACK_S = 100 * (1 / CONCATENATES_BYTES_PER_S + 1 / COPIES_BYTES_PER_S)
"""Of one token's activation."""
PROMPT_S = (0.0004 + 0.001) + (0.00204 + 0.002) + (0.0004 + 0.001) + 2 * (3 * 0.002 + 20 * UNPACK_S)
"""20 tokens: source link, link between machines, sink link; two machines of three layers."""
DECODE_S = (0.00002 + 0.001) + (0.000102 + 0.002) + (0.00002 + 0.001) + 2 * (3 * 0.004 + UNPACK_S)


def test_a_lone_request_takes_the_time_of_its_links_and_layers(tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, Trace((Arrival(1.0, 20, 2),)), flows=CHAIN), 0)
    assert outcome.prompt_s.mean == pytest.approx(PROMPT_S)
    assert outcome.ttft_s.mean == pytest.approx(PROMPT_S)
    assert outcome.decode_s.mean == pytest.approx(DECODE_S)
    assert outcome.tpot_s.mean == pytest.approx(DECODE_S)
    assert (outcome.finished, outcome.decoded, outcome.hops_mean) == (1, 2, 2.0)
    assert outcome.decode_tokens_per_s == pytest.approx(2 / 60)
    assert outcome.hop_tokens == dict.fromkeys(CHAIN, 22)


def test_prompts_are_batched_up_to_the_limits_and_wait_beyond(tmp_path: Path) -> None:
    three = Trace(tuple(Arrival(0.0, 20, 1) for _ in range(3)))
    outcome = simulate(setup(tmp_path, three, flows=CHAIN), 0)
    first = (0.0004 + 0.001) + 3 * 0.002 + 20 * UNPACK_S  # the other two are there when it is through
    then = first + 3 * 0.004 + 40 * UNPACK_S
    there = then + 0.00204 + 0.002  # where the second starts alone, for they are sent one after the other
    assert outcome.prompt_s.at(99) == pytest.approx(there + 2 * (3 * 0.002 + 20 * UNPACK_S) + 0.0014, rel=0.01)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_token_asked_for_comes_and_all_memory_is_given_back(router: str, tmp_path: Path) -> None:
    feed = requests(60, apart_s=0.02)
    outcome = simulate(setup(tmp_path, feed, router=router), 1)
    assert outcome.launched == outcome.finished == 60
    assert outcome.decoded == sum(each.output_tokens for each in feed.arrivals)
    assert outcome.rejected == outcome.impossible == 0
    passed = sum(each.input_tokens + each.output_tokens for each in feed.arrivals)
    assert sum(tokens for (tail, _), tokens in outcome.hop_tokens.items() if tail == OUTSIDE) == passed
    assert sum(tokens for (_, head), tokens in outcome.hop_tokens.items() if head == OUTSIDE) == passed
    later = simulate(setup(tmp_path, feed, router=router, windows=Windows(59.0, 1.0)), 1)
    assert later.kv_share == 0.0
    assert later.in_flight_mean == 0.0


@pytest.mark.parametrize("router", ROUTERS)
def test_kv_memory_never_overflows_however_many_come(router: str, tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, Constant(LENGTHS, 200), router=router), 2)
    assert outcome.waited > 0
    assert 0.9 < outcome.kv_peak_share <= 1.0
    assert outcome.finished > 300


def test_a_window_lasts_as_many_lives_as_asked(tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, Constant(LENGTHS, 6), windows=Windows(1.0, 1.0, lives=40.0)), 3)
    life_s = outcome.prompt_s.mean + sum(output for _, output in LENGTHS) / len(LENGTHS) * outcome.decode_s.mean
    assert outcome.life_s == pytest.approx(life_s)
    assert 39.5 * life_s < outcome.measured_s < 41.0 * life_s
    assert outcome.decode_tokens_per_s == pytest.approx(outcome.decode_s.count / outcome.measured_s)
    same = simulate(setup(tmp_path, Constant(LENGTHS, 6), windows=Windows(1.0, outcome.measured_s)), 3)
    assert same.decode_s == outcome.decode_s, "measuring longer changes nothing before"


def test_iwrr_sends_along_each_edge_its_part_of_the_flow(tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, FillKv(LENGTHS), windows=Windows(0.0, 300.0)), 3)
    total = outcome.hop_tokens[OUTSIDE, 0] + outcome.hop_tokens[OUTSIDE, 1]
    assert total > 20_000
    for edge, flow in SQUARE.items():
        assert outcome.hop_tokens[edge] / total == pytest.approx(flow / 40.0, rel=0.02)


def test_our_own_iwrr_keeps_the_same_shares_by_requests(tmp_path: Path) -> None:
    outcome = simulate(setup(tmp_path, Constant(((20, 5),), 8), router="iwrr_core", windows=Windows(0.0, 300.0)), 3)
    total = outcome.hop_tokens[OUTSIDE, 0] + outcome.hop_tokens[OUTSIDE, 1]
    for edge, flow in SQUARE.items():
        assert outcome.hop_tokens[edge] / total == pytest.approx(flow / 40.0, rel=0.02)


def test_edges_with_next_to_no_flow_are_left_out(tmp_path: Path) -> None:
    flows = SQUARE | {(OUTSIDE, 0): 39.0, (OUTSIDE, 1): 1.0, (1, 2): 0.0}
    outcome = simulate(setup(tmp_path, requests(20), flows=flows), 0)
    assert outcome.finished == 20
    assert (OUTSIDE, 1) not in outcome.hop_tokens
    assert outcome.hop_sessions[OUTSIDE, 0] == 20


def test_machines_expected_to_be_full_get_no_more_and_requests_are_turned_away_or_wait(tmp_path: Path) -> None:
    tight = Admission(kv_share=0.9, output_share=0.0)
    away = simulate(setup(tmp_path, requests(60), flows=CHAIN, admission=tight), 0)
    assert away.rejected > 0
    assert away.finished == 60 - away.rejected
    assert away.kv_peak_share <= 1.0
    patient = simulate(setup(tmp_path, requests(60), flows=CHAIN, admission=replace(tight, waits=True)), 0)
    assert (patient.rejected, patient.finished) == (0, 60)
    assert patient.ttft_s.mean > patient.prompt_s.mean


def test_a_request_longer_than_any_way_has_room_for_is_impossible_and_holds_up_nobody(tmp_path: Path) -> None:
    feed = Trace((Arrival(0.0, 40, KV_TOKENS), Arrival(0.0, 40, 5)))
    outcome = simulate(setup(tmp_path, feed), 0)
    assert (outcome.impossible, outcome.finished) == (1, 1)
    waits = Admission(kv_share=0.1, output_share=0.0, waits=True)  # 40 tokens are more than a tenth of 320
    nobody = simulate(setup(tmp_path, requests(2), flows=CHAIN, admission=waits), 0)
    assert (nobody.impossible, nobody.finished) == (0, 2)
    held = simulate(setup(tmp_path, Trace((Arrival(0.0, 40, 5), Arrival(0.1, 20, 5))), admission=waits), 0)
    assert (held.impossible, held.finished) == (1, 1)


def test_requests_enter_a_span_in_the_middle_and_hold_memory_for_what_they_run(tmp_path: Path) -> None:
    spans = (Span(0, 2), None, Span(0, 4), Span(4, 6))
    flows = {(OUTSIDE, 0): 20.0, (OUTSIDE, 2): 10.0, (0, 2): 20.0, (2, 3): 30.0, (3, OUTSIDE): 30.0}
    linked = setup(tmp_path, requests(60, apart_s=0.02), flows=flows)
    linked.instance.links.bandwidth[2, 3] = 1_000_000.0
    outcome = simulate(replace(linked, spans=spans), 0)
    assert outcome.finished == 60
    assert 2.0 < outcome.hops_mean < 3.0
    lone = replace(linked, spans=spans, feed=Trace((Arrival(0.0, 20, 2),)), windows=Windows(0.0, 1.0))
    only = {edge: flow for edge, flow in flows.items() if edge != (OUTSIDE, 2)}
    run = simulate(replace(lone, flows=only), 0)
    layers_s = (2 + 2 + 2) * 0.002  # the second machine runs two of its four
    links_s = (0.0004 + 0.001) * 2 + 0.00204 * 2 + 0.002 + linked.instance.links.latency_s[2, 3]
    assert run.prompt_s.mean == pytest.approx(layers_s + links_s + 2 * 20 * UNPACK_S, rel=0.001)


def test_what_does_not_fit_together_gets_a_sentence(tmp_path: Path) -> None:
    good = setup(tmp_path, requests(1))
    for bad, word in (
        (replace(good, router="best"), "no router"),
        (replace(good, spans=good.spans[:3]), "4 machines"),
        (replace(good, flows=SQUARE | {(0, 1): 1.0}), "not held"),
        (replace(good, flows=SQUARE | {(0, OUTSIDE): 1.0}), "not held"),
        (replace(good, flows=SQUARE | {(0, 7): 1.0}), "does not join"),
        (replace(good, spans=(*good.spans[:3], Span(4, 6)), flows=CHAIN | {(0, 3): 1.0}), "not held"),
        (replace(good, feed=Trace((Arrival(0.0, 41, 1),))), "41 tokens"),
    ):
        with pytest.raises(UsageError, match=word):
            simulate(bad, 0)


SAME = """
import sys
from pathlib import Path
from helixnet.sim.paper.feeder import Constant
from helixnet.sim.paper.run import Windows, simulate
from tests.sim.tiny_paper import LENGTHS, setup
for router in ("iwrr", "swarm", "random", "min_latency"):
    outcome = simulate(setup(Path(sys.argv[1]), Constant(LENGTHS, 20), router=router, windows=Windows(1.0, 5.0)), 7)
    print(outcome.digest, outcome)
"""


def test_a_seed_gives_the_same_in_every_process(tmp_path: Path) -> None:
    said = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        command = [sys.executable, "-c", SAME, str(tmp_path)]
        said.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(said) == 1
    assert len(set(said.pop().splitlines())) == 4


def test_other_seeds_draw_other_requests(tmp_path: Path) -> None:
    one, other = (simulate(setup(tmp_path, Constant(LENGTHS, 5)), seed) for seed in (1, 2))
    assert one.digest != other.digest

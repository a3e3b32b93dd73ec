"""The prediction moves the right way, and orders the paper's published placements as their simulations did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helixnet.core.types import Span
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.predict import Forecast, forecast
from helixnet.planner.problem import Problem, Spans, from_snapshot
from helixnet.planner.served import served
from tests.planner.small_artifact import FOLDER, needs_data
from tests.planner.small_swarms import loopback_swarm

HALVES: Spans = (Span(0, 15), Span(15, 30), Span(0, 15), Span(15, 30))


@pytest.fixture
def problem() -> Problem:
    return from_snapshot(loopback_swarm(900, 900, 900, 900))


def outlook(problem: Problem, spans: Spans = HALVES, model: CapacityModel = CapacityModel.EXACT) -> Forecast:
    return forecast(problem, spans, max_flow(problem, spans, model))


def with_kv(problem: Problem, share: float) -> Problem:
    peers = tuple(
        replace(peer, kv_token_layers=tuple(int(room * share) for room in peer.kv_token_layers), kv_first=0, kv_last=0)
        for peer in problem.peers
    )
    return replace(problem, peers=peers)


def in_pieces(problem: Problem, count: float) -> Problem:
    peers = tuple(replace(peer, piece_s=peer.prefill_s / count) for peer in problem.peers)
    return replace(problem, peers=peers, chunks=count)


def test_the_rate_falls_with_the_kv_room(problem: Problem) -> None:
    found = [outlook(with_kv(problem, share)) for share in (1.0, 0.1, 0.05, 0.02)]
    assert found[-1].kv_limited
    assert not outlook(replace(with_kv(problem, 100.0), sessions_max=100_000)).kv_limited
    rates = [each.tokens_per_s for each in found]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    assert outlook(with_kv(problem, 0.0)).tokens_per_s == 0


def test_the_rate_falls_when_hops_slow_down(problem: Problem) -> None:
    rates, seconds, first = [], [], []
    for slower_s in (0.0, 0.1, 0.5, 2.0):
        far = replace(problem, link_s=problem.link_s + slower_s, prompt_link_s=problem.prompt_link_s + slower_s)
        rates.append(outlook(far).tokens_per_s)
        seconds.append(outlook(far).tpot_s)
        first.append(outlook(far).ttft_s)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    # Two spans: from the entry to the exit, and back again.
    assert seconds[-1] == pytest.approx(seconds[0] + 2 * 2.0)
    # The entry asks the exit for room and hears of it, the prompt goes there, the first token comes back.
    assert first[-1] == pytest.approx(first[0] + 4 * 2.0)


def test_a_token_goes_back_to_where_its_request_came_in(problem: Problem) -> None:
    """Whole models on two peers far apart: nothing ever crosses between them."""
    whole: Spans = (Span(0, 30), Span(0, 30), None, None)
    far = replace(problem, link_s=problem.link_s + 5.0 * (1 - np.eye(len(problem.peers))))
    assert outlook(far, whole).tpot_s == pytest.approx(outlook(problem, whole).tpot_s)
    assert outlook(far, whole).tpot_s < 5.0


def test_pieces_of_a_prompt_follow_each_other_through_the_stages(problem: Problem) -> None:
    """Alone, a prompt in one piece takes every stage's whole time; in many, hardly more than the slowest stage's."""
    whole, pieces = outlook(in_pieces(problem, 1.0)), outlook(in_pieces(problem, 64.0))
    assert pieces.ttft_s == pytest.approx(whole.ttft_s / 2, rel=0.05), "two stages of fifteen layers"


def test_stages_admit_each_their_own_number_of_requests(problem: Problem) -> None:
    roomy = replace(with_kv(problem, 100.0), sessions_max=7)
    one_chain: Spans = (Span(0, 15), Span(15, 30), None, None)
    assert outlook(roomy, one_chain).sessions == 7
    assert served(roomy, HALVES, CapacityModel.EXACT)[1].sessions == 14, "two holders of each layer"


def test_a_stage_lets_only_whole_requests_in(problem: Problem) -> None:
    one_chain: Spans = (Span(0, 15), Span(15, 30), None, None)
    room = 15 * problem.session_tokens
    for tokens, requests in ((3 * room, 3), (4 * room - 1, 3), (4 * room, 4)):
        peers = tuple(
            replace(peer, kv_token_layers=(tokens,) * len(peer.kv_token_layers), kv_first=0, kv_last=0)
            for peer in problem.peers
        )
        assert outlook(replace(problem, peers=peers), one_chain).sessions == requests


def test_the_rate_falls_when_prompts_come_in_fewer_larger_pieces(problem: Problem) -> None:
    slow = replace(problem, prompt_link_s=problem.link_s + 3.0, convoys=True)
    rates = [outlook(in_pieces(slow, chunks)).tokens_per_s for chunks in (16.0, 4.0, 2.0, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.7 * rates[0]
    free = [outlook(in_pieces(replace(slow, convoys=False), chunks)).tokens_per_s for chunks in (16.0, 1.0)]
    assert free[0] == free[1] >= rates[0], "where decode steps overtake prompts, pieces hold nobody up"


def test_the_rate_never_exceeds_the_flow_or_what_is_in_flight(problem: Problem) -> None:
    for share in (1.0, 0.3, 0.05):
        kept = with_kv(problem, share)
        found = outlook(kept)
        assert found.tokens_per_s <= max_flow(kept, HALVES, CapacityModel.EXACT).tokens_per_s * (1 + 1e-9)
        assert found.tokens_per_s <= found.sessions / found.tpot_s * (1 + 1e-9)


def test_half_the_admitted_requests_serve_less(problem: Problem) -> None:
    rates = [outlook(replace(problem, sessions_max=most)).tokens_per_s for most in (64, 16, 4, 1)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]


@needs_data
@pytest.mark.parametrize("model", CapacityModel)
def test_published_placements_come_out_in_the_order_of_their_simulations(model: CapacityModel) -> None:
    artifact, rates = Artifact(FOLDER), {}
    for instance in ("single24", "3cluster24"):
        problem, stored = artifact.problem(instance, "llama70b"), artifact.stored(instance, "llama70b")
        for method in ("helix-milp", "petals", "swarm"):
            rates[instance, method] = served(problem, stored[method], model)[1].tokens_per_s
    near = [rates["single24", method] for method in ("helix-milp", "petals", "swarm")]
    assert near == sorted(near, reverse=True)
    assert rates["3cluster24", "helix-milp"] > rates["3cluster24", "petals"]
    assert rates["3cluster24", "helix-milp"] > rates["3cluster24", "swarm"]
    assert 200 < rates["single24", "helix-milp"] < 300  # simulated: 252.1
    assert 75 < rates["3cluster24", "helix-milp"] < 125  # simulated: 98.0

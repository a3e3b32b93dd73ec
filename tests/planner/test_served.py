"""Where KV memory limits, flow goes where there is room for requests, and more is served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec
import pytest

from helixnet.core.types import Span
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.predict import forecast
from helixnet.planner.problem import Problem, Spans, from_snapshot
from helixnet.planner.random_swarm import geography
from helixnet.planner.replan import MOVED_MAX
from helixnet.planner.served import at_pace, by_room, planned_routing, served, usual_pace
from helixnet.planner.solve import Budget, place
from helixnet.planner.starts import starts
from tests.planner.small_swarms import loopback_swarm

SHORT = Budget(work=200, work_per_peer=0, flow_work=80_000_000, flow_work_per_peer=0, laying_work=10_000_000)
HALVES: Spans = (Span(0, 15), Span(15, 30), Span(0, 15), Span(15, 30))


def uneven(slowdown: float = 4.0) -> Problem:
    """Four peers alike, but for two that are slower and have room for ten requests, where the others have for two."""
    problem = from_snapshot(loopback_swarm(900, 900, 900, 900))
    peers = []
    for number, peer in enumerate(problem.peers):
        slower, requests = (slowdown, 10) if number < 2 else (1.0, 2)
        room = requests * 15 * problem.session_tokens
        peers.append(
            replace(
                peer,
                capacity=tuple(rate / slower for rate in peer.capacity),
                batch_rate=tuple(rate / slower for rate in peer.batch_rate),
                decode_s=peer.decode_s * slower,
                kv_token_layers=(room,) * len(peer.kv_token_layers),
                kv_first=0,
                kv_last=0,
            )
        )
    # Hops of a second: what is served is what is in flight.
    return replace(problem, peers=tuple(peers), link_s=problem.link_s + 1.0, prompt_link_s=problem.prompt_link_s + 1.0)


def test_flow_follows_kv_room_where_that_limits() -> None:
    problem = uneven()
    plain = forecast(problem, HALVES, max_flow(problem, HALVES, CapacityModel.EXACT))
    routing, outlook = served(problem, HALVES, CapacityModel.EXACT)
    assert plain.kv_limited
    assert outlook.tokens_per_s > 1.5 * plain.tokens_per_s
    assert outlook.sessions == pytest.approx(12)
    assert routing.loads[0] > 3 * routing.loads[2], "the slow peers with much room do most"


def test_flow_is_left_alone_where_there_is_room_for_everybody() -> None:
    problem = replace(from_snapshot(loopback_swarm(900, 900, 900, 900)), sessions_max=100_000)
    peers = tuple(replace(peer, kv_token_layers=(10**9,) * len(peer.kv_token_layers)) for peer in problem.peers)
    roomy = replace(problem, peers=peers)
    routing, outlook = served(roomy, HALVES, CapacityModel.EXACT)
    assert not outlook.kv_limited
    assert routing.edges == max_flow(roomy, HALVES, CapacityModel.EXACT).edges


def test_no_peer_is_sent_more_requests_than_it_has_room_for() -> None:
    problem = uneven()
    routing, outlook = served(problem, HALVES, CapacityModel.EXACT)
    for peer, span, load in zip(problem.peers, HALVES, routing.loads, strict=True):
        assert span is not None
        there = outlook.sessions * load / routing.tokens_per_s * problem.session_tokens
        assert there <= peer.kv_room(span, problem.layers) * (1 + 1e-9)


@pytest.mark.parametrize("slowdown", [1.0, 2.0, 4.0, 16.0])
def test_what_is_planned_serves_as_much_as_what_a_search_saw(slowdown: float) -> None:
    problem = uneven(slowdown)
    planned = forecast(problem, HALVES, planned_routing(problem, HALVES, CapacityModel.EXACT))
    assert planned.tokens_per_s >= 0.99 * served(problem, HALVES, CapacityModel.EXACT)[1].tokens_per_s


def test_a_slow_pace_leaves_only_kv_room_and_a_fast_one_only_compute() -> None:
    problem = uneven()
    slow, fast = (max_flow(at_pace(problem, HALVES, pace), HALVES, CapacityModel.EXACT) for pace in (1e-3, 1e6))
    assert slow.tokens_per_s == pytest.approx(12 * 1e-3)
    assert fast.edges == max_flow(problem, HALVES, CapacityModel.EXACT).edges


# --- large swarms -----------------------------------------------------------------------------------


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixnet.planner.served.CHOICE_PEERS_MAX", 20)


def homes(peers: int = 40) -> Problem:
    """Random homes and data centres, where KV memory is what is short."""
    return from_snapshot(geography(3, peers, 4, 0.5, "llama-3.1-70b").snapshot())


def rates(problem: Problem, placements: Iterable[Spans]) -> list[float]:
    return [served(problem, spans, CapacityModel.EXACT)[1].tokens_per_s for spans in placements]


@pytest.mark.parametrize("large_from", [20, 200])
def test_placements_are_found_for_kv_room_too(large_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixnet.planner.served.CHOICE_PEERS_MAX", large_from)
    problem = homes()
    budget = msgspec.structs.replace(SHORT, work=20_000)
    # So short a search may end where it began; which seeds' do depends on how this CPU rounds sums.
    placed = [place(problem, seed, budget) for seed in range(4)]
    assert max(rates(problem, placed)) > 1.2 * max(rates(problem, starts(problem)))
    assert all(planned_routing(problem, spans, CapacityModel.EXACT).tokens_per_s > 0 for spans in placed)


@pytest.mark.usefixtures("small_is_large")
def test_what_is_held_stays_where_something_new_is_hardly_better() -> None:
    problem = homes()
    spans = place(problem, 0, SHORT)
    holding = replace(
        problem, peers=tuple(replace(peer, held=span) for peer, span in zip(problem.peers, spans, strict=True))
    )
    moved = sum(had != has for had, has in zip(spans, place(holding, 1, SHORT), strict=True))
    assert moved <= MOVED_MAX * len(spans)


def test_nobody_carries_more_than_the_requests_it_has_room_for_at_a_usual_pace() -> None:
    problem = homes()
    pace = usual_pace(problem)
    for plain, peer in zip(problem.peers, by_room(problem).peers, strict=True):
        for length in range(1, max(peer.layers_max) + 1):
            requests = peer.kv_token_layers[length] / (length * problem.session_tokens)
            assert peer.capacity[length] <= plain.capacity[length]
            assert peer.capacity[length] <= requests * length * pace * problem.flow_per_token * (1 + 1e-9)
    assert by_room(problem) is by_room(problem)
    assert pace < 1 / (problem.layers * min(peer.decode_s for peer in problem.peers))

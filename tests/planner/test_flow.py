from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from helixnet.core.plan.snapshot import PeerView, Snapshot
from helixnet.core.types import PeerId, Span
from helixnet.planner import flow, prices
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.flow import OUTSIDE, CapacityModel, Edge, Routing, edge_count, edges_of, layers_run, max_flow
from helixnet.planner.problem import Problem, Spans, from_snapshot
from tests.planner.small_swarms import MB, capability, manifest, random_swarm


def random_spans(problem: Problem, seed: int) -> Spans:
    rng = random.Random(seed)
    spans: list[Span | None] = []
    for _ in problem.peers:
        start = rng.choice((0, rng.randrange(problem.layers)))
        stop = rng.choice((problem.layers, rng.randrange(start, problem.layers) + 1))
        spans.append(Span(start, stop) if rng.random() < 0.9 else None)
    return tuple(spans)


def brute_force_cut(problem: Problem, spans: Spans) -> float:
    """The smallest cut of the paper's graph: try every way to put each half of each peer on either side."""
    held = [i for i, span in enumerate(spans) if span is not None]
    edges = edges_of(problem, spans)
    smallest = float("inf")
    for sides in itertools.product((False, True), repeat=2 * len(held)):
        source_side = {("in", i): sides[2 * n] for n, i in enumerate(held)}
        source_side |= {("out", i): sides[2 * n + 1] for n, i in enumerate(held)}
        cut = 0.0
        for i in held:
            span = spans[i]
            assert span is not None
            if source_side["in", i] and not source_side["out", i]:
                cut += problem.peers[i].tokens_per_s(len(span))
        for edge in edges:
            leaves = edge[0] == OUTSIDE or source_side["out", edge[0]]
            arrives = edge[1] == OUTSIDE or not source_side["in", edge[1]]
            if leaves and arrives:
                cut += float("inf") if OUTSIDE in edge else float(problem.link_tokens_per_s[edge])
        smallest = min(smallest, cut)
    return smallest


def check(problem: Problem, spans: Spans, routing: Routing) -> None:
    """Flow is conserved and keeps to every link and every peer."""
    incoming = [0.0] * len(spans)
    outgoing = [0.0] * len(spans)
    allowed = set(edges_of(problem, spans))
    for edge, rate in routing.edges.items():
        assert edge in allowed
        assert rate > 0
        if edge[1] != OUTSIDE:
            incoming[edge[1]] += rate
        if edge[0] != OUTSIDE:
            outgoing[edge[0]] += rate
        if OUTSIDE not in edge:
            assert rate <= float(problem.link_tokens_per_s[edge]) * (1 + 1e-6)
    tolerance = 1e-4 * routing.tokens_per_s  # edges that are only rounding were dropped
    assert incoming == pytest.approx(outgoing, abs=tolerance)
    for index, span in enumerate(spans):
        assert span is not None or incoming[index] == 0


@pytest.mark.parametrize("seed", range(60))
def test_the_papers_max_flow_is_the_smallest_cut(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, peers=4, layers=6))
    spans = random_spans(problem, seed)
    smallest = brute_force_cut(problem, spans)
    reference = max_flow(problem, spans, CapacityModel.PAPER, final=True)
    program = max_flow(problem, spans, CapacityModel.PAPER)
    expected = 0.0 if smallest == float("inf") else smallest
    assert reference.tokens_per_s == pytest.approx(expected, rel=1e-6)
    assert program.tokens_per_s == pytest.approx(expected, rel=1e-3)
    check(problem, spans, reference)
    check(problem, spans, program)


@pytest.mark.parametrize("seed", range(60))
def test_the_exact_model_carries_at_least_the_papers_flow_within_every_capacity(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, peers=5, layers=8))
    spans = random_spans(problem, seed)
    quick = max_flow(problem, spans, CapacityModel.EXACT)
    final = max_flow(problem, spans, CapacityModel.EXACT, final=True)
    assert quick.tokens_per_s >= max_flow(problem, spans, CapacityModel.PAPER).tokens_per_s * 0.999
    assert final.tokens_per_s == pytest.approx(quick.tokens_per_s, rel=5e-3)
    for routing in (quick, final):
        check(problem, spans, routing)
        for index, load in enumerate(routing.loads):
            span = spans[index]
            assert load <= (problem.peers[index].capacity[len(span)] * (1 + 1e-6) if span else 0)


@pytest.mark.parametrize("final", [False, True], ids=["quick", "final"])
@pytest.mark.parametrize("lengths", [2, 8], ids=["equal spans", "hardly any"])
@pytest.mark.parametrize("seed", range(20))
def test_a_program_that_takes_edges_in_finds_the_same_flow(
    seed: int, lengths: int, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = from_snapshot(random_swarm(seed, peers=24, layers=lengths))
    spans = random_spans(problem, seed)
    whole = max_flow(problem, spans, CapacityModel.EXACT, final=final)
    monkeypatch.setattr(flow, "EDGES_AT_ONCE", 0)
    monkeypatch.setattr(flow, "EDGES_FIRST", 1)
    for _ in range(2):  # the second time from the prices of the first
        grown = max_flow(problem, spans, CapacityModel.EXACT, final=final)
        assert grown.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=2e-3)
        check(problem, spans, grown)
        for index, load in enumerate(grown.loads):
            span = spans[index]
            assert load <= (problem.peers[index].capacity[len(span)] * (1 + 1e-6) if span else 0)


@pytest.mark.parametrize("seed", range(10))
def test_prices_of_other_spans_do_not_change_the_flow(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = from_snapshot(random_swarm(seed, peers=24, layers=8))
    wholes = [max_flow(problem, random_spans(problem, n), CapacityModel.EXACT).tokens_per_s for n in range(4)]
    monkeypatch.setattr(flow, "EDGES_AT_ONCE", 0)
    monkeypatch.setattr(prices, "CHANGED_MAX", 1.0)
    grown = [max_flow(problem, random_spans(problem, n), CapacityModel.EXACT).tokens_per_s for n in range(4)]
    assert grown == pytest.approx(wholes, rel=2e-3)


def test_a_request_may_enter_a_span_at_any_layer_it_holds_and_runs_it_to_its_end() -> None:
    problem = from_snapshot(random_swarm(1, peers=3, layers=6))
    spans = (Span(0, 3), Span(1, 6), Span(3, 6))
    edges = edges_of(problem, spans)
    assert sorted(edges) == [(OUTSIDE, 0), (0, 1), (0, 2), (1, OUTSIDE), (2, OUTSIDE)]
    runs: dict[Edge, int] = {edge: layers_run(spans, edge) for edge in edges}
    assert runs[OUTSIDE, 0] == runs[0, 1] == runs[0, 2] == 3


@pytest.mark.parametrize("seed", range(10))
def test_edges_are_counted_without_being_made(seed: int) -> None:
    problem = from_snapshot(random_swarm(seed, peers=9, layers=6))
    spans = random_spans(problem, seed)
    assert edge_count(problem, spans) == len(edges_of(problem, spans))


def test_layers_held_in_reserve_cost_the_exact_model_nothing() -> None:
    problem = from_snapshot(random_swarm(3, peers=2, layers=6, wide_links=True))
    lean = max_flow(problem, (Span(0, 3), Span(3, 6)), CapacityModel.EXACT).tokens_per_s
    spare = max_flow(problem, (Span(0, 3), Span(2, 6)), CapacityModel.EXACT).tokens_per_s
    paper = max_flow(problem, (Span(0, 3), Span(2, 6)), CapacityModel.PAPER).tokens_per_s
    assert spare == pytest.approx(lean, rel=0.01)
    assert paper <= lean


def test_without_a_chain_from_end_to_end_nothing_flows() -> None:
    problem = from_snapshot(random_swarm(1, peers=2, layers=6))
    for spans in ((Span(0, 2), Span(3, 6)), (None, Span(3, 6)), (None, None)):
        for model in CapacityModel:
            for final in (False, True):
                assert max_flow(problem, spans, model, final=final).tokens_per_s == 0


def test_equal_peers_side_by_side_share_the_flow() -> None:
    problem = from_snapshot(random_swarm(5, peers=3, layers=6, wide_links=True))
    alike = problem.peers[0]
    slow = replace(problem.peers[0], capacity=tuple(c / 4 for c in alike.capacity))
    equal = replace(problem, peers=(slow, alike, alike))
    routing = max_flow(equal, (Span(0, 3), Span(3, 6), Span(3, 6)), CapacityModel.EXACT, final=True)
    assert set(routing.edges) >= {(0, 1)}
    assert routing.tokens_per_s == pytest.approx(slow.capacity[3] / 3, rel=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_where_all_peers_just_fit(seed: int) -> None:
    # Both sides of the bound are then equal but for rounding, at every flow.
    rng = random.Random(seed)
    model = manifest(layers=6, end_mb=0.0)
    memory_mb = (2 * model.layer_bytes + 2 * 512 * model.kv_bytes) / MB
    peers = tuple(
        PeerView(peer=PeerId(f"p{number}"), capability=capability(memory_mb + 0.1, rng.uniform(0.3, 3)))
        for number in range(3)
    )
    problem = from_snapshot(Snapshot(manifest=model, peers=peers, default_bandwidth=1e12, default_round_trip_s=0.0))
    found = max_flow(problem, (Span(0, 2), Span(2, 4), Span(4, 6)), CapacityModel.EXACT, final=True)
    assert 0 < found.tokens_per_s <= coverage_bound(problem) * (1 + 1e-6)

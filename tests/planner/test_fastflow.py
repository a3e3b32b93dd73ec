from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixnet.core.types import Span
from helixnet.planner.fastflow import paper_max_flow, paper_routing
from helixnet.planner.problem import Problem, Spans, from_snapshot
from tests.planner.preflow import reference_flow
from tests.planner.small_swarms import random_swarm, spread_links


def any_spans(problem: Problem, rng: random.Random) -> Spans:
    spans: list[Span | None] = []
    for _ in problem.peers:
        start = rng.choice((0, rng.randrange(problem.layers)))
        stop = rng.choice((problem.layers, rng.randrange(start, problem.layers) + 1))
        spans.append(Span(start, stop) if rng.random() < 0.9 else None)
    return tuple(spans)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 8), st.sampled_from([1.0, 4.0, 8.0]))
@settings(max_examples=200, deadline=None)
def test_it_equals_the_reference_whatever_the_links(seed: int, peers: int, layers: int, decades: float) -> None:
    rng = random.Random(seed)
    problem = spread_links(from_snapshot(random_swarm(seed, peers, layers)), rng, decades)
    spans = any_spans(problem, rng)
    expected = reference_flow(problem, spans)
    assert paper_max_flow(problem, spans) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([1.0, 6.0]))
@settings(max_examples=100, deadline=None)
def test_its_flow_is_kept_at_every_peer_and_its_cut_is_as_large_as_the_flow(seed: int, decades: float) -> None:
    rng = random.Random(seed)
    problem = spread_links(from_snapshot(random_swarm(seed, 7, 8)), rng, decades)
    spans = any_spans(problem, rng)
    found = paper_routing(problem, spans, limits=True)
    kept = [0.0] * len(spans)
    passed = [0.0] * len(spans)
    for (source, target), rate in found.edges.items():
        if source >= 0:
            kept[source] -= rate
        if target >= 0:
            kept[target] += rate
            passed[target] += rate
        if source >= 0 and target >= 0:
            assert rate <= problem.link_tokens_per_s[source, target] * (1 + 1e-9)
    assert kept == pytest.approx([0.0] * len(kept), abs=1e-4 * found.tokens_per_s)  # tiny edges are dropped
    for peer, span, rate in zip(problem.peers, spans, passed, strict=True):
        assert rate <= (peer.tokens_per_s(len(span)) if span else 0.0) * (1 + 1e-9)
    if found.tokens_per_s:
        cut = sum(
            problem.peers[i].tokens_per_s(len(spans[i] or ())) if i == j else float(problem.link_tokens_per_s[i, j])
            for (i, j), _ in found.limits
        )
        assert cut == pytest.approx(found.tokens_per_s, rel=1e-6)
        assert sum(share for _, share in found.limits) == pytest.approx(1.0, rel=1e-6)


def test_without_a_chain_from_end_to_end_nothing_flows() -> None:
    problem = from_snapshot(random_swarm(1, peers=2, layers=6))
    for spans in ((Span(0, 2), Span(3, 6)), (None, Span(3, 6)), (None, None)):
        assert paper_max_flow(problem, spans) == 0
        assert paper_routing(problem, spans, limits=True).edges == {}

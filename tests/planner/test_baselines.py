from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helixnet.core.types import PeerId, Span
from helixnet.planner.artifact import Artifact
from helixnet.planner.baselines import BASELINES, parallax, petals, separate, separate_pipelines, swarm, uniform
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.objective import coverage
from helixnet.planner.problem import PlanPeer, Problem, Spans, from_snapshot
from tests.planner.small_swarms import loopback_swarm, random_swarm

DATA = Path(os.environ.get("HELIXNET_ARTIFACT") or Path(__file__).parents[2].parent / "shared" / "helix")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the paper's data: set HELIXNET_ARTIFACT to its folder")
LARGE, SMALL = "llama70b", "llama30b"


def peer(name: str, room: int, layers: int, speed: float = 100.0, ends: tuple[int, int] = (0, 0)) -> PlanPeer:
    """With room for so many layers; the embedding and the head take as much room as `ends` layers."""
    first, last = max(0, room - ends[0]), max(0, room - ends[1])
    both = layers if room - sum(ends) >= layers else 0
    return PlanPeer(
        peer=PeerId(name),
        layers_max=(min(room, layers), min(first, layers), min(last, layers), both),
        capacity=(speed,) * (layers + 1),
        kv_token_layers=(10**6,) * (layers + 1),
        kv_first=0,
        kv_last=0,
        batch_rate=(speed,),
        decode_s=1 / speed,
        prefill_s=1 / speed,
        piece_s=1 / speed,
        held=None,
    )


def problem_of(layers: int, *peers: PlanPeer) -> Problem:
    """Peers on links that never bind."""
    count = len(peers)
    return Problem(
        model="toy",
        layers=layers,
        layer_bytes=1,
        first_bytes=0,
        last_bytes=0,
        session_tokens=1,
        peers=peers,
        link_tokens_per_s=np.full((count, count), 1e9),
        link_s=np.zeros((count, count)),
        prompt_link_s=np.zeros((count, count)),
    )


def check(problem: Problem, spans: Spans) -> None:
    """Every layer is held, within memory, and something flows."""
    assert len(spans) == len(problem.peers)
    assert min(coverage(problem, spans)) > 0
    assert all(problem.fits(i, span.start, span.stop) for i, span in enumerate(spans) if span is not None)
    if np.all(problem.link_tokens_per_s > 0):
        assert max_flow(problem, spans, CapacityModel.EXACT).tokens_per_s > 0


@pytest.mark.parametrize("name", list(BASELINES))
def test_what_a_baseline_places_covers_the_model_within_memory(name: str) -> None:
    placed = 0
    for seed in range(120):
        problem = from_snapshot(random_swarm(seed, peers=1 + seed % 9, layers=1 + seed % 11))
        spans = BASELINES[name](problem)
        if spans is not None:
            check(problem, spans)
            placed += 1
    assert placed > 10


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_places_nothing_where_there_is_too_little_room(name: str) -> None:
    assert BASELINES[name](from_snapshot(loopback_swarm(20, 20, 20))) is None
    assert BASELINES[name](from_snapshot(loopback_swarm())) is None


@pytest.mark.parametrize("name", list(BASELINES))
def test_equal_peers_with_room_for_the_whole_model_are_all_used(name: str) -> None:
    spans = BASELINES[name](from_snapshot(loopback_swarm(3000, 3000)))
    assert spans is not None
    assert None not in spans


def test_petals_second_server_takes_the_window_that_the_first_left_weak() -> None:
    problem = problem_of(10, peer("a", 6, 10), peer("b", 6, 10), peer("c", 3, 10))
    # Four layers are unserved and two of the first's must be doubled; then [2, 4) is served once, like all but [4, 6).
    assert petals(problem, (0, 1, 2)) == (Span(0, 6), Span(4, 10), Span(0, 3))


def test_petals_counts_throughput_not_servers() -> None:
    problem = problem_of(4, peer("a", 2, 4, speed=100), peer("b", 2, 4, speed=10), peer("c", 2, 4))
    assert petals(problem, (0, 1, 2)) == (Span(0, 2), Span(2, 4), Span(2, 4))


def test_petals_servers_join_in_the_order_given() -> None:
    problem = problem_of(4, peer("a", 3, 4), peer("b", 1, 4))
    assert petals(problem, (1, 0)) == (Span(1, 4), Span(0, 1))


def test_petals_leaves_the_ends_to_servers_with_room_for_them() -> None:
    problem = problem_of(5, peer("a", 3, 5, ends=(3, 3)), peer("b", 3, 5, ends=(1, 1)), peer("c", 3, 5, ends=(1, 1)))
    assert petals(problem, (0, 1, 2)) == (Span(1, 4), Span(0, 2), Span(3, 5))


def test_swarm_cuts_stages_that_the_weakest_can_hold_and_balances_them() -> None:
    speeds = (90, 60, 50, 40)
    problem = problem_of(6, *(peer(f"p{n}", 3 + n, 6, speed) for n, speed in enumerate(speeds)))
    # Two stages of three: 90 | 60, then 50 joins the 60 and 40 the 90.
    assert swarm(problem) == (Span(0, 3), Span(3, 6), Span(3, 6), Span(0, 3))


def test_swarm_leaves_the_weakest_out_where_there_are_too_few_peers_for_its_stages() -> None:
    problem = problem_of(6, peer("a", 3, 6), peer("b", 3, 6), peer("c", 1, 6))
    assert swarm(problem) == (Span(3, 6), Span(0, 3), None)


def test_swarm_keeps_the_ends_for_those_with_room_for_them() -> None:
    problem = problem_of(
        6, peer("a", 2, 6, 300, ends=(2, 2)), peer("b", 4, 6, 200, ends=(2, 2)), peer("c", 4, 6, 100, ends=(2, 2))
    )
    assert swarm(problem) == (Span(2, 4), Span(0, 2), Span(4, 6))


def test_swarm_cuts_more_stages_where_nobody_has_room_for_an_end() -> None:
    problem = problem_of(6, *(peer(f"p{n}", 3, 6, ends=(1, 1)) for n in range(3)))
    assert swarm(problem) == (Span(4, 6), Span(2, 4), Span(0, 2))


def test_separate_gives_each_kind_as_many_even_pipelines_as_it_can_fill() -> None:
    fast = [peer(f"fast{n}", 4, 8, 200) for n in range(5)]
    slow = [peer(f"slow{n}", 3, 8, 50) for n in range(3)]
    lone = peer("lone", 5, 8, 70)
    problem = problem_of(8, *fast, *slow, lone)
    pipelines = separate_pipelines(problem)
    assert len(pipelines) == 3
    spans = separate(problem)
    assert spans is not None
    assert spans[:5] == (Span(0, 4), Span(4, 8), Span(0, 3), Span(3, 6), Span(6, 8))
    assert spans[5:8] == (Span(0, 3), Span(3, 6), Span(6, 8))
    assert spans[8] is None


def test_uniform_shares_equally_whatever_the_speed_and_clips_by_room() -> None:
    problem = problem_of(12, peer("a", 12, 12, 900), peer("b", 2, 12), peer("c", 12, 12))
    assert uniform(problem) == (Span(0, 5), Span(5, 7), Span(7, 12))


def test_uniform_begins_and_ends_with_peers_that_have_room_for_the_ends() -> None:
    problem = problem_of(6, peer("a", 2, 6, ends=(2, 2)), peer("b", 4, 6, ends=(2, 2)), peer("c", 4, 6, ends=(2, 2)))
    assert uniform(problem) == (Span(2, 4), Span(0, 2), Span(4, 6))


def test_parallax_pipelines_share_no_peer_and_follow_compute() -> None:
    problem = problem_of(6, peer("a", 5, 6, 200), peer("b", 5, 6, 200), peer("c", 4, 6, 100), peer("d", 4, 6, 100))
    assert parallax(problem) == (Span(0, 4), Span(0, 4), Span(4, 6), Span(4, 6))


def test_parallax_takes_one_pipeline_where_two_are_slower_together() -> None:
    # Dealt to two pipelines, the slow ones must hold 2 and 6 layers (5 and 1.7 tokens/s); in one, a layer each (10).
    problem = problem_of(6, peer("a", 4, 6, 100), peer("b", 6, 6, 10), peer("c", 6, 6, 10))
    assert parallax(problem) == (Span(1, 5), Span(0, 1), Span(5, 6))


def test_links_do_not_change_what_a_baseline_places() -> None:
    for seed in range(20):
        problem = from_snapshot(random_swarm(seed, peers=6, layers=8))
        elsewhere = replace(problem, link_s=problem.link_s.T, link_tokens_per_s=problem.link_tokens_per_s.T)
        assert all(rule(problem) == rule(elsewhere) for rule in BASELINES.values())


@needs_data
@pytest.mark.parametrize(
    ("instance", "model"),
    [("single24", LARGE), ("3cluster24", LARGE), ("cluster42", LARGE), ("single24", SMALL), ("3cluster24", SMALL)],
)
def test_petals_places_the_papers_instances_as_the_paper_stored_it(instance: str, model: str) -> None:
    artifact = Artifact(DATA)
    assert petals(artifact.problem(instance, model)) == artifact.stored(instance, model)["petals"]


@needs_data
@pytest.mark.parametrize(
    ("instance", "tokens_per_s"), [("single24", 757.9), ("3cluster24", 616.4), ("cluster42", 4892.2)]
)
def test_swarm_places_the_large_model_as_the_paper_stored_it(instance: str, tokens_per_s: float) -> None:
    artifact = Artifact(DATA)
    problem = artifact.problem(instance, LARGE)
    spans = swarm(problem)
    assert spans == artifact.stored(instance, LARGE)["swarm"]
    assert max_flow(problem, spans, CapacityModel.PAPER).tokens_per_s == pytest.approx(tokens_per_s, abs=0.1)

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from helixnet.core.errors import CapacityError, MemoryTooSmall, SwarmTooSmall
from helixnet.core.plan.plan import Assignment, Placement, uncovered
from helixnet.core.plan.snapshot import PeerView, Snapshot
from helixnet.core.types import PeerId, Span
from helixnet.planner.flow import CapacityModel
from helixnet.planner.objective import PAPER
from helixnet.planner.problem import FRAME_BYTES_PER_TOKEN
from helixnet.planner.solve import Budget, evaluate, solve
from tests.planner.small_swarms import loopback_swarm, random_swarm

ROOT = Path(__file__).parents[2]
QUICK = Budget(work=5_000, work_per_peer=1_000, laying_work=400_000, flow_work=5_000_000, flow_work_per_peer=0)
THOROUGH = Budget(work=30_000, work_per_peer=4_000, laying_work=1_000_000)


def spans_of(placement: Placement) -> dict[str, Span]:
    return {assignment.peer: assignment.span for assignment in placement.assignments}


def check_plan(snapshot: Snapshot, placement: Placement) -> None:
    """Covers every layer within memory; flow is conserved, keeps to the links, enters and leaves whole."""
    model = snapshot.manifest
    spans = spans_of(placement)
    assert not uncovered(list(spans.values()), model.layers)
    assert list(spans) == sorted(spans)
    for view in snapshot.peers:
        span = spans.get(view.peer)
        assert span is None or model.span_bytes(span.start, span.stop) < view.capability.memory_bytes
    edges = [(flow.source, flow.target) for flow in placement.flows]
    assert edges == sorted(set(edges), key=lambda edge: (edge[0] or "", edge[1] or ""))
    total = sum(flow.tokens_per_s for flow in placement.flows if flow.source is None)
    assert total > 0
    assert placement.prediction.tokens_per_s <= total * (1 + 1e-9)
    assert total <= placement.prediction.bound_tokens_per_s * (1 + 1e-6)
    bandwidth = {(link.source, link.target): link.bandwidth for link in snapshot.links}
    for peer in spans:
        incoming = sum(flow.tokens_per_s for flow in placement.flows if flow.target == peer)
        outgoing = sum(flow.tokens_per_s for flow in placement.flows if flow.source == peer)
        assert incoming == pytest.approx(outgoing, abs=1e-4 * total)
    for flow in placement.flows:
        if flow.source is None or flow.target is None:
            end = spans[flow.target or flow.source or PeerId("")]
            assert end.start == 0 if flow.source is None else end.stop == model.layers
            continue
        assert spans[flow.target].start <= spans[flow.source].stop < spans[flow.target].stop
        if (flow.source, flow.target) in bandwidth:
            token_bytes = model.activation_bytes + FRAME_BYTES_PER_TOKEN
            assert flow.tokens_per_s * token_bytes <= bandwidth[flow.source, flow.target]


@pytest.mark.parametrize("seed", range(40))
def test_every_plan_covers_the_model_within_memory_and_conserves_flow(seed: int) -> None:
    snapshot = random_swarm(seed, peers=2 + seed % 6, layers=5 + seed % 9)
    try:
        placement = solve(snapshot, seed, QUICK)
    except CapacityError:
        return
    check_plan(snapshot, placement)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(placement), type=Placement) == placement


def test_three_uneven_peers_on_one_machine_get_three_spans_smaller_than_the_model() -> None:
    snapshot = loopback_swarm(350, 450, 300)
    placement = solve(snapshot, 1, THOROUGH)
    check_plan(snapshot, placement)
    spans = spans_of(placement)
    assert len(set(spans.values())) == 3
    assert all(len(span) < 30 for span in spans.values())
    assert all(any(flow.target == peer for flow in placement.flows) for peer in spans)


def test_a_fourth_peer_that_joins_gets_a_span() -> None:
    before = solve(loopback_swarm(350, 450, 300), 1, THOROUGH)
    held = {n: assignment.span for n, assignment in enumerate(before.assignments)}
    after = solve(loopback_swarm(350, 450, 300, 400, held=held), 2, THOROUGH)
    assert len(after.assignments) == 4
    assert after.prediction.tokens_per_s > before.prediction.tokens_per_s


def test_a_peer_with_room_for_one_layer_only_still_helps() -> None:
    placement = solve(loopback_swarm(350, 450, 300, 20), 1, THOROUGH)
    assert len(spans_of(placement)["peer-03"]) == 1


@pytest.mark.slow
def test_three_of_four_peers_still_cover_when_memory_allows() -> None:
    for missing in range(4):
        memories = [500.0, 600.0, 500.0, 550.0]
        del memories[missing]
        snapshot = loopback_swarm(*memories)
        check_plan(snapshot, solve(snapshot, 1, QUICK))


def test_spare_memory_makes_a_swarm_that_any_one_peer_may_leave() -> None:
    placement = solve(loopback_swarm(900, 900, 900, 900), 1, THOROUGH)
    for left_out in placement.assignments:
        others = [a.span for a in placement.assignments if a is not left_out]
        assert not uncovered(others, 30), f"without {left_out.peer}"


def test_peers_with_room_for_everything_hold_everything() -> None:
    placement = solve(loopback_swarm(3000, 3000), 1, THOROUGH)
    assert [a.span for a in placement.assignments] == [Span(0, 30), Span(0, 30)]
    assert all(None in (flow.source, flow.target) for flow in placement.flows)


@pytest.mark.slow
def test_a_plan_that_is_as_good_is_not_changed() -> None:
    snapshot = loopback_swarm(350, 450, 300)
    first = solve(snapshot, 1, THOROUGH)
    held = {n: assignment.span for n, assignment in enumerate(first.assignments)}
    again = solve(loopback_swarm(350, 450, 300, held=held), 99, THOROUGH)
    assert spans_of(again) == spans_of(first)


def test_draining_peers_hold_nothing() -> None:
    whole = loopback_swarm(450, 450, 450)
    leaving = msgspec.structs.replace(whole.peers[1], draining=True)
    snapshot = msgspec.structs.replace(whole, peers=(whole.peers[0], leaving, whole.peers[2]))
    assert list(spans_of(solve(snapshot, 1, QUICK))) == ["peer-00", "peer-02"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_plan_in_another_process() -> None:
    program = (
        "import msgspec; from tests.planner.small_swarms import random_swarm; from helixnet.planner.solve import *\n"
        "budget = Budget(work=8_000, work_per_peer=0, laying_work=400_000)\n"
        "print(msgspec.json.encode(solve(random_swarm(11, 6, 12), 7, budget)).decode())"
    )
    answers = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        answers.append(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=50))
    assert answers[0] == answers[1]
    assert b"peer-00" in answers[0]


def test_a_cancelled_search_still_gives_a_whole_plan() -> None:
    snapshot = loopback_swarm(350, 450, 300)
    check_plan(snapshot, solve(snapshot, 1, cancelled=lambda: True))


@pytest.mark.slow
def test_the_papers_objective_uses_the_exact_solver_in_small_swarms() -> None:
    snapshot = random_swarm(4, peers=4, layers=6)
    placement = solve(snapshot, 1, Budget(work=0, work_per_peer=0), PAPER)
    searched = solve(snapshot, 1, Budget(milp_nodes=0, flow_work=5_000_000, flow_work_per_peer=0), PAPER)
    flows = [sum(f.tokens_per_s for f in p.flows if f.source is None) for p in (placement, searched)]
    assert flows[0] >= flows[1] * 0.999


def test_evaluate_gives_a_solved_plan_the_same_prediction() -> None:
    snapshot = random_swarm(7, peers=5, layers=8)
    placement = solve(snapshot, 1, QUICK)
    assert evaluate(snapshot, placement.assignments) == placement


def test_evaluate_leaves_out_peers_that_are_gone_and_says_when_nothing_can_be_served() -> None:
    snapshot = loopback_swarm(400, 400)
    gone = Assignment(PeerId("somebody else"), Span(0, 30))
    assert evaluate(snapshot, [gone]).prediction.tokens_per_s == 0
    whole = [Assignment(PeerId("peer-00"), Span(0, 15)), Assignment(PeerId("peer-01"), Span(15, 30)), gone]
    for model in CapacityModel:
        placement = evaluate(snapshot, whole, model)
        assert list(spans_of(placement)) == ["peer-00", "peer-01"]
        assert placement.prediction.tokens_per_s > 0
    assert "no chain" in evaluate(snapshot, whole[1:]).prediction.bottleneck


def test_an_evaluated_span_beyond_memory_has_no_room_for_requests() -> None:
    snapshot = loopback_swarm(100)
    placement = evaluate(snapshot, [Assignment(PeerId("peer-00"), Span(0, 30))])
    assert placement.prediction.tokens_per_s == 0
    assert "KV memory" in placement.prediction.bottleneck


@pytest.mark.parametrize(
    ("memory_mb", "error", "sentence"),
    [
        ((), SwarmTooSmall, "No measured peer serves SmolLM2-135M-Instruct yet. Start one with `helixnet peer`."),
        (
            (10, 12),
            MemoryTooSmall,
            "None of the swarm's 2 peers has room for one layer of SmolLM2-135M-Instruct, which takes 15 MB with KV "
            "for one request. Raise --memory or serve a smaller model.",
        ),
        (
            (300, 200),
            SwarmTooSmall,
            "The swarm's 2 peers can hold 17 of 30 layers of SmolLM2-135M-Instruct, which leaves layers 17 to 29 "
            "uncovered: 0.19 GB of memory is missing. Add a peer or raise --memory.",
        ),
        (
            (100, 100),
            SwarmTooSmall,
            "No peer of the swarm has room for the first layer of SmolLM2-135M-Instruct with the embedding, which "
            "takes 0.13 GB. Add a peer with more memory or raise --memory.",
        ),
        (
            (400,),
            SwarmTooSmall,
            "The swarm's 1 peer can hold 19 of 30 layers of SmolLM2-135M-Instruct, which leaves layers 19 to 29 "
            "uncovered: 0.28 GB of memory is missing. Add a peer or raise --memory.",
        ),
    ],
    ids=["nobody", "no layer", "too few layers", "no end", "one end"],
)
def test_a_swarm_that_is_too_small_says_what_is_missing(
    memory_mb: tuple[float, ...], error: type[CapacityError], sentence: str
) -> None:
    with pytest.raises(error) as raised:
        solve(loopback_swarm(*memory_mb), 1, QUICK)
    assert str(raised.value) == sentence


def test_adding_the_memory_that_is_missing_helps() -> None:
    with pytest.raises(SwarmTooSmall, match=r"0\.19 GB of memory is missing"):
        solve(loopback_swarm(300, 200), 1, QUICK)
    check_plan(loopback_swarm(300, 400), solve(loopback_swarm(300, 400), 1, QUICK))


def test_a_peer_without_room_is_left_out_of_a_swarm_that_can_do_without() -> None:
    snapshot = loopback_swarm(450, 10, 450)
    assert list(spans_of(solve(snapshot, 1, QUICK))) == ["peer-00", "peer-02"]


def test_a_tiny_model_is_placed_on_many_peers() -> None:
    small = random_swarm(1, peers=1, layers=1)
    views = tuple(
        PeerView(
            peer=PeerId(f"p{n}"), capability=msgspec.structs.replace(small.peers[0].capability, memory_bytes=10**9)
        )
        for n in range(5)
    )
    snapshot = msgspec.structs.replace(small, peers=views, links=())
    assert set(spans_of(solve(snapshot, 1, QUICK)).values()) == {Span(0, 1)}

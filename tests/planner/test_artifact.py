"""The paper's instances become problems that say what the data says; bad data gets a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helixnet.core.errors import SwarmTooSmall, UsageError
from helixnet.core.types import Span
from helixnet.planner.artifact import Artifact
from helixnet.planner.bounds import coverage_bound
from helixnet.planner.flow import CapacityModel, max_flow
from helixnet.planner.objective import PAPER, SERVES_MIN, score
from helixnet.planner.problem import require_room
from helixnet.planner.solve import Budget, place
from tests.planner.small_artifact import FOLDER, curve_of_big, mix, needs_data, small_artifact, write

Files = dict[str, dict[str, Any]]


@pytest.fixture
def files() -> Files:
    return small_artifact()


def three(files: Files) -> dict[str, Any]:
    cluster: dict[str, Any] = files["clusters.json"]["three"]
    return cluster


def tiny(files: Files) -> dict[str, Any]:
    model: dict[str, Any] = files["profiles.json"]["models"]["tiny"]
    return model


def test_machines_hold_and_run_what_the_profiles_say(files: Files, tmp_path: Path) -> None:
    problem = Artifact(write(tmp_path, files)).problem("three", "tiny")
    assert [peer.peer for peer in problem.peers] == ["0", "1", "2"]
    assert (problem.layers, problem.session_tokens, problem.flow_per_token) == (6, 40, 4.0)
    entry, small, exit_ = problem.peers
    assert entry.layers_max == (4, 4, 0, 0)  # no link leads from it to the sink
    assert small.layers_max == (2, 0, 2, 0)
    assert exit_.layers_max == (4, 0, 4, 0)
    assert entry.capacity == (100.0, 100.0, 100.0, 90.0, 80.0, 100.0, 120.0)
    assert entry.kv_token_layers[:5] == (1600, 1600, 1280, 960, 640)
    assert small.kv_token_layers == (160, 160, 32, 0, 0, 0, 0)
    assert entry.decode_s == 0.004  # one alone takes as long as the smallest batch measured
    assert entry.prefill_s == pytest.approx(0.003)
    assert len(entry.batch_rate) == 4
    assert entry.batch_rate[1] == pytest.approx(2 / (0.004 + 2 * 3 * 0.0001))


def test_a_pair_stands_for_both_directions_and_an_absent_one_carries_nothing(files: Files, tmp_path: Path) -> None:
    artifact = Artifact(write(tmp_path, files))
    problem = artifact.problem("three", "tiny")
    assert problem.link_tokens_per_s[0, 1] == problem.link_tokens_per_s[1, 0] == pytest.approx(100.0)
    assert problem.link_tokens_per_s[0, 2] == 0.0
    assert problem.link_s[1, 0] == pytest.approx(0.002 + 100 / 10200)
    assert problem.prompt_link_s[1, 2] == pytest.approx(0.030 + 30 * 100 / 5100)
    assert problem.link_s[0, 2] == pytest.approx(0.030)
    halved = artifact.problem("three", "tiny", link_share=0.5)
    assert halved.link_tokens_per_s[1, 2] == pytest.approx(25.0)
    assert halved.link_s[1, 2] == problem.link_s[1, 2]


def test_a_link_that_carries_nothing_is_no_way(files: Files, tmp_path: Path) -> None:
    problem = Artifact(write(tmp_path, files)).problem("three", "tiny")
    apart = (Span(0, 3), None, Span(3, 6))
    around = (Span(0, 3), Span(2, 4), Span(3, 6))
    for final in (False, True):
        assert max_flow(problem, apart, CapacityModel.PAPER, final=final).tokens_per_s == 0
        assert max_flow(problem, around, CapacityModel.PAPER, final=final).tokens_per_s == pytest.approx(20.0)
    assert score(problem, PAPER, apart) < SERVES_MIN < score(problem, PAPER, around)


def test_two_directions_may_differ(files: Files, tmp_path: Path) -> None:
    three(files)["links_bandwidth_Bps_latency_ms"]["1-0"] = [1020, 7.0]
    problem = Artifact(write(tmp_path, files)).problem("three", "tiny")
    assert problem.link_tokens_per_s[0, 1] == pytest.approx(100.0)
    assert problem.link_tokens_per_s[1, 0] == pytest.approx(10.0)


def test_stored_placements_are_spans_by_machine(files: Files, tmp_path: Path) -> None:
    artifact = Artifact(write(tmp_path, files))
    found = artifact.stored("three", "tiny")
    assert found == {
        "chain": (Span(0, 3), Span(3, 4), Span(4, 6)),
        "separate/big": (Span(0, 3), None, Span(3, 6)),  # numbered among themselves
    }
    flow = max_flow(artifact.problem("three", "tiny"), found["chain"], CapacityModel.PAPER)
    assert flow.tokens_per_s == pytest.approx(30.0)  # T(3) of machine 0


def test_a_mix_that_nobody_profiled_takes_each_type_from_the_nearest_one(files: Files, tmp_path: Path) -> None:
    mixes = tiny(files)["typical_throughput_by_mix"]
    mixes["this"]["mix"] = {"BIG": 3, "SMALL": 5}
    assert Artifact(write(tmp_path, files)).problem("three", "tiny").peers[0].capacity[1] == 100.0
    mixes["exact"] = mix({"BIG": 2, "SMALL": 1}, {"BIG": curve_of_big() | {"1": 99.0}})
    peers = Artifact(write(tmp_path, files)).problem("three", "tiny").peers
    assert (peers[0].capacity[1], peers[1].capacity[1]) == (99.0, 60.0)


def test_gaps_count_as_the_next_more_layers(files: Files, tmp_path: Path) -> None:
    model = tiny(files)
    rates = model["typical_throughput_by_mix"]["this"]["per_type"]["BIG"]["T_k_tokens_per_s"]
    del rates["1"]
    rates["3"], rates["4"] = None, None
    del model["types"]["BIG"]["vllm_num_blocks"]["2"]
    peer = Artifact(write(tmp_path, files)).problem("three", "tiny").peers[0]
    assert peer.layers_max == (2, 2, 0, 0)
    assert peer.capacity[:3] == (50.0, 50.0, 100.0)
    assert peer.kv_token_layers[:4] == (1600, 1600, 960, 960)


def test_a_slow_link_of_the_coordinator_closes_that_end(files: Files, tmp_path: Path) -> None:
    three(files)["links_bandwidth_Bps_latency_ms"]["2-sink"] = [2 * 99, 1.0]  # T(1) is 100
    problem = Artifact(write(tmp_path, files)).problem("three", "tiny")
    assert problem.peers[2].layers_max == (4, 0, 0, 0)


def test_a_cluster_without_links_of_the_coordinator_is_open_everywhere(files: Files, tmp_path: Path) -> None:
    three(files)["links_bandwidth_Bps_latency_ms"] = {"0-1": [10200, 2.0]}
    three(files)["regions"] = ["here"] * 3
    problem = Artifact(write(tmp_path, files)).problem("three", "tiny")
    assert [peer.layers_max for peer in problem.peers] == [(4, 4, 4, 0), (2, 2, 2, 0), (4, 4, 4, 0)]


def test_machines_too_small_for_the_model_are_not_bad_data(files: Files, tmp_path: Path) -> None:
    tiny(files)["types"]["BIG"]["max_num_layers"] = 0
    artifact = Artifact(write(tmp_path, files))
    with pytest.raises(SwarmTooSmall):
        require_room(artifact.problem("three", "tiny"))


def spoil_link(name: str, link: Any) -> Callable[[Files], None]:
    return lambda files: three(files)["links_bandwidth_Bps_latency_ms"].update({name: link})


def spoil_type(key: str, value: Any) -> Callable[[Files], None]:
    return lambda files: tiny(files)["types"]["SMALL"].update({key: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(spoil_link("0-3", [1, 1]), ["clusters.json", "three", "0-3"], id="no-such-machine"),
        pytest.param(spoil_link("0-b", [1, 1]), ["clusters.json", "0-b"], id="no-machine-number"),
        pytest.param(spoil_link("0-2", [1]), ["clusters.json", "0-2"], id="half-a-link"),
        pytest.param(spoil_link("0-2", [-1, 1]), ["clusters.json", "0-2"], id="negative-bandwidth"),
        pytest.param(spoil_link("source-0", [3, 1]), ["clusters.json", "source"], id="no-entry"),
        pytest.param(lambda files: three(files).pop("node_types"), ["three", "node_types"], id="no-machines"),
        pytest.param(lambda files: three(files).update(regions=[0]), ["three", "regions 1"], id="too-few-regions"),
        pytest.param(lambda files: three(files).update(num_nodes=4), ["three", "num_nodes 4"], id="wrong-count"),
        pytest.param(
            lambda files: three(files).update(node_types=["BIG", "BIG", "HUGE"]),
            ["profiles.json", "tiny", "HUGE"],
            id="unknown-type",
        ),
        pytest.param(
            lambda files: tiny(files)["typical_throughput_by_mix"].pop("this"),
            ["profiles.json", "no mix", "SMALL"],
            id="no-throughput",
        ),
        pytest.param(
            lambda files: tiny(files).update(num_layers=10**9), ["profiles.json", "num_layers"], id="endless-model"
        ),
        pytest.param(spoil_type("decode_bs2time_ms_per_layer", []), ["SMALL", "decode"], id="empty-curve"),
        pytest.param(spoil_type("decode_bs2time_ms_per_layer", [[0, 0]]), ["SMALL", "decode"], id="curve-of-nothing"),
        pytest.param(spoil_type("prompt_bs2time_ms_per_layer", [[9, 0]]), ["SMALL", "prompt"], id="no-time"),
        pytest.param(spoil_type("vllm_num_blocks", {"a": 1}), ["SMALL", "vllm_num_blocks"], id="blocks-of-a-layers"),
        pytest.param(lambda files: files["profiles.json"].pop("models"), ["profiles.json", "models"], id="no-models"),
    ],
)
def test_bad_data_gets_a_sentence(
    files: Files, tmp_path: Path, spoil: Callable[[Files], None], words: list[str]
) -> None:
    spoil(files)
    folder = write(tmp_path, files)
    with pytest.raises(UsageError) as raised:
        Artifact(folder).problem("three", "tiny")
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"three": NaN}', "[" * 100_000, "\ud800"], ids=repr)
def test_a_file_that_is_no_object_gets_a_sentence(files: Files, tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, files)
    (folder / "clusters.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match=r"clusters\.json"):
        Artifact(folder)


@pytest.mark.parametrize(
    "intervals",
    [{"compute_node_2": ["BIG", 3, 3]}, {"compute_node_2": ["BIG", 0, 7]}, {"two": ["BIG", 0, 1]}, {"x_2": []}],
    ids=repr,
)
def test_a_bad_stored_placement_gets_a_sentence(files: Files, tmp_path: Path, intervals: dict[str, Any]) -> None:
    files["placements.json"]["placements"][0]["intervals"] = intervals
    with pytest.raises(UsageError, match=r"placements\.json: chain of three with tiny"):
        Artifact(write(tmp_path, files)).stored("three", "tiny")


@pytest.mark.parametrize(("instance", "model"), [("four", "tiny"), ("_meta", "tiny"), ("three", "huge")])
def test_unknown_names_are_answered_with_those_there_are(
    files: Files, tmp_path: Path, instance: str, model: str
) -> None:
    with pytest.raises(UsageError, match=r"It has (three|tiny)\."):
        Artifact(write(tmp_path, files)).problem(instance, model)


@needs_data
@pytest.mark.parametrize(
    ("instance", "model", "method", "flow"),
    [
        ("single24", "llama70b", "helix-milp", 1289.6),
        ("single24", "llama70b", "petals", 952.1),
        ("single24", "llama30b", "swarm", 889.8),
        ("3cluster24", "llama70b", "helix-milp", 1212.2),
        ("3cluster24", "llama70b", "swarm", 616.4),
        ("cluster42", "llama70b", "helix-milp", 4137.5),
        ("cluster42", "llama70b", "swarm", 4892.2),
        ("cluster10", "llama30b", "helix-milp(quality)", 286.6),
    ],
)
def test_the_published_flows_come_out(instance: str, model: str, method: str, flow: float) -> None:
    artifact = Artifact(FOLDER)
    problem = artifact.problem(instance, model)
    found = max_flow(problem, artifact.stored(instance, model)[method], CapacityModel.PAPER)
    assert found.tokens_per_s == pytest.approx(flow, rel=1e-3)


@needs_data
def test_every_stored_placement_of_a_whole_cluster_has_the_stored_flow() -> None:
    artifact = Artifact(FOLDER)
    rows = json.loads((FOLDER / "placements.json").read_text(encoding="utf-8"))["placements"]
    whole = [row for row in rows if "/" not in row["method"]]
    assert len(whole) >= 20
    for row in whole:
        problem = artifact.problem(row["cluster"], row["model"])
        spans = artifact.stored(row["cluster"], row["model"])[row["method"]]
        assert max_flow(problem, spans, CapacityModel.PAPER).tokens_per_s == pytest.approx(row["sim_flow"], rel=1e-3)


@needs_data
def test_the_coordinators_links_never_bind_in_the_published_clusters() -> None:
    artifact = Artifact(FOLDER)
    for instance in ("single24", "3cluster24", "cluster42"):
        peers = artifact.problem(instance, "llama70b").peers
        assert all(len(set(peer.layers_max[:3])) == 1 for peer in peers)
    # The authors' MILP saw a pruned cluster, in which only twelve machines may be entries.
    pruned = artifact.problem("cluster42_pruned", "llama70b")
    assert sum(peer.layers_max[1] > 0 for peer in pruned.peers) == 12
    spans = artifact.stored("cluster42", "llama70b")["helix-milp(raw_42)"]
    assert max_flow(pruned, spans, CapacityModel.PAPER).tokens_per_s == pytest.approx(4137.5, rel=1e-3)
    assert all(pruned.fits(n, span.start, span.stop) for n, span in enumerate(spans) if span is not None)


@needs_data
def test_the_tightened_bounds_are_those_of_the_data_sheet() -> None:
    artifact = Artifact(FOLDER)
    assert coverage_bound(artifact.problem("single24", "llama70b")) == pytest.approx(2045.6, rel=1e-4)
    assert coverage_bound(artifact.problem("cluster42", "llama70b")) == pytest.approx(6528.9, rel=1e-4)


@needs_data
def test_a_published_instance_can_be_planned() -> None:
    problem = Artifact(FOLDER).problem("cluster10", "llama30b")
    spans = place(problem, 0, Budget(work=2000, work_per_peer=0, milp_nodes=0))
    assert max_flow(problem, spans, CapacityModel.EXACT).tokens_per_s > 100

"""`helixnet plan`, run in this process on the example file and on a made-up artifact."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from helixnet.core.types import Span
from helixnet.daemon.cli import main
from helixnet.daemon.plan_moves import Move, Moves, Turn
from helixnet.daemon.plan_report import Change
from helixnet.daemon.plan_view import movement
from tests.planner.small_artifact import small_artifact, write

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "office-and-home.toml")
BRIEFLY = ("--seconds", "0.1")
"""Where what is found matters less than what is said of it."""
QUICK = """
[model]
name = "<tiny>"
layers = 6
hidden_size = 64
kv_heads = 2
head_dim = 16
layer_mb = 900
[[peers]]
name = "a"
gpu = "rtx4060"
memory_gb = {memory}
count = 3
[links]
default = {{ round_trip_ms = 1, mbit = 900 }}
"""


@pytest.fixture
def quick(tmp_path: Path) -> str:
    path = tmp_path / "quick.toml"
    path.write_text(QUICK.format(memory=3))
    return str(path)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("HELIXNET_ARTIFACT", raising=False)
    return str(write(tmp_path, small_artifact()))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_json_holds_a_whole_plan(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick, *BRIEFLY)
    covered = {layer for start, stop in answer["placement"].values() for layer in range(start, stop)}
    assert covered == set(range(6))
    entering = sum(rate for source, _, rate in answer["edges"] if source == "clients")
    assert entering == pytest.approx(answer["flow"])
    assert 0 < answer["flow"] <= answer["bound"] * 1.000001
    assert answer["prediction"].keys() == {"tokens_per_s", "ttft_s", "tpot_s", "bottleneck"}
    assert answer["seconds"] > 0
    assert set(answer["rates"].values()) == {"catalogue"}


@pytest.mark.slow
def test_the_same_file_gives_the_same_plan(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [said(capsys, quick), said(capsys, quick)]
    for answer in answers:
        del answer["seconds"]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("objective", ["throughput", "latency", "throughput-paper"])
def test_every_objective_plans(quick: str, objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick, "--objective", objective, *BRIEFLY)
    assert answer["objective"] == objective
    assert answer["flow"] > 0


def test_adding_and_removing_shows_the_difference(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick, "--add", "rtx4090", "--remove", "a-1", *BRIEFLY)
    change = answer["change"]
    assert "a-1" in change["before"]["placement"]
    assert change["moved_bytes"] == change["migration"]["bytes"] > 0
    assert change["migration"]["seconds"] > 0
    assert {"peer": "rtx4090", "from": None, "to": answer["placement"]["rtx4090"]} in change["migration"]["moves"]
    main(["plan", quick, "--remove", "a-1", *BRIEFLY])
    shown = capsys.readouterr().out
    assert "before:" in shown
    assert "if nobody moved" in shown


def test_the_order_of_the_moves_leads_from_one_placement_to_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "roomy.toml"
    path.write_text(QUICK.format(memory=5))
    answer = said(capsys, str(path), "--remove", "a-1", "--objective", "throughput-paper", *BRIEFLY)
    before, order = answer["change"]["before"]["placement"], answer["change"]["migration"]["order"]
    held = {name: set(range(*before[name])) for name in ("a-2", "a-3")}
    covered = set().union(*held.values())
    for name, verb, spans in order:
        layers = {layer for start, stop in spans for layer in range(start, stop)}
        assert layers and (layers.isdisjoint(held[name]) if verb == "load" else layers <= held[name])
        held[name] ^= layers
        assert covered <= set().union(*held.values())
    assert held == {name: set(range(*span)) for name, span in answer["placement"].items()}


def test_moves_are_told_layer_by_layer_and_those_without_an_order_are_told_so() -> None:
    def told(*order: Turn, none: bool = False) -> list[str]:
        moves = Moves(
            moves=(Move(peer="a", held=Span(0, 3), span=Span(2, 6)),),
            bytes=3_000_000_000,
            seconds=30.0,
            order=None if none else order,
        )
        return movement(Change(before=None, problem="", unmoved_tokens_per_s=0.0, moved_peers=1, migration=moves))

    load = Turn(peer="a", load=True, layers=(Span(3, 6),))
    drop = Turn(peer="a", load=False, layers=(Span(0, 1), Span(2, 3)))
    assert told(load, drop) == [
        "1 peer would change spans; 3 GB of weights to load, in about 30 s",
        "such that no layer is uncovered on the way: a loads 3-5, then a drops 0 and 2",
    ]
    assert told(*[load] * 15)[1].endswith("; 3 more are in --json")
    assert told(none=True)[1] == "no order of these moves keeps every layer covered on the way"


def test_a_cluster_that_was_too_small_can_be_helped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(QUICK.format(memory=1))
    assert main(["plan", str(path)]) == 4
    assert "missing" in capsys.readouterr().err
    change = said(capsys, str(path), "--add", "rtx4090", *BRIEFLY)["change"]
    assert change["before"] is None
    assert "missing" in change["problem_before"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("/nowhere.toml",), "cannot be read", id="no-file"),
        pytest.param((EXAMPLE, "--seconds", "nan"), "--seconds is more than 0", id="nan-seconds"),
        pytest.param((EXAMPLE, "--survive", "1"), "--survive is a share", id="survive-all"),
        pytest.param((EXAMPLE, "--survive", "nan"), "--survive is a share", id="survive-nan"),
        pytest.param(
            (EXAMPLE, "--survive", "0.5", "--objective", "throughput-paper"), "other objectives", id="survive-paper"
        ),
        pytest.param((EXAMPLE, "--add", "rtx9999@home"), "no GPU 'rtx9999'", id="unknown-gpu"),
        pytest.param((EXAMPLE, "--add", "t4@mars"), "region 'mars'", id="unknown-region"),
        pytest.param((EXAMPLE, "--remove", "zoe"), "no peer 'zoe'", id="unknown-peer"),
    ],
)
def test_what_cannot_be_planned_gets_a_sentence(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_example_is_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.html"
    assert main(["plan", EXAMPLE, *BRIEFLY, "--html", str(picture)]) == 0
    shown = capsys.readouterr().out
    for words in ("% of the proven bound", "bottleneck:", "≈ catalogue", "first token"):
        assert words in shown
    text = picture.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.split("\n", 1)[1])  # well-formed: it parses as XML
    assert "<script" not in text
    assert not re.search(r"https?://|@import|url\(", text)
    labels = {element.text for element in root.iter("text")}
    for name in ("rack-1", "rack-2", "workstation-3", "server-room", "anna", "ben", "chris", "office", "home"):
        assert name in labels


def test_names_from_the_file_cannot_write_markup(
    quick: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.html"
    main(["plan", quick, *BRIEFLY, "--html", str(picture)])
    assert "<tiny>" in capsys.readouterr().out
    assert "<tiny>" not in picture.read_text(encoding="utf-8")


def test_a_comparison_has_the_plan_first_and_the_baselines(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick, "--compare", "--seconds", "0.3")
    rows = {row["name"]: row for row in answer["comparison"]}
    assert next(iter(rows)) == "this plan"
    assert {"petals", "uniform", "parallax"} <= rows.keys()
    assert rows["this plan"]["flow"] == pytest.approx(answer["flow"], rel=1e-3)
    assert rows["this plan"]["tokens_per_s"] == pytest.approx(answer["prediction"]["tokens_per_s"], rel=0.1)
    figures = [(point["tokens_per_s"], point["tpot_s"]) for point in answer["front"]]
    assert figures
    assert figures == sorted(figures, reverse=True)
    for point in answer["front"]:
        assert {layer for start, stop in point["placement"].values() for layer in range(start, stop)} == set(range(6))
        assert rows[point["name"]]["tpot_s"] == point["tpot_s"]


def test_a_comparison_is_shown_below_the_plan(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", quick, "--compare", *BRIEFLY]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^\| this plan +\| +[0-9.]+ \|", shown, re.MULTILINE)
    assert shown.index("bottleneck:") < shown.index("| petals") < shown.index("Pareto front of tokens/s")
    assert "crossings" not in shown  # all stand in one place


def test_regions_of_the_file_tell_what_crosses(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, EXAMPLE, "--compare", *BRIEFLY)
    assert all(row["crossings"] is not None for row in answer["comparison"])


def test_without_a_comparison_or_a_floor_there_are_no_such_keys(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not {"comparison", "front", "survives"} & said(capsys, quick, *BRIEFLY).keys()


@pytest.mark.slow
def test_a_plan_survives_what_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "roomy.toml"
    path.write_text(QUICK.format(memory=8))
    survives = said(capsys, str(path), "--survive", "0.6")["survives"]
    assert survives["asked"] == 0.6
    assert survives["share"] >= 0.6
    assert survives["reached"]
    assert survives["without"] in {"a-1", "a-2", "a-3"}
    assert main(["plan", str(path), "--survive", "0.6", "--seconds", "1"]) == 0
    assert "worst departure: if a-" in capsys.readouterr().out


def test_a_plan_that_cannot_survive_says_so_and_fails(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", quick, "--survive", "0.6", *BRIEFLY, "--json"]) == 1
    out, err = capsys.readouterr()
    survives = json.loads(out)["survives"]
    assert survives["share"] < 0.6
    assert not survives["reached"]
    assert "not the 60 % asked for" in err
    assert "room for 9 layers" in err


THREE = ("--instance", "three", "--model", "tiny")


def test_an_artifacts_plan_has_the_same_keys(artifact: str, quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "--artifact", artifact, *THREE, *BRIEFLY)
    assert answer.keys() == said(capsys, quick, *BRIEFLY).keys()
    covered = {layer for start, stop in answer["placement"].values() for layer in range(start, stop)}
    assert covered == set(range(6))
    assert set(answer["placement"]) <= {"0", "1", "2"}
    assert {edge[0] for edge in answer["edges"]} & {edge[1] for edge in answer["edges"]} >= {"clients"}
    assert 0 < answer["flow"] <= answer["bound"] * 1.000001
    assert answer["flow_per_token"] == 4.0
    assert answer["prediction"]["tokens_per_s"] <= answer["flow"] / 4 * 1.000001
    assert set(answer["rates"].values()) == {"paper"}


def test_links_count_in_full_for_the_papers_objective_alone(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Machine 0 is the only entry and 1 the only way on: everything passes 1 -> 2 at 50 tokens/s, or ends in 1.
    links = json.loads((Path(artifact) / "clusters.json").read_text())
    links["three"]["links_bandwidth_Bps_latency_ms"]["0-1"] = [1020, 2.0]  # 10 tokens/s
    (Path(artifact) / "clusters.json").write_text(json.dumps(links))
    paper = said(capsys, "--artifact", artifact, *THREE, "--objective", "throughput-paper")
    assert paper["flow"] == pytest.approx(10.0)
    assert said(capsys, "--artifact", artifact, *THREE)["flow"] == pytest.approx(5.0)


def test_an_artifact_is_shown_and_drawn(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.html"
    assert main(["plan", "--artifact", artifact, *THREE, *BRIEFLY, "--html", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "prompt tokens included" in shown
    assert "catalogue:" not in shown
    assert "BIG" in picture.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_machine_of_an_artifact_can_be_removed(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "--artifact", artifact, *THREE, "--remove", "2")
    assert answer["placement"] == {"0": [0, 4], "1": [4, 6]}
    assert "2" in answer["change"]["before"]["placement"]
    assert answer["change"]["moved_bytes"] % 1_000_000 == 0


@pytest.mark.slow
def test_an_artifacts_stored_placements_are_compared_but_for_parts(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [row["name"] for row in said(capsys, "--artifact", artifact, *THREE, "--compare", *BRIEFLY)["comparison"]]
    assert [name for name in names if name.startswith("stored")] == ["stored chain"]
    without = said(capsys, "--artifact", artifact, *THREE, "--compare", *BRIEFLY, "--remove", "2")["comparison"]
    assert not [row for row in without if row["name"].startswith("stored")]
    (Path(artifact) / "placements.json").unlink()
    assert said(capsys, "--artifact", artifact, *THREE, "--compare", *BRIEFLY)["front"]


def test_the_papers_objective_is_compared_by_its_own_flow(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "--artifact", artifact, *THREE, "--compare", *BRIEFLY, "--objective", "throughput-paper")
    assert answer["comparison"][0]["flow"] == pytest.approx(answer["flow"])
    assert all(row["flow"] <= answer["flow"] * 1.000001 for row in answer["comparison"])


def test_the_variable_stands_for_the_artifact_where_an_instance_is_named(
    artifact: str, quick: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIXNET_ARTIFACT", artifact)
    assert said(capsys, *THREE, *BRIEFLY)["model"] == "tiny"
    assert said(capsys, quick, *BRIEFLY)["model"] == "<tiny>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((), "Give a cluster file, or --artifact DIR", id="nothing"),
        pytest.param((EXAMPLE, "--artifact", "ARTIFACT", *THREE), "not both", id="both"),
        pytest.param((EXAMPLE, *THREE), "not both", id="file-and-instance"),
        pytest.param(THREE, "HELIXNET_ARTIFACT", id="no-folder"),
        pytest.param(("--artifact", "/nowhere", *THREE), "/nowhere/clusters.json cannot be read", id="empty-folder"),
        pytest.param(("--artifact", "ARTIFACT"), "it has three", id="no-instance"),
        pytest.param(("--artifact", "ARTIFACT", *THREE[:2]), "it has tiny", id="no-model"),
        pytest.param(("--artifact", "ARTIFACT", *THREE, "--add", "t4"), "cluster files only", id="add"),
        pytest.param(("--artifact", "ARTIFACT", *THREE, "--remove", "3"), "no peer '3'", id="remove-nobody"),
        pytest.param(("--artifact", "ARTIFACT", *THREE, "--remove", "0", "1", "2"), "leaves nobody", id="remove-all"),
    ],
)
def test_what_is_wrong_with_an_artifact_gets_a_sentence(
    arguments: tuple[str, ...], words: str, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(artifact if word == "ARTIFACT" else word for word in arguments)]) == 2
    assert words in capsys.readouterr().err

"""`helixnet plan`, run in this process on the example file."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from helixnet.daemon.cli import main

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "office-and-home.toml")
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


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_json_holds_a_whole_plan(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick)
    covered = {layer for start, stop in answer["placement"].values() for layer in range(start, stop)}
    assert covered == set(range(6))
    entering = sum(rate for source, _, rate in answer["edges"] if source == "clients")
    assert entering == pytest.approx(answer["flow"])
    assert 0 < answer["flow"] <= answer["bound"] * 1.000001
    assert answer["prediction"].keys() == {"tokens_per_s", "ttft_s", "tpot_s", "bottleneck"}
    assert answer["seconds"] > 0
    assert set(answer["rates"].values()) == {"catalogue"}


def test_the_same_file_gives_the_same_plan(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [said(capsys, quick), said(capsys, quick)]
    for answer in answers:
        del answer["seconds"]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("objective", ["throughput", "latency", "throughput-paper"])
def test_every_objective_plans(quick: str, objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, quick, "--objective", objective, "--seconds", "0.3")
    assert answer["objective"] == objective
    assert answer["flow"] > 0


def test_adding_and_removing_shows_the_difference(quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    change = said(capsys, quick, "--add", "rtx4090", "--remove", "a-1")["change"]
    assert "a-1" in change["before"]["placement"]
    assert change["moved_bytes"] > 0
    main(["plan", quick, "--remove", "a-1"])
    shown = capsys.readouterr().out
    assert "before:" in shown
    assert "if nobody moved" in shown


def test_a_cluster_that_was_too_small_can_be_helped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(QUICK.format(memory=1))
    assert main(["plan", str(path)]) == 4
    assert "missing" in capsys.readouterr().err
    change = said(capsys, str(path), "--add", "rtx4090")["change"]
    assert change["before"] is None
    assert "missing" in change["problem_before"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("/nowhere.toml",), "cannot be read", id="no-file"),
        pytest.param((EXAMPLE, "--seconds", "nan"), "--seconds is more than 0", id="nan-seconds"),
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
    assert main(["plan", EXAMPLE, "--seconds", "0.3", "--html", str(picture)]) == 0
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
    main(["plan", quick, "--html", str(picture)])
    assert "<tiny>" in capsys.readouterr().out
    assert "<tiny>" not in picture.read_text(encoding="utf-8")

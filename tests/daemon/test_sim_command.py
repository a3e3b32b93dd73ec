"""`helixnet sim`, run in this process on a scenario small enough for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixnet.core.errors import UsageError
from helixnet.core.route.request import Request, RequestConfig
from helixnet.daemon.cli import main
from helixnet.daemon.sim_command import IN_FLIGHT_MAX, LOADS_MAX, parse_loads
from helixnet.sim.scenarios import SCENARIOS, Options, Scenario
from helixnet.sim.simulation import Setup
from tests.sim.small_simulation import small_setup

CLUSTER = """
[model]
name = "tiny"
layers = 4
hidden_size = 64
kv_heads = 2
head_dim = 16
layer_mb = 900
[workload]
prompt_tokens = 20
output_tokens = 10
[[peers]]
name = "a"
gpu = "rtx4060"
memory_gb = 3
count = 2
[links]
default = { round_trip_ms = 1, mbit = 900 }
"""


def small(options: Options) -> Setup:
    per_s = options.per_s or (0.0 if options.in_flight else 1.5)
    return small_setup(options.seed, per_s, options.in_flight or 0, seconds=options.seconds or 16.0)


def impatient(options: Options) -> Setup:
    """No request waits long enough for its first token."""
    return replace(small(options), request=RequestConfig(patience_s=0.001, unserved_s=0.001))


@pytest.fixture(autouse=True)
def small_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "small", Scenario("small", "for tests", small))
    monkeypatch.setitem(SCENARIOS, "impatient", Scenario("impatient", "for tests", impatient))


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["sim", *arguments, "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_json_holds_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, "small", "--seed", "5", "--ttft", "3", "--tpot", "0.2")
    assert (answer["name"], answer["seed"], answer["lost"], answer["tokens_wrong"]) == ("small", 5, 0, 0)
    assert answer["limits"] == {"ttft_s": 3.0, "tpot_s": 0.2}
    assert answer["tokens_per_s"] > 0
    assert answer["asked"] == answer["ended"] > 0


def test_a_seed_is_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    digests = [said(capsys, "small", "--seed", seed)["digest"] for seed in ("1", "1", "2")]
    assert digests[0] == digests[1] != digests[2]


def test_a_person_reads_what_was_served_and_what_limited_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "small"]) == 0
    shown = capsys.readouterr()
    for words in ("served", "TTFT", "limited by", "predicted", "asked, 0 lost", "events in", "digest"):
        assert words in shown.out
    assert shown.err == "", "no bar where there is no terminal"


@pytest.mark.parametrize(
    ("load", "per_s", "in_flight"),
    [
        pytest.param("5rps", [5.0], [None], id="rate"),
        pytest.param(".5rps", [0.5], [None], id="half"),
        pytest.param("32", [None], [32], id="in-flight"),
        pytest.param("1rps, 2.5rps", [1.0, 2.5], [None, None], id="sweep"),
        pytest.param(None, [None], [None], id="the-scenario's"),
    ],
)
def test_a_load_is_a_rate_or_so_many_in_flight(
    load: str | None, per_s: list[float | None], in_flight: list[int | None]
) -> None:
    loads = parse_loads(load)
    assert [one.per_s for one in loads] == per_s
    assert [one.in_flight for one in loads] == in_flight


@pytest.mark.parametrize(
    "load",
    [
        *("", "rps", "0rps", "-1rps", "nanrps", "infrps", "1e3rps", "5 rps", "0", "1.5", "x", "1rps,", "1rps,4"),
        *(str(IN_FLIGHT_MAX + 1), ",".join(["1"] * (LOADS_MAX + 1))),
    ],
)
def test_what_is_no_load_gets_a_sentence(load: str) -> None:
    with pytest.raises(UsageError, match=r"--load .+\."):
        parse_loads(load)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((), "Say which scenario", id="nothing"),
        pytest.param(("smal",), "Did you mean small?", id="misspelt"),
        pytest.param(("small", "--cluster", "x.toml"), "not both", id="both"),
        pytest.param(("--cluster", "/nowhere.toml"), "cannot be read", id="no-file"),
        pytest.param(("--cluster", "x.toml", "--peers", "3"), "--peers goes with scenarios", id="peers-of-a-file"),
        pytest.param(("small", "--peers", "0"), "--peers is more than 0", id="no-peers"),
        pytest.param(("small", "--hours", "nan"), "--hours is more than 0", id="nan-hours"),
        pytest.param(("small", "--hours", "1000"), "at most 168", id="too-long"),
        pytest.param(("small", "--ttft", "-1"), "--ttft is more than 0", id="negative-limit"),
        pytest.param(("small", "--seeds", "3"), "--seeds goes with", id="seeds-of-a-scenario"),
        pytest.param(("small", "--report", __file__), "cannot make the folder", id="report-is-a-file"),
        pytest.param(("fuzz", "--seeds", "0"), "--seeds is more than 0", id="no-seeds"),
        pytest.param(("fuzz", "--load", "1rps"), "--load does not go with", id="load-of-fuzz"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1


def test_the_list_says_what_each_scenario_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*SCENARIOS, "fuzz"):
        assert name in shown


def test_a_lost_request_is_exit_code_1_and_a_command_that_brings_it_back(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sim", "impatient", "--seed", "4", "--hours", "0.002", "--load", "2rps"]
    assert main(command) == 1
    complaint = capsys.readouterr().err
    assert "requests were lost" in complaint
    assert f"helixnet {' '.join(command)}" in complaint


def test_a_broken_invariant_is_exit_code_1_and_a_command_that_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Request._take

    def twice(self: Request, message: object, now: float) -> object:
        effects = honest(self, message, now)  # type: ignore[arg-type]
        self.tokens.append(self.tokens[-1])
        return effects

    monkeypatch.setattr(Request, "_take", twice)
    assert main(["sim", "small", "--seed", "7"]) == 1
    complaint = capsys.readouterr().err
    assert "invariant broke" in complaint and "undisturbed model" in complaint
    assert "helixnet sim small --seed 7" in complaint


@pytest.mark.slow
def test_a_report_is_a_folder_of_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "report"
    assert main(["sim", "small", "--report", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    pictures = {f"{name}.{kind}" for name in ("throughput", "latency", "utilisation") for kind in ("svg", "png")}
    assert names == {"report.md", "report.json", "flow.svg", *pictures}
    text = (folder / "report.md").read_text()
    assert "helixnet sim small --seed 0" in text
    assert all(f"]({name})" in text for name in names if name.endswith(".svg"))
    assert json.loads((folder / "report.json").read_text())["lost"] == 0
    assert str(folder) in capsys.readouterr().out


def test_without_matplotlib_the_tables_are_written_and_a_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["sim", "small", "--report", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "flow.svg"}
    assert "pip install 'matplotlib" in capsys.readouterr().err


def test_several_loads_are_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = said(capsys, "small", "--load", "0.5rps,1rps", "--report", str(tmp_path))
    assert [one["per_s"] for one in answer["sweep"]] == [0.5, 1.0]
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "load-0.5rps", "load-1rps"}
    assert "| 1 request/s |" in (tmp_path / "report.md").read_text()
    assert "--load 1rps" in (tmp_path / "load-1rps" / "report.md").read_text()


def test_machines_of_a_cluster_file_are_simulated_with_its_typical_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER)
    answer = said(capsys, "--cluster", str(path), "--load", "2", "--hours", "0.005")
    assert (answer["name"], answer["model"], answer["machines"]) == ("mine", "tiny", 2)
    assert {one["peer"] for one in answer["peers"]} == {"a-1", "a-2"}
    assert answer["in_flight"] == 2 and answer["lost"] == 0


def test_machines_that_cannot_hold_the_model_are_not_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER.replace("memory_gb = 3", "memory_gb = 1"))
    assert main(["sim", "--cluster", str(path)]) == 4
    assert "missing" in capsys.readouterr().err


def test_fuzz_plays_so_many_stories(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "fuzz", "--seed", "3", "--seeds", "2") == {"seed": 3, "seeds": 2, "failures": []}
    assert main(["sim", "fuzz", "--seeds", "1"]) == 0
    assert "1 story from seed 0 on" in capsys.readouterr().out


def test_a_story_that_goes_wrong_is_told_with_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("helixnet.sim.fuzz.play", lambda _: "a token was lost")
    monkeypatch.setattr("helixnet.sim.fuzz.shrink", lambda setup: setup)
    assert main(["sim", "fuzz", "--seed", "8", "--seeds", "1"]) == 1
    shown = capsys.readouterr()
    assert "1 went wrong" in shown.out
    assert "a token was lost" in shown.err
    assert "helixnet sim fuzz --seed 8 --seeds 1" in shown.err


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom helixnet.daemon.cli import main\n"
        "try:\n    main(['sim', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', [name for name in ('torch', 'numpy', 'matplotlib', 'helixnet.sim') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert "example:\n  helixnet sim" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"

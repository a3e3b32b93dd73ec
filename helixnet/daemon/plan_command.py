"""`helixnet plan`: what a swarm of these machines would do, without any of them."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from helixnet.core.errors import CapacityError, UsageError
from helixnet.daemon.arguments import add_command

if TYPE_CHECKING:
    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.plan_report import Change, PlanReport
    from helixnet.planner.case import Case
    from helixnet.planner.cluster_file import ClusterFile
    from helixnet.planner.objective import Objective
    from helixnet.planner.problem import Spans
    from helixnet.planner.solve import Budget

EXAMPLE = "helixnet plan examples/office-and-home.toml --add rtx5090@home --html plan.html"
OBJECTIVES = ("throughput", "balanced", "latency", "throughput-paper")
ARTIFACT = "HELIXNET_ARTIFACT"
"""The variable that may stand for --artifact."""
SECONDS_MAX = 3600.0
WORK_UNITS_PER_S = 125_000
"""A unit of the search's work is about 8 microseconds; the clock ends what turns out slower."""
FILE_BYTES_MAX = 8_000_000
HELP = """

keys of --json (the last line of the output):
  placement {peer: [start, stop]}, edges [[from, to, tokens/s]] (the clients are "clients"), flow, bound, seconds,
  flow_per_token (tokens of flow for each answered one: of an artifact, prompt tokens count too),
  prediction {tokens_per_s, ttft_s, tpot_s, bottleneck}, model, layers, objective, rates {peer: where they come from};
  with --add or --remove also change {before, problem_before, unmoved_tokens_per_s, moved_peers, moved_bytes}
Spans are half-open. docs/planning.md explains the cluster file, the artifact and the picture."""


def add_plan_parser(commands: Commands) -> None:
    """Add the `plan` command."""
    parser = add_command(
        commands, "plan", "say what a swarm of given machines would serve, and why not more", EXAMPLE + HELP
    )
    parser.add_argument("cluster", metavar="CLUSTER", nargs="?", help="cluster file, TOML or JSON")
    parser.add_argument(
        "--artifact",
        metavar="DIR",
        help=f"instead: instances of the Helix paper as data (or {ARTIFACT}, with --instance)",
    )
    parser.add_argument("--instance", metavar="NAME", help="which cluster of the artifact, such as single24")
    parser.add_argument("--model", metavar="NAME", help="which model of the artifact, such as llama70b")
    parser.add_argument("--objective", choices=OBJECTIVES, default="balanced", help="what to aim for (balanced)")
    parser.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="GPU@REGION",
        help="as if these joined: devices of the catalogue",
    )
    parser.add_argument(
        "--remove", nargs="+", action="extend", default=[], metavar="NAME", help="as if these peers left"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="search about so long (default: a fixed effort)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same plan (0)")
    parser.add_argument("--html", metavar="FILE", help="write a picture of the plan, one file for any browser")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.set_defaults(func=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan for what is given, and for what becomes of it, and print both.

    Raises:
        UsageError: a file or a flag says something that cannot be.
        CapacityError: the peers cannot hold the model.
    """
    import msgspec
    from rich.console import Console

    from helixnet.daemon.plan_picture import page
    from helixnet.daemon.plan_view import render

    if arguments.seconds is not None and not 0 < arguments.seconds <= SECONDS_MAX:  # NaN too
        raise UsageError(f"--seconds is more than 0 and at most {SECONDS_MAX:.0f}, not {arguments.seconds:g}.")
    shown, change = what_if(*cases(arguments), arguments)
    if arguments.html:
        Path(arguments.html).write_text(page(shown, change), encoding="utf-8")
    if arguments.json:
        said = shown.as_json() | ({"change": change.as_json()} if change is not None else {})
        print(msgspec.json.encode(said).decode(), flush=True)
    else:
        Console(highlight=False).print(render(shown, change))
    return 0


def cases(arguments: argparse.Namespace) -> tuple[Case, Case | None]:
    """What is to be planned for, and what becomes of it if peers are added or removed.

    Raises:
        UsageError: not exactly one of a cluster file and an artifact is given, or what is given cannot be.
    """
    from helixnet.planner.case import of_cluster
    from helixnet.planner.cluster import build
    from helixnet.planner.cluster_file import change

    folder = arguments.artifact or (os.environ.get(ARTIFACT) if arguments.instance else None)
    if arguments.cluster is not None and (folder or arguments.instance or arguments.model):
        raise UsageError("Give either a cluster file or --artifact DIR with --instance and --model, not both.")
    if folder:
        return _artifact_cases(Path(folder), arguments)
    if arguments.instance or arguments.model:
        raise UsageError(
            f"--instance and --model are parts of an artifact: give its folder with --artifact or {ARTIFACT}."
        )
    if arguments.cluster is None:
        raise UsageError("Give a cluster file, or --artifact DIR with --instance and --model.")
    file = read_file(Path(arguments.cluster))
    now = of_cluster(build(file))
    if not arguments.add and not arguments.remove:
        return now, None
    return now, of_cluster(build(change(file, arguments.add, arguments.remove)))


def _artifact_cases(folder: Path, arguments: argparse.Namespace) -> tuple[Case, Case | None]:
    from helixnet.planner.artifact import Artifact
    from helixnet.planner.problem import LINK_SHARE

    artifact = Artifact(folder)
    for flag, given, names in (
        ("--instance", arguments.instance, artifact.instances()),
        ("--model", arguments.model, artifact.models()),
    ):
        if not given:
            raise UsageError(f"Say which {flag} of {folder}: it has {', '.join(names)}.")
    if arguments.add:
        raise UsageError("--add works for cluster files only: nothing says how fast others are beside an artifact's.")
    share = 1.0 if arguments.objective == "throughput-paper" else LINK_SHARE
    now = artifact.case(arguments.instance, arguments.model, share)
    return now, now.without(arguments.remove) if arguments.remove else None


def read_file(path: Path) -> ClusterFile:
    """The entries of a cluster file on disk; JSON if it is called so, else TOML.

    Raises:
        UsageError: it cannot be read, or says something that cannot be.
    """
    from helixnet.planner.cluster_file import parse

    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise UsageError(f"The cluster file {path} is larger than {FILE_BYTES_MAX // 10**6} MB.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The cluster file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"The cluster file {path} is not text in UTF-8.") from None
    return parse(text, is_json=path.suffix.lower() == ".json")


def what_if(now: Case, then: Case | None, arguments: argparse.Namespace) -> tuple[PlanReport, Change | None]:
    """The plan for what is there and, if peers are added or removed, for what is there then with what changed."""
    from helixnet.daemon.plan_report import changed

    if then is None:
        return _solve(now, arguments)[0], None
    before, placed, problem = None, None, ""
    try:
        before, placed = _solve(now, arguments)
    except CapacityError as error:
        problem = str(error)
    unmoved = 0.0
    if placed is not None:
        stayed = then.spans_of(now, placed)
        unmoved = _served(then, stayed, arguments)
        then = then.holding(stayed)
    shown, _ = _solve(then, arguments)
    return shown, changed(before, problem, shown, then.layer_bytes, unmoved)


def _served(case: Case, spans: Spans, arguments: argparse.Namespace) -> float:
    """Tokens/s of a placement as it is."""
    from helixnet.planner.flow import max_flow
    from helixnet.planner.predict import forecast

    routing = max_flow(case.problem, spans, _objective(arguments.objective).model, final=True)
    return forecast(case.problem, spans, routing).tokens_per_s


def _solve(case: Case, arguments: argparse.Namespace) -> tuple[PlanReport, Spans]:
    from helixnet.daemon.plan_report import report
    from helixnet.planner.solve import place

    objective = _objective(arguments.objective)
    began = time.perf_counter()
    ends = began + (arguments.seconds or math.inf)
    spans = place(
        case.problem,
        arguments.seed,
        _budget(arguments.seconds),
        objective,
        cancelled=lambda: time.perf_counter() >= ends,
    )
    return report(case, spans, arguments.objective, objective, time.perf_counter() - began), spans


def _objective(name: str) -> Objective:
    from helixnet.planner.objective import PRESETS

    return PRESETS[name]


def _budget(seconds: float | None) -> Budget | None:
    from helixnet.planner.solve import Budget

    if seconds is None:
        return None
    work = max(1, int(seconds * WORK_UNITS_PER_S))
    return Budget(work=work, work_per_peer=0, work_max=work)

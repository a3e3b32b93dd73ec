"""`helixnet plan`: what a swarm of these machines would do, without any of them."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from helixnet.core.errors import CapacityError, UsageError
from helixnet.daemon.arguments import add_command

if TYPE_CHECKING:
    from helixnet.core.plan.plan import Placement
    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.plan_report import Change, PlanReport
    from helixnet.planner.cluster import Cluster
    from helixnet.planner.cluster_file import ClusterFile
    from helixnet.planner.objective import Objective
    from helixnet.planner.solve import Budget

EXAMPLE = "helixnet plan examples/office-and-home.toml --add rtx5090@home --html plan.html"
OBJECTIVES = ("throughput", "balanced", "latency", "throughput-paper")
SECONDS_MAX = 3600.0
WORK_UNITS_PER_S = 125_000
"""A unit of the search's work is about 8 microseconds; the clock ends what turns out slower."""
FILE_BYTES_MAX = 8_000_000
HELP = """

keys of --json (the last line of the output):
  placement {peer: [start, stop]}, edges [[from, to, tokens/s]] (the clients are "clients"), flow, bound, seconds,
  prediction {tokens_per_s, ttft_s, tpot_s, bottleneck}, model, layers, objective, rates {peer: where they come from};
  with --add or --remove also change {before, problem_before, unmoved_tokens_per_s, moved_peers, moved_bytes}
Spans are half-open. docs/planning.md explains the cluster file and the picture."""


def add_plan_parser(commands: Commands) -> None:
    """Add the `plan` command."""
    parser = add_command(
        commands, "plan", "say what a swarm of given machines would serve, and why not more", EXAMPLE + HELP
    )
    parser.add_argument("cluster", metavar="CLUSTER", help="cluster file, TOML or JSON")
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
    """Plan the file's cluster, and what becomes of it, and print both.

    Raises:
        UsageError: the file or a flag says something that cannot be.
        CapacityError: the peers cannot hold the model.
    """
    import msgspec
    from rich.console import Console

    from helixnet.daemon.plan_picture import page
    from helixnet.daemon.plan_view import render

    if arguments.seconds is not None and not 0 < arguments.seconds <= SECONDS_MAX:  # NaN too
        raise UsageError(f"--seconds is more than 0 and at most {SECONDS_MAX:.0f}, not {arguments.seconds:g}.")
    file = read_file(Path(arguments.cluster))
    shown, change = what_if(file, arguments)
    if arguments.html:
        Path(arguments.html).write_text(page(shown, change), encoding="utf-8")
    if arguments.json:
        said = shown.as_json() | ({"change": change.as_json()} if change is not None else {})
        print(msgspec.json.encode(said).decode(), flush=True)
    else:
        Console(highlight=False).print(render(shown, change))
    return 0


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


def what_if(file: ClusterFile, arguments: argparse.Namespace) -> tuple[PlanReport, Change | None]:
    """The plan that is asked for, and what changed if peers were added or removed."""
    from helixnet.daemon.plan_report import changed
    from helixnet.planner.cluster import build
    from helixnet.planner.cluster_file import change as change_file
    from helixnet.planner.solve import evaluate

    cluster = build(file)
    if not arguments.add and not arguments.remove:
        return _solve(cluster, arguments)[0], None
    after = build(change_file(file, arguments.add, arguments.remove))
    before, placed, problem = None, None, ""
    try:
        before, placed = _solve(cluster, arguments)
    except CapacityError as error:
        problem = str(error)
    unmoved = 0.0
    if placed is not None:
        model = _objective(arguments.objective).model
        stayed = evaluate(after.snapshot, placed.assignments, model, after.workload)
        unmoved = stayed.prediction.tokens_per_s
        after = _holding(after, placed)
    shown, placement = _solve(after, arguments)
    return shown, changed(before, problem, shown, after.snapshot.manifest, placement, unmoved)


def _holding(cluster: Cluster, placement: Placement) -> Cluster:
    """The cluster when its peers hold what they were given, so that moving them away counts."""
    from dataclasses import replace

    import msgspec

    held = {assignment.peer: assignment.span for assignment in placement.assignments}
    views = tuple(msgspec.structs.replace(view, held=held.get(view.peer)) for view in cluster.snapshot.peers)
    return replace(cluster, snapshot=msgspec.structs.replace(cluster.snapshot, peers=views))


def _solve(cluster: Cluster, arguments: argparse.Namespace) -> tuple[PlanReport, Placement]:
    from helixnet.daemon.plan_report import report
    from helixnet.planner.solve import solve

    objective = _objective(arguments.objective)
    began = time.perf_counter()
    ends = began + (arguments.seconds or math.inf)
    placement = solve(
        cluster.snapshot,
        arguments.seed,
        _budget(arguments.seconds),
        objective,
        cancelled=lambda: time.perf_counter() >= ends,
        workload=cluster.workload,
    )
    return report(cluster, placement, arguments.objective, objective, time.perf_counter() - began), placement


def _objective(name: str) -> Objective:
    from helixnet.planner.objective import PRESETS

    return PRESETS[name]


def _budget(seconds: float | None) -> Budget | None:
    from helixnet.planner.solve import Budget

    if seconds is None:
        return None
    work = max(1, int(seconds * WORK_UNITS_PER_S))
    return Budget(work=work, work_per_peer=0, work_max=work)

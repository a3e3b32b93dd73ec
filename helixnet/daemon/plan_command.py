"""`helixnet plan`: what a swarm of these machines would do, without any of them."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helixnet.core.errors import CapacityError, UsageError
from helixnet.daemon.arguments import add_command

if TYPE_CHECKING:
    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.plan_comparison import PlanComparison
    from helixnet.daemon.plan_report import Change, PlanReport
    from helixnet.planner.case import Case
    from helixnet.planner.cluster_file import ClusterFile
    from helixnet.planner.objective import Objective
    from helixnet.planner.problem import Problem, Spans
    from helixnet.planner.solve import Budget

EXAMPLE = "helixnet plan examples/office-and-home.toml --add rtx5090@home --html plan.html"
OBJECTIVES = ("throughput", "balanced", "latency", "throughput-paper")
ARTIFACT = "HELIXNET_ARTIFACT"
"""The variable that may stand for --artifact."""
SECONDS_MAX = 3600.0
WORK_UNITS_PER_S = 125_000
"""A unit of the search's work is about 8 microseconds; the clock ends what turns out slower."""
CELLS_PER_S, LAYING_SHARE = 50_000_000, 0.2
"""Array cells that laying and polishing fill, and the share of the time for laying where the search comes after."""
SMALL_PEERS = 12
"""Larger swarms get more effort from a person's command than from a live swarm, which plans again and again: some
fifteen seconds."""
LARGE_WORK, LARGE_LAYING_WORK, LARGE_LAYING_WORK_PER_PEER = 1_000_000, 150_000_000, 6_000_000
FRONT_WORK, FRONT_LAYING_WORK, FRONT_LAYING_WORK_PER_PEER = 100_000, 10_000_000, 500_000
"""Likewise for each placement of the front; about a second."""
NOT_SURVIVED = 1
"""Exit code of a plan that leaves less than --survive asks for."""
FILE_BYTES_MAX = 8_000_000
HELP = """

keys of --json (the last line of the output):
  placement {peer: [start, stop]}, edges [[from, to, tokens/s]] (the clients are "clients"), flow, bound, seconds,
  flow_per_token (tokens of flow for each answered one: of an artifact, prompt tokens count too),
  prediction {tokens_per_s, ttft_s, tpot_s, bottleneck}, model, layers, objective, rates {peer: where they come from};
  with --add or --remove also change {before, problem_before, unmoved_tokens_per_s, moved_peers, moved_bytes,
  migration {moves [{peer, from, to}], bytes, seconds, order [[peer, "load" or "drop", spans]] or null}}
  with --survive also survives {share, asked, reached, without: whose departure leaves least, estimated, room, needed}
  with --compare also comparison [{name, flow, tokens_per_s, ttft_s, tpot_s, hops, crossings, sessions}], this plan
  first, and front: those of which no other serves more at no more time per token, each also {weight, placement}
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
    parser.add_argument(
        "--survive",
        type=float,
        metavar="SHARE",
        help="such that this share of the flow is left after any one departure, 0 to 1; exit code 1 if it is not",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="beside it what other systems would place, and throughput against time per token",
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

    _check(arguments)
    solved, change = what_if(*cases(arguments), arguments)
    shown = solved.report
    compared = _compared(solved, arguments) if arguments.compare else None
    if arguments.html:
        Path(arguments.html).write_text(page(shown, change), encoding="utf-8")
    if arguments.json:
        said = shown.as_json() | ({"change": change.as_json()} if change is not None else {})
        said |= compared.as_json() if compared is not None else {}
        print(msgspec.json.encode(said).decode(), flush=True)
    else:
        console = Console(highlight=False)
        console.print(render(shown, change))
        if compared is not None:
            console.print(f"\n{compared.lines()}", markup=False, soft_wrap=True)
    if shown.survives is None or shown.survives.reached:
        return 0
    print(f"helixnet: {shown.survives.missed()}", file=sys.stderr)
    return NOT_SURVIVED


def _check(arguments: argparse.Namespace) -> None:
    """Nothing, if the numbers given can be.

    Raises:
        UsageError: they cannot.
    """
    if arguments.seconds is not None and not 0 < arguments.seconds <= SECONDS_MAX:  # NaN too
        raise UsageError(f"--seconds is more than 0 and at most {SECONDS_MAX:.0f}, not {arguments.seconds:g}.")
    if arguments.survive is None:
        return
    if not 0 < arguments.survive < 1:
        raise UsageError(f"--survive is a share of the flow, between 0 and 1, not {arguments.survive:g}.")
    if arguments.objective == "throughput-paper":
        raise UsageError("--survive goes with the other objectives: the paper's knows no floor.")


@dataclass(frozen=True, slots=True)
class Solved:
    """A case with the plan for it."""

    case: Case
    spans: Spans
    report: PlanReport


def cases(arguments: argparse.Namespace) -> tuple[Case, Case | None]:
    """What is to be planned for, and what becomes of it if peers are added or removed.

    Raises:
        UsageError: not exactly one of a cluster file and an artifact is given, or what is given cannot be.
    """
    from helixnet.planner.case import of_cluster
    from helixnet.planner.cluster import build
    from helixnet.planner.cluster_file import change

    folder = _folder(arguments)
    if arguments.cluster is not None and (folder or arguments.instance or arguments.model):
        raise UsageError("Give either a cluster file or --artifact DIR with --instance and --model, not both.")
    if folder:
        return _artifact_cases(folder, arguments)
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


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Of the artifact, if one is given."""
    given = arguments.artifact or (os.environ.get(ARTIFACT) if arguments.instance else None)
    return Path(given) if given else None


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


def what_if(now: Case, then: Case | None, arguments: argparse.Namespace) -> tuple[Solved, Change | None]:
    """The plan for what is there and, if peers are added or removed, for what is there then with what changed."""
    from helixnet.daemon.plan_moves import moving
    from helixnet.daemon.plan_report import changed

    if then is None:
        return _solve(now, arguments), None
    before, problem = None, ""
    try:
        before = _solve(now, arguments)
    except CapacityError as error:
        problem = str(error)
    unmoved = 0.0
    held: Spans = (None,) * len(then.problem.peers)
    if before is not None:
        held = then.spans_of(now, before.spans)
        unmoved = _served(then, held, arguments)
        then = then.holding(held)
    shown = _solve(then, arguments)
    earlier = before.report if before is not None else None
    return shown, changed(earlier, problem, moving(then, held, shown.spans), unmoved)


def _served(case: Case, spans: Spans, arguments: argparse.Namespace) -> float:
    """Tokens/s of a placement as it is."""
    from helixnet.planner.predict import forecast
    from helixnet.planner.served import planned_routing

    routing = planned_routing(case.problem, spans, _objective(arguments).model)
    return forecast(case.problem, spans, routing).tokens_per_s


def _solve(case: Case, arguments: argparse.Namespace) -> Solved:
    from helixnet.daemon.plan_report import report, with_survival
    from helixnet.planner.survival import TRIES, place_surviving, survival

    problem, objective, floor = case.problem, _objective(arguments), arguments.survive
    began = time.perf_counter()
    if floor is None:
        spans = _place(problem, arguments, objective, _budget(problem, arguments.seconds), arguments.seconds)
    else:
        seconds = arguments.seconds / TRIES if arguments.seconds else None
        budget = _budget(problem, seconds)
        spans = place_surviving(
            problem, objective, floor, lambda aimed: _place(problem, arguments, aimed, budget, seconds)
        )
    shown = report(case, spans, arguments.objective, objective, time.perf_counter() - began)
    if floor is not None:
        shown = with_survival(shown, problem, survival(problem, spans, objective.model), floor)
    return Solved(case, spans, shown)


def _compared(solved: Solved, arguments: argparse.Namespace) -> PlanComparison:
    from helixnet.daemon.plan_comparison import FRONT_SOLVES, comparison
    from helixnet.planner.solve import Budget

    problem = solved.case.problem
    seconds = arguments.seconds / FRONT_SOLVES if arguments.seconds else None
    budget = Budget(
        work=FRONT_WORK,
        work_per_peer=0,
        laying_work=FRONT_LAYING_WORK,
        laying_work_per_peer=FRONT_LAYING_WORK_PER_PEER,
    )

    def solver(objective: Objective) -> Spans:
        return _place(problem, arguments, objective, budget, seconds)

    return comparison(solved.case, solved.spans, _objective(arguments), _stored(arguments), solver)


def _stored(arguments: argparse.Namespace) -> dict[str, Spans]:
    """What the authors stored for the whole of an artifact's cluster; nothing for a part of it or a cluster file."""
    from helixnet.planner.artifact import Artifact
    from helixnet.planner.artifact_file import PLACEMENTS

    folder = _folder(arguments)
    if folder is None or arguments.remove or not (folder / PLACEMENTS).exists():
        return {}
    found = Artifact(folder).stored(arguments.instance, arguments.model)
    return {method: spans for method, spans in found.items() if "/" not in method}  # separate/t4: those machines alone


def _place(
    problem: Problem,
    arguments: argparse.Namespace,
    objective: Objective,
    budget: Budget | None,
    seconds: float | None,
) -> Spans:
    from helixnet.planner.solve import place

    ends = time.perf_counter() + (seconds or math.inf)
    return place(problem, arguments.seed, budget, objective, cancelled=lambda: time.perf_counter() >= ends)


def _objective(arguments: argparse.Namespace) -> Objective:
    from helixnet.planner.objective import PRESETS

    return PRESETS[arguments.objective]


def _budget(problem: Problem, seconds: float | None) -> Budget | None:
    from helixnet.planner.solve import Budget

    if seconds is not None:
        work = max(1, int(seconds * WORK_UNITS_PER_S))
        cells = max(1, int(seconds * CELLS_PER_S))
        return Budget(
            work=work,
            work_per_peer=0,
            work_max=work,
            flow_work=cells,
            flow_work_per_peer=0,
            flow_work_max=cells,
            laying_work=int(cells * LAYING_SHARE),
            laying_work_per_peer=cells,
        )
    if len(problem.peers) <= SMALL_PEERS:
        return None
    return Budget(
        work=LARGE_WORK,
        work_per_peer=0,
        work_max=LARGE_WORK,
        laying_work=LARGE_LAYING_WORK,
        laying_work_per_peer=LARGE_LAYING_WORK_PER_PEER,
    )

"""`helixnet sim`: a whole swarm in one process, under virtual time, as the very machines of a real one."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helixnet.core.errors import RemoteProtocolError, UsageError
from helixnet.daemon.arguments import add_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helixnet.core.types import PeerId
    from helixnet.daemon.arguments import Commands
    from helixnet.sim.fuzz import Failure
    from helixnet.sim.report import Limits, Report
    from helixnet.sim.simulation import Setup, Simulation

EXAMPLE = "helixnet sim lan --hours 0.5 --load 2rps --report lan-report"
FUZZ = "fuzz"
SEEDS = 200
PEERS_MAX = 10_000
HOURS_MAX = 24.0 * 7
PER_S_MAX, IN_FLIGHT_MAX = 10_000.0, 100_000
LOADS_MAX = 20
SEEDS_MAX = 1_000_000
LIMIT_S_MAX = 3_600.0
BROKEN = 1
"""Exit code when a request was lost or an invariant broke."""
HELP = """
  helixnet sim --list                                          the scenarios
  helixnet sim --cluster my.toml --load 5rps                   what would my machines serve?
  helixnet sim --cluster my.toml --load 1rps,2rps,4rps,8rps    and where does it end?
  helixnet sim fuzz --seeds 200                                random swarms, random faults

The same command and seed give the same run, event by event. The exit code is 1 if a request was lost or an invariant
broke. Keys of --json (the last line of the output) are those of report.json, for several loads under `sweep`:
docs/simulation.md explains them."""


def add_sim_parser(commands: Commands) -> None:
    """Add the `sim` command."""
    parser = add_command(
        commands, "sim", "simulate a swarm: what it serves, how quickly, and what limits it", EXAMPLE + HELP
    )
    parser.add_argument("scenario", metavar="SCENARIO", nargs="?", help=f"a scenario of --list, or `{FUZZ}`")
    parser.add_argument(
        "--cluster", metavar="FILE", help="instead: the machines of a cluster file (see `helixnet plan`)"
    )
    parser.add_argument("--list", action="store_true", help="say which scenarios there are")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all chance (0)")
    parser.add_argument("--peers", type=int, metavar="N", help="how many machines (the scenario's own)")
    parser.add_argument("--hours", type=float, metavar="H", help="of load (the scenario's own)")
    parser.add_argument(
        "--load",
        metavar="LOAD",
        help="5rps: so many requests/s at random times; 32: always so many in flight; several with commas: a sweep",
    )
    parser.add_argument("--ttft", type=float, metavar="S", help="goodput counts first tokens within S seconds (10) ...")
    parser.add_argument("--tpot", type=float, metavar="S", help="... and at most S seconds per further token (0.5)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many random stories `{FUZZ}` plays ({SEEDS})")
    parser.add_argument("--report", metavar="DIR", help="write report.md, report.json and plots there")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.set_defaults(func=run_sim)


def run_sim(arguments: argparse.Namespace) -> int:
    """Simulate what is asked for and say what came of it.

    Raises:
        UsageError: a flag or a file says something that cannot be.
        CapacityError: the machines cannot hold the model.
    """
    _check(arguments)
    if arguments.list:
        return _list()
    if arguments.scenario == FUZZ:
        return _fuzz(arguments)
    loads = parse_loads(arguments.load)
    folder = _folder(arguments)
    runs: list[Run] = []
    for load in loads:
        run = _run(arguments, load)
        if run is None:
            return BROKEN
        runs.append(run)
        if len(loads) > 1 and not arguments.json:
            from helixnet.daemon.sim_view import sweep_line

            print(sweep_line(run.report), flush=True)
    return _finish(arguments, runs, folder)


@dataclass(frozen=True, slots=True)
class LoadOption:
    """One load of --load; None: the scenario's own."""

    text: str | None = None
    per_s: float | None = None
    in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished simulation."""

    simulation: Simulation
    report: Report
    wall_s: float
    command: str
    """That brings it back."""
    regions: dict[PeerId, str] | None
    """Of the machines of a cluster file."""


# --- what was asked for --------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> None:
    """Nothing, if flags go together and numbers can be.

    Raises:
        UsageError: they do not, or cannot.
    """
    fuzz = arguments.scenario == FUZZ
    if arguments.scenario is not None and arguments.cluster is not None:
        raise UsageError("Give either a scenario or --cluster FILE, not both.")
    if arguments.cluster is not None and arguments.peers is not None:
        raise UsageError("--peers goes with scenarios; how many machines a cluster file has is said by its counts.")
    if arguments.seeds is not None and not fuzz:
        raise UsageError(f"--seeds goes with `helixnet sim {FUZZ}`; a scenario takes one --seed.")
    unused = [
        name for name in ("peers", "hours", "load", "ttft", "tpot", "report") if getattr(arguments, name) is not None
    ]
    if fuzz and unused:
        raise UsageError(
            f"--{unused[0]} does not go with `helixnet sim {FUZZ}`: its stories are drawn from their seeds."
        )
    for name, most in (("peers", PEERS_MAX), ("hours", HOURS_MAX), ("ttft", LIMIT_S_MAX), ("tpot", LIMIT_S_MAX)):
        _check_number(name, getattr(arguments, name), most)
    _check_number("seeds", arguments.seeds, SEEDS_MAX)


def _check_number(name: str, given: float | None, most: float) -> None:
    if given is not None and not 0 < given <= most:  # NaN too
        raise UsageError(f"--{name} is more than 0 and at most {most:g}, not {given:g}.")


def parse_loads(text: str | None) -> tuple[LoadOption, ...]:
    """The loads that `--load` names; without it, one that leaves the choice to the scenario.

    Raises:
        UsageError: they are not loads, too many, or of both kinds.
    """
    if text is None:
        return (LoadOption(),)
    loads = tuple(_parse_load(part.strip()) for part in text.split(","))
    if len(loads) > LOADS_MAX:
        raise UsageError(f"--load takes at most {LOADS_MAX} loads, not {len(loads)}.")
    if len({load.per_s is None for load in loads}) > 1:
        raise UsageError("--load takes either requests/s (5rps) or requests in flight (32), not both at once.")
    return loads


def _parse_load(text: str) -> LoadOption:
    rate = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)rps", text)
    if rate and 0 < float(rate[1]) <= PER_S_MAX:
        return LoadOption(text, per_s=float(rate[1]))
    if re.fullmatch(r"\d{1,9}", text) and 0 < int(text) <= IN_FLIGHT_MAX:
        return LoadOption(text, in_flight=int(text))
    raise UsageError(
        f"--load is like 5rps (requests per second, up to {PER_S_MAX:g}) or 32 (requests always in flight, up to "
        f"{IN_FLIGHT_MAX}), not {text!r}."
    )


def _setup(arguments: argparse.Namespace, load: LoadOption) -> tuple[str, Setup, dict[PeerId, str] | None]:
    """The name of what is simulated, its setup, and where the machines of a cluster file stand.

    Raises:
        UsageError: there is no such scenario; the cluster file says something that cannot be.
    """
    from helixnet.sim.scenarios import SCENARIOS, Options, of_cluster

    seconds = arguments.hours * 3600 if arguments.hours is not None else None
    options = Options(
        seed=arguments.seed, peers=arguments.peers, seconds=seconds, per_s=load.per_s, in_flight=load.in_flight
    )
    if arguments.cluster is not None:
        from helixnet.daemon.plan_command import read_file
        from helixnet.planner.cluster import build

        path = Path(arguments.cluster)
        cluster = build(read_file(path))
        return path.stem, of_cluster(cluster.snapshot, cluster.workload, options), cluster.regions
    scenario = SCENARIOS.get(arguments.scenario)
    if scenario is None:
        raise UsageError(_no_scenario(arguments.scenario, list(SCENARIOS)))
    return scenario.name, scenario.build(options), None


def _require_room(setup: Setup) -> None:
    """Nothing, if the machines can hold the model; a swarm that cannot would wait for hours of virtual time.

    Raises:
        CapacityError: they cannot.
    """
    from helixnet.core.plan.snapshot import PeerView, Snapshot
    from helixnet.planner.problem import from_snapshot, require_room

    machines = setup.world.machines
    views = tuple(PeerView(peer=peer, capability=machines[peer]) for peer in sorted(setup.peers))
    require_room(from_snapshot(Snapshot(manifest=setup.world.manifest, peers=views)))


def _no_scenario(asked: str | None, names: list[str]) -> str:
    known = ", ".join(names)
    if asked is None:
        return f"Say which scenario ({known}), or --cluster FILE. `helixnet sim --list` says what the scenarios are."
    near = difflib.get_close_matches(asked, [*names, FUZZ], n=1)
    return f"There is no scenario {asked!r}; there are {known}." + (f" Did you mean {near[0]}?" if near else "")


def _limits(arguments: argparse.Namespace) -> Limits:
    from helixnet.sim.report import Limits

    usual = Limits()
    return Limits(ttft_s=arguments.ttft or usual.ttft_s, tpot_s=arguments.tpot or usual.tpot_s)


def _command(arguments: argparse.Namespace, load: str | None) -> str:
    """What to type to see the same again."""
    words = ["helixnet", "sim"] + ([arguments.scenario] if arguments.scenario else ["--cluster", arguments.cluster])
    words += ["--seed", str(arguments.seed)]
    for name in ("peers", "hours", "ttft", "tpot"):
        given = getattr(arguments, name)
        words += [f"--{name}", f"{given!r}"] if given is not None else []
    return shlex.join(words + (["--load", load] if load else []))


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Made before anything is simulated, so that nothing is simulated in vain.

    Raises:
        UsageError: it cannot be made.
    """
    if arguments.report is None:
        return None
    folder = Path(arguments.report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report cannot make the folder {folder}: {error.strerror}.") from None
    return folder


# --- simulating ----------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, load: LoadOption) -> Run | None:
    """One simulation; None if an invariant broke, which was said."""
    from helixnet.daemon.sim_progress import SimProgress
    from helixnet.sim.invariants import InvariantBroken
    from helixnet.sim.report import report
    from helixnet.sim.simulation import Simulation

    name, setup, regions = _setup(arguments, load)
    _require_room(setup)
    simulation = Simulation(setup)
    command = _command(arguments, load.text)
    began = time.perf_counter()
    try:
        with SimProgress(name, simulation) as progress:
            simulation.run(progress.advanced)
    except (InvariantBroken, RemoteProtocolError) as error:
        at_s = simulation.engine.now
        _complain(f"an invariant broke after {at_s:.3f} simulated seconds: {error}. Bring it back with: {command}")
        return None
    wall_s = time.perf_counter() - began
    return Run(simulation, report(simulation, name, _limits(arguments)), wall_s, command, regions)


def _finish(arguments: argparse.Namespace, runs: Sequence[Run], folder: Path | None) -> int:
    """Print and write what came of it, and complain of what was lost."""
    from helixnet.daemon.sim_view import lines
    from helixnet.daemon.wording import printable

    sweep = len(runs) > 1
    if not arguments.json and not sweep:
        print(printable("\n".join(lines(runs[0].report, runs[0].wall_s))))
    if folder is not None:
        from helixnet.daemon.sim_files import write, write_sweep

        missing = write_sweep(runs, _command(arguments, arguments.load), folder) if sweep else write(runs[0], folder)
        if not arguments.json:
            print(f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        if missing:
            _complain(missing)
    if arguments.json:
        text = b",".join(run.report.to_json() for run in runs)
        print((b'{"sweep":[' + text + b"]}" if sweep else text).decode(), flush=True)
    for run in runs:
        if not run.report.is_sound:
            _complain(_loss(run))
    return 0 if all(run.report.is_sound for run in runs) else BROKEN


def _loss(run: Run) -> str:
    lost, wrong = run.report.lost, run.report.tokens_wrong
    said = [f"{lost} of {run.report.asked} requests were lost ({run.report.losses[0]})"] if lost else []
    said += [f"{wrong} answers have too many or too few tokens"] if wrong else []
    return f"{' and '.join(said)}. Bring it back with: {run.command}"


def _complain(sentence: str) -> None:
    print(f"helixnet: {' '.join(sentence.split())}", file=sys.stderr)


# --- other than one simulation -------------------------------------------------------------------------


def _list() -> int:
    from helixnet.sim.scenarios import SCENARIOS

    width = max(len(name) for name in (*SCENARIOS, FUZZ))
    for name, scenario in SCENARIOS.items():
        print(f"{name:<{width}}  {scenario.about}")
    print(f"{FUZZ:<{width}}  small random swarms with random faults, to find what breaks")
    return 0


def _fuzz(arguments: argparse.Namespace) -> int:
    import msgspec

    from helixnet.daemon.sim_progress import seeds_progress
    from helixnet.daemon.wording import many, seconds
    from helixnet.sim.fuzz import fuzz

    count = arguments.seeds or SEEDS
    seeds = range(arguments.seed, arguments.seed + count)
    began = time.perf_counter()
    with seeds_progress(count) as advanced:
        failures = fuzz(seeds, advanced)
    wall_s = time.perf_counter() - began
    if not arguments.json:
        stories = f"{many(count, 'story').replace('storys', 'stories')} from seed {seeds.start} on"
        print(f"{stories} in {seconds(wall_s)}: {_outcome(failures)}")
    for failure in failures:
        _complain(_story(failure))
    if arguments.json:
        said = [
            {"seed": one.seed, "what": one.what, "faults": [str(fault) for fault in one.faults]} for one in failures
        ]
        print(msgspec.json.encode({"seed": seeds.start, "seeds": count, "failures": said}).decode(), flush=True)
    return BROKEN if failures else 0


def _outcome(failures: Sequence[Failure]) -> str:
    return f"{len(failures)} went wrong" if failures else "no request lost, no token wrong, no invariant broken"


def _story(failure: Failure) -> str:
    faults = "; ".join(f"{fault} at {fault.at_s:.1f} s" for fault in failure.faults)
    return (
        f"seed {failure.seed}: {failure.what} (faults that it takes: {faults or 'none'}). Bring it back with: "
        f"helixnet sim {FUZZ} --seed {failure.seed} --seeds 1"
    )

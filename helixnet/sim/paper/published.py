"""What the authors ran in their simulator, and what they published of it: the figures that paper mode is held against.

Set-ups are those of the artifact's own scripts (artifact_evaluation/*/step3_simulation.py, */setup2_distributed.py),
results those of its ae_readme.md; the load of each run is theirs, too, and differs from method to method.
"""

from __future__ import annotations

from dataclasses import dataclass

from helixnet.planner.artifact import Artifact
from helixnet.sim.paper.admission import OFFLINE, ONLINE
from helixnet.sim.paper.feeder import Constant, Feed, FillKv, Trace, arrivals_of, lengths_of
from helixnet.sim.paper.instance import flows_of, read_instance
from helixnet.sim.paper.run import Setup, Windows

SEED = 0
"""Of all published runs."""
ONLINE_WINDOWS = Windows(0.0, 1800.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    placement: str
    """As placements.json calls it."""
    router: str = "iwrr"
    in_flight: int = 0
    """Offline, for other routers than IWRR: requests always under way."""
    tokens_per_s: float = 0.0
    """Online: the average asked for, prompts included."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Published with an online run, in seconds."""

    prompt_p50: float
    prompt_p95: float
    decode_p50: float
    decode_p95: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One published figure: the sum of its runs' decode tokens/s."""

    title: str
    instance: str
    model: str
    decode_tokens_per_s: float
    runs: tuple[Run, ...]
    latency: Latency | None = None


def setups(artifact: Artifact, figure: Figure) -> tuple[Setup, ...]:
    """Each of its runs."""
    return tuple(_setup(artifact, figure, run) for run in figure.runs)


def _setup(artifact: Artifact, figure: Figure, run: Run) -> Setup:
    instance = read_instance(artifact, figure.instance, figure.model)
    spans = artifact.stored(figure.instance, figure.model)[run.placement]
    through = artifact.stored_flow(figure.instance, figure.model, run.placement)
    room = artifact.stored_kv_tokens(figure.instance, figure.model, run.placement)
    by_hand = run.placement.startswith("separate/")  # the authors set the KV room of these themselves, it is not T(k)'s
    trace, iwrr, online = artifact.trace(), run.router == "iwrr", run.tokens_per_s > 0
    feed: Feed
    if online:
        feed = Trace(arrivals_of(trace, run.tokens_per_s, ONLINE_WINDOWS.measured_s, SEED))
    else:
        feed = FillKv(lengths_of(trace)) if iwrr else Constant(lengths_of(trace), run.in_flight)
    return Setup(
        instance=instance,
        spans=spans,
        flows=flows_of(instance.problem, spans, through),
        router=run.router,
        feed=feed,
        admission=(ONLINE if online else OFFLINE) if iwrr else None,
        windows=ONLINE_WINDOWS if online else Windows(),
        kv_tokens=dict.fromkeys(through, room) if by_hand and room is not None else {},
    )


def _each(*kinds: str, of: str = "helix-milp") -> tuple[Run, ...]:
    """A pipeline for each type of machine, by flow."""
    return tuple(Run(f"{of}/{kind}") for kind in kinds)


def _separate(**in_flight: int) -> tuple[Run, ...]:
    """A pipeline for each type of machine, with so many requests under way; chains leave no router a choice."""
    return tuple(Run(f"separate/{kind}", "random", count) for kind, count in in_flight.items())


HELIX, SWARM = (Run("helix-milp"),), Run("swarm", "swarm", 180)
BY_TYPE = _each("a100", "l4", "t4")
CALIBRATION: tuple[tuple[Figure, Figure], ...] = (
    (
        Figure("single24 70B Helix", "single24", "llama70b", 252.1, HELIX),
        Figure("single24 70B Swarm", "single24", "llama70b", 124.7, (SWARM,)),
    ),
    (
        Figure("3cluster24 70B Helix", "3cluster24", "llama70b", 98.0, HELIX),
        Figure("3cluster24 70B Swarm", "3cluster24", "llama70b", 51.9, (SWARM,)),
    ),
    (
        Figure("cluster42 70B Helix", "cluster42", "llama70b", 645.6, HELIX),
        Figure("cluster42 70B Swarm", "cluster42", "llama70b", 473.2, (Run("swarm", "swarm", 500),)),
    ),
    (
        Figure("single24 30B Helix", "single24", "llama30b", 339.6, BY_TYPE),
        Figure("single24 30B Swarm", "single24", "llama30b", 151.6, (Run("swarm", "swarm", 50),)),
    ),
)
"""Offline, Helix and Swarm: what calibration asks for."""

_THEIRS = "helix-milp(paper placement)"
FURTHER: tuple[Figure, ...] = (
    Figure("3cluster24 30B Helix", "3cluster24", "llama30b", 232.7, BY_TYPE),
    Figure("3cluster24 30B Swarm", "3cluster24", "llama30b", 98.7, (Run("swarm", "swarm", 60),)),
    Figure("single24 30B Separate", "single24", "llama30b", 309.0, _separate(a100=30, l4=25, t4=25)),
    Figure("single24 70B Separate", "single24", "llama70b", 124.3, _separate(a100=18, l4=40, t4=3)),
    Figure("3cluster24 30B Separate", "3cluster24", "llama30b", 223.2, _separate(a100=35, l4=40, t4=40)),
    Figure("3cluster24 70B Separate", "3cluster24", "llama70b", 61.9, _separate(a100=1, l4=60, t4=50)),
    Figure("cluster42 70B Separate", "cluster42", "llama70b", 219.3, _separate(a100=1, l4=60, l4x2=35, t4x4=110)),
    Figure("3cluster24 70B Petals, IWRR", "3cluster24", "llama70b", 66.6, (Run("petals"),)),
    Figure("3cluster24 70B Swarm, IWRR", "3cluster24", "llama70b", 41.6, (Run("swarm"),)),
    Figure("3cluster24 70B ablation: IWRR", "3cluster24", "llama70b", 99.8, (Run(_THEIRS),)),
    Figure("3cluster24 70B ablation: Swarm", "3cluster24", "llama70b", 81.7, (Run(_THEIRS, "swarm", 180),)),
    Figure("3cluster24 70B ablation: random", "3cluster24", "llama70b", 87.4, (Run(_THEIRS, "random", 180),)),
    Figure("3cluster24 70B ablation: queue", "3cluster24", "llama70b", 83.6, (Run(_THEIRS, "shortest_queue", 180),)),
    Figure(
        "single24 70B Helix online",
        "single24",
        "llama70b",
        141.6,
        (Run("helix-milp", tokens_per_s=700),),
        Latency(2.64, 4.41, 0.98, 3.19),
    ),
    Figure(
        "single24 70B Swarm online",
        "single24",
        "llama70b",
        69.8,
        (Run("swarm", "swarm", tokens_per_s=350),),
        Latency(3.32, 5.01, 1.04, 2.51),
    ),
    Figure(
        "3cluster24 70B Helix online",
        "3cluster24",
        "llama70b",
        59.3,
        (Run("helix-milp", tokens_per_s=320),),
        Latency(5.79, 9.41, 0.93, 7.72),
    ),
    Figure(
        "3cluster24 70B Swarm online",
        "3cluster24",
        "llama70b",
        31.0,
        (Run("swarm", "swarm", tokens_per_s=160),),
        Latency(7.22, 14.83, 1.23, 6.50),
    ),
    Figure(
        "cluster42 70B Helix online",
        "cluster42",
        "llama70b",
        459.8,
        (Run("helix-milp", tokens_per_s=2150),),
    ),
    Figure(
        "cluster42 70B Swarm online",
        "cluster42",
        "llama70b",
        309.6,
        (Run("swarm", "swarm", tokens_per_s=1450),),
    ),
)
"""What else was published of the same simulator."""

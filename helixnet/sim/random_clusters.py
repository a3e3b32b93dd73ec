"""Random clusters with room for a large model, and a typical request for each: what plans are checked on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from helixnet.planner.problem import Problem, Workload, from_snapshot
from helixnet.planner.random_swarm import Geography, geography
from helixnet.planner.solve import Budget
from helixnet.sim.world import Link

MODEL = "llama-3.1-70b"
REGIONS = (1, 3)
HOMES = (0.0, 0.5, 0.8)
DRAWS_MAX = 100
BUDGET = Budget(work=20_000, work_per_peer=0, laying_work=20_000_000)
"""Of a plan: two seconds of one core."""
NEAR = Link(0.001, 1e9)
"""Clients sit beside the peers: what is checked is the swarm."""

Bounds = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Least and most of what is drawn."""

    peers: Bounds
    prompt_tokens: Bounds
    output_tokens: Bounds


@dataclass(frozen=True, slots=True)
class Drawn:
    """One cluster."""

    land: Geography
    workload: Workload
    problem: Problem


def clusters(rng: random.Random, seeds: Iterable[int], ranges: Ranges) -> Iterator[Drawn]:
    """One for each seed of a geography; those without room for the model are left out."""
    for seed in seeds:
        land = geography(seed, rng.randint(*ranges.peers), rng.randint(*REGIONS), rng.choice(HOMES), MODEL)
        prompt, output = rng.randint(*ranges.prompt_tokens), rng.randint(*ranges.output_tokens)
        workload = Workload(prompt_tokens=prompt, output_tokens=output)
        problem = from_snapshot(land.snapshot(), workload)
        if problem.has_room():
            yield Drawn(land, workload, problem)

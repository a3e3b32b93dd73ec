"""A swarm small enough for tests that want a whole simulation: a second of wall clock, or less."""

from __future__ import annotations

from dataclasses import replace

from helixnet.sim.faults import Fault
from helixnet.sim.fuzz import story
from helixnet.sim.simulation import Load, Setup
from helixnet.sim.workload import Fixed

SECONDS = 40.0
"""A quarter of it is warm-up: one column."""
PROMPT_TOKENS, OUTPUT_TOKENS = 40, 12


def small_setup(
    seed: int = 3, per_s: float = 1.5, in_flight: int = 0, faults: tuple[Fault, ...] = (), seconds: float = SECONDS
) -> Setup:
    """The swarm of story 3 under a load of ours."""
    load = Load(lengths=Fixed(PROMPT_TOKENS, OUTPUT_TOKENS), per_s=per_s, in_flight=in_flight, clients=2)
    return replace(story(3), seed=seed, load=load, seconds=seconds, faults=faults)

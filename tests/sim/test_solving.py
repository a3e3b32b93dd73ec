"""The planner beside a simulation instead of in line with it: another core works, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from helixnet.planner.problem import Workload
from helixnet.planner.solve import Budget
from helixnet.sim.scenarios import SCENARIOS, Options
from helixnet.sim.simulation import Simulation
from helixnet.sim.solving import planner

LITTLE = Budget(work=500, work_per_peer=0, milp_nodes=0, laying_work=100_000)


def digest(workers: Executor | None) -> str:
    setup = SCENARIOS["lan"].build(Options(peers=4, seconds=20.0))
    simulation = Simulation(replace(setup, solving=planner(Workload(), budget=LITTLE, workers=workers)))
    simulation.run()
    return simulation.engine.digest()


def test_a_planner_on_other_workers_gives_the_same_simulation() -> None:
    with ThreadPoolExecutor(1) as workers:
        assert digest(workers) == digest(None)

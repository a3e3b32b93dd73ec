"""One swarm that comes and goes, at several sizes: what it loses, and what running it costs as it grows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import msgspec

from helixnet.sim.faults import Kind
from helixnet.sim.report import COORDINATOR_CHANGED, ControlUse, Limits, Report, Spread, report
from helixnet.sim.scenarios import SCENARIOS, Options
from helixnet.sim.simulation import Setup, Simulation
from helixnet.sim.tally import RequestTally

SCENARIO = "churn"
MINUTE_S = 60.0
HOUR_S = 3_600.0
LEAVES = (Kind.CRASH, Kind.VANISH, Kind.LEAVE)


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """One size, after so many simulated seconds of load."""

    peers: int
    seconds: float
    joined: int
    left: int
    """Peers, in the time of the load."""
    asked: int
    lost: int
    tokens_wrong: int
    retries: int
    tokens_per_s: float
    goodput_per_s: float
    good: float
    """Share of requests within the limits."""
    ttft: Spread | None
    tpot: Spread | None
    plans_per_hour: float
    layers_loaded_per_peer_hour: float
    coordinators: int
    """That took over."""
    control_per_peer: float
    """Bytes/s that a peer sends to run the swarm, on average."""
    coordinator_sent: float
    """Bytes/s of whoever coordinates."""
    coordinator_received: float
    control: tuple[ControlUse, ...]
    ended_per_minute: tuple[int, ...]
    """Requests that were answered, by the minute in which they ended, from the beginning of the load ..."""
    good_per_minute: tuple[int, ...]
    """... and those of them that were within the limits."""
    failovers_at_s: tuple[float, ...]
    """When coordinators changed, from the beginning of the load."""
    events: int
    wall_s: float = 0.0
    """What it took; whoever ran it knows."""
    digest: str

    @property
    def is_sound(self) -> bool:
        """Whether nothing was lost, repeated or reordered."""
        return not self.lost and not self.tokens_wrong


def of_size(peers: int, seconds: float, seed: int, workers: Executor | None = None) -> Setup:
    """The scenario at one size; `workers` plan beside the simulation, if there are any."""
    return SCENARIOS[SCENARIO].build(Options(seed=seed, peers=peers, seconds=seconds, workers=workers))


def scaled(setup: Setup, progress: Callable[[float], None] | None = None) -> Scaled:
    """Run a setup.

    Raises:
        InvariantBroken: something that must hold did not.
    """
    simulation = Simulation(setup)
    simulation.run(progress)
    limits = Limits()
    return _scaled(simulation, report(simulation, SCENARIO, limits), limits)


def _scaled(simulation: Simulation, shown: Report, limits: Limits) -> Scaled:
    load = [mark for mark in shown.marks if 0 < mark.at_s <= shown.seconds]
    hours = shown.seconds / HOUR_S
    changes = [mark.at_s for mark in load if mark.what.startswith(COORDINATOR_CHANGED)]
    sampler = simulation.sampler
    loaded = sampler.closed.layers_loaded - sampler.opened.layers_loaded
    return Scaled(
        peers=shown.machines,
        seconds=shown.seconds,
        joined=sum(mark.what.startswith(Kind.JOIN) for mark in load),
        left=sum(mark.what.startswith(LEAVES) for mark in load),
        asked=shown.asked,
        lost=shown.lost,
        tokens_wrong=shown.tokens_wrong,
        retries=shown.retries,
        tokens_per_s=shown.tokens_per_s,
        goodput_per_s=shown.goodput_per_s,
        good=shown.good,
        ttft=shown.ttft,
        tpot=shown.tpot,
        plans_per_hour=shown.plans / hours,
        layers_loaded_per_peer_hour=loaded / shown.machines / (shown.counted_s / HOUR_S),
        coordinators=len(changes),
        control_per_peer=shown.control_bytes_per_s,
        coordinator_sent=sum(use.coordinator_sent_per_s for use in shown.control),
        coordinator_received=sum(use.coordinator_received_per_s for use in shown.control),
        control=shown.control,
        ended_per_minute=_by_minute(simulation, lambda request: not request.problem),
        good_per_minute=_by_minute(simulation, limits.kept),
        failovers_at_s=tuple(changes),
        events=shown.events,
        digest=shown.digest,
    )


def _by_minute(simulation: Simulation, counts: Callable[[RequestTally], bool]) -> tuple[int, ...]:
    minutes = [0] * max(1, round(simulation.setup.seconds / MINUTE_S))
    for request in simulation.tally.requests:
        minute = int((request.last_at - simulation.began_at) // MINUTE_S)
        if counts(request) and 0 <= minute < len(minutes):
            minutes[minute] += 1
    return tuple(minutes)

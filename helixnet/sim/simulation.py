"""One simulation from its setup to its tally: peers join, clients ask, time passes, nothing may be lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from helixnet.core.machine import Event
from helixnet.core.route.request import RequestConfig
from helixnet.core.types import PeerId
from helixnet.planner.problem import Workload
from helixnet.sim.clients import Client
from helixnet.sim.engine import Engine, seldom_collected
from helixnet.sim.faults import Fault, inflict
from helixnet.sim.invariants import check_at_rest
from helixnet.sim.samples import Sampler
from helixnet.sim.solving import planner
from helixnet.sim.swarm import SimConfig, Solving, Swarm
from helixnet.sim.tally import RequestTally, Tally
from helixnet.sim.workload import Lengths, arrivals
from helixnet.sim.world import World

DRAIN_S = 3_600.0
"""After the last request was asked, all must have ended within this."""
REST_S = 30.0
"""How much longer than its idle sessions a swarm may take to come to rest."""
SETTLE_S = 120.0
"""A plan must be active within this, or the simulation says why there is none."""
WARM_S, WARM_SHARE = 60.0, 0.25
"""Reports leave out so much of the load's beginning, in which the swarm fills up; of a short one only this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What clients ask: `per_s` requests/s at random times, or always `in_flight` at once."""

    lengths: Lengths
    per_s: float = 0.0
    in_flight: int = 0
    begin_s: float = 1.0
    """The first `in_flight` come within so many seconds: requests that begin together go on and end together."""
    clients: int = 4
    crowds: tuple[Crowd, ...] = ()


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many requests at once, `at_s` seconds after the load begins."""

    at_s: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A simulation to be run; the same setup and seed give the same tally."""

    world: World
    peers: tuple[PeerId, ...]
    """Those that are there from the beginning."""
    load: Load
    seconds: float
    """Of load, from the first active plan on."""
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    config: SimConfig = field(default_factory=SimConfig)
    request: RequestConfig = field(default_factory=RequestConfig)
    solving: Solving | None = None
    """The planner; None for the real one, inline."""


class Simulation:
    """Runs one setup. `run` may be called once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.engine = Engine(setup.seed)
        self.tally = Tally()
        solving = setup.solving or planner(Workload())
        self.swarm = Swarm(self.engine, setup.world, setup.config, solving)
        self.swarm.on_event = self._happened
        self.clients = [Client(n, self.swarm, self.tally, setup.request) for n in range(setup.load.clients)]
        self.sampler = Sampler(self.swarm, self.tally, self.in_flight)
        self.began_at = 0.0
        self._lengths_rng = random.Random(f"lengths {setup.seed}")
        self._next_client = 0
        self._asking = False
        self._restless: PeerId | None = None

    @property
    def ends_at(self) -> float:
        """When the load ends."""
        return self.began_at + self.setup.seconds

    @property
    def warm_s(self) -> float:
        """How much of the load's beginning reports leave out."""
        return min(WARM_S, WARM_SHARE * self.setup.seconds)

    def in_flight(self) -> int:
        """Requests that were asked and have not ended."""
        return sum(len(client.running) for client in self.clients)

    def run(self, progress: Callable[[float], None] | None = None) -> Tally:
        """Let it happen; `progress` hears the share of simulated time that is over.

        Raises:
            InvariantBroken: something that must hold did not.
        """
        with seldom_collected():
            return self._run(progress)

    def _run(self, progress: Callable[[float], None] | None) -> Tally:
        for peer in self.setup.peers:
            self.swarm.join(peer)
        self.engine.run(SETTLE_S, self._is_served)
        self.began_at = self.engine.now
        self.mark("load begins")
        self._begin_load()
        self.sampler.begin(self.began_at + self.warm_s, self.ends_at)
        while self.engine.now < self.ends_at:
            self.engine.run(min(self.ends_at, self.engine.now + max(1.0, self.setup.seconds / 200)))
            if progress is not None:
                progress((self.engine.now - self.began_at) / self.setup.seconds)
        self._asking = False
        self.mark("load ends")
        self.engine.run(self.ends_at + DRAIN_S, self._is_answered)
        # What a dead peer had opened elsewhere stays until it has been idle for too long.
        rest_s = self.setup.config.peer.stage.idle_s + REST_S
        self.engine.run(self.engine.now + rest_s, self._is_at_rest)
        for name, one in sorted(self.swarm.peers.items()):
            check_at_rest(name, one.peer, one.device.sessions, one.device.blocks)
        return self.tally

    def _is_answered(self) -> bool:
        return not any(client.running for client in self.clients)

    def _is_at_rest(self) -> bool:
        """Whether no peer has a session. Who was seen to have one last is asked first: there may be a thousand."""
        last = self.swarm.peers.get(self._restless) if self._restless is not None else None
        if last is not None and (last.peer.stage.sessions or last.peer.entry.sessions):
            return False
        for name, one in self.swarm.peers.items():
            if one.peer.stage.sessions or one.peer.entry.sessions:
                self._restless = name
                return False
        return True

    def mark(self, what: str) -> None:
        """Something for plots over time to point at."""
        self.tally.mark(self.engine.now, what)
        self.engine.note(what)

    def mark_at(self, at_s: float, what: str) -> None:
        """The same, so many seconds after the load began."""
        self.engine.at(self.began_at + at_s, self.mark, what)

    def _is_served(self) -> bool:
        return any(client.sees_active_plan for client in self.clients)

    # --- load --------------------------------------------------------------------------------------

    def _begin_load(self) -> None:
        self._asking = True
        load = self.setup.load
        for fault in self.setup.faults:
            self.mark_at(fault.at_s, str(fault))
            self.engine.at(self.began_at + fault.at_s, inflict, self.swarm, fault)
        if load.per_s:
            times = random.Random(f"arrivals {self.setup.seed}")
            for at_s in arrivals(times, load.per_s, self.setup.seconds):
                self.engine.at(self.began_at + at_s, self._ask, _nothing)
        for crowd in load.crowds:
            self.mark_at(crowd.at_s, f"{crowd.requests} requests at once")
            for _ in range(crowd.requests):
                self.engine.at(self.began_at + crowd.at_s, self._ask, _nothing)
        for _ in range(load.in_flight):
            self.engine.after(self.engine.rng.uniform(0, load.begin_s), self._ask, self._ask_again)

    def _ask(self, ended: Callable[[RequestTally], None]) -> None:
        client = self.clients[self._next_client % len(self.clients)]
        self._next_client += 1
        client.ask(self.setup.load.lengths.draw(self._lengths_rng), ended)

    def _ask_again(self, _: RequestTally) -> None:
        if self._asking:
            self.engine.after(0.001, self._ask, self._ask_again)

    def _happened(self, now: float, peer: PeerId, event: Event) -> None:
        self.tally.events[event.kind] = self.tally.events.get(event.kind, 0) + 1
        if event.kind in ("coordinator.changed", "plan.active") and peer == event.data.get("coordinator", peer):
            self.mark(f"{event.kind} {peer}")


def _nothing(_: RequestTally) -> None:
    """Whoever asked does not wait."""

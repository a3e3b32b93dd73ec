"""How requests find their way: the authors' schedulers behind one protocol, ours beside them.

A prompt's way is chosen; its decode steps follow it, for their KV is there. The routers of flow choose all of it when
the request comes, the others each hop when the prompt has to leave, as the authors' do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from helixnet.core.route.iwrr import Iwrr
from helixnet.planner.flow import OUTSIDE
from helixnet.sim.paper.network import SHARE_MIN
from helixnet.sim.paper.sessions import Hop, Session

SWARM_FIRST_S = 0.05
"""What SWARM's scheduler takes any machine to need before it knows (authors' initial_priority)."""
SWARM_SMOOTHING = 0.8
"""Weight of the newest observation (authors' smoothing_parameter)."""
EXPLORES = 20
"""One in so many choices of `min_latency` is drawn."""
LATENCY_SMOOTHING = 0.2
"""Weight of its newest observation."""
NOWHERE_S = 1e9

Ways = Mapping[int, Sequence[Hop]]
"""Hops by where they start."""


class Router(Protocol):
    """Chooses among `open_hops`: never none, all from one place, and only to machines that can take the session."""

    ahead: bool
    """Whether the whole way is chosen when a request comes."""
    learns: bool
    """Whether it wants to `observe`."""

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        """The next hop of a prompt."""

    def undo(self, hop: Hop, session: Session) -> None:
        """It was chosen, but the way led nowhere."""

    def repeat(self, session: Session) -> None:
        """A decode step starts on the session's way."""

    def observe(self, hop: Hop, seconds: float) -> None:
        """From the transmission's start over a hop to the end of the machine's last layer."""


class _Plain:
    """A router that learns nothing on the way."""

    ahead = learns = False

    def undo(self, hop: Hop, session: Session) -> None:
        pass

    def repeat(self, session: Session) -> None:
        pass

    def observe(self, hop: Hop, seconds: float) -> None:
        pass


class FlowShares(_Plain):
    """The authors' IWRR: the hop that, with this request, has had the least work for its flow; work is tokens."""

    ahead = True

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        best = min(open_hops, key=lambda hop: hop.load + session.input / hop.flow)
        best.load += session.input / best.flow
        return best

    def undo(self, hop: Hop, session: Session) -> None:
        hop.load -= session.input / hop.flow

    def repeat(self, session: Session) -> None:
        for hop in session.path:
            hop.load += 1.0 / hop.flow


class CoreShares(_Plain):
    """The IWRR of our own clients, by requests: `helixnet.core.route.iwrr`."""

    ahead = True

    def __init__(self, ways: Ways) -> None:
        self._heads = {tail: [hop.edge[1] for hop in hops] for tail, hops in ways.items()}
        self._turns = {tail: Iwrr({hop.edge[1]: hop.flow for hop in hops}) for tail, hops in ways.items()}

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        tail, hops = open_hops[0].edge[0], {hop.edge[1]: hop for hop in open_hops}
        head = self._turns[tail].choose([each for each in self._heads[tail] if each not in hops])
        assert head is not None, "an open hop has flow"
        return hops[head]


class Swarm(_Plain):
    """SWARM parallelism's: turns in the ratio of how quickly machines were seen to answer (its appendix C)."""

    learns = True

    def __init__(self, ways: Ways) -> None:
        hops = [hop for each in ways.values() for hop in each]
        self._seconds = {hop.edge: SWARM_FIRST_S for hop in hops}
        self._turn = {hop.edge: SWARM_FIRST_S for hop in hops}

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        best = min(open_hops, key=lambda hop: self._turn[hop.edge])
        self._turn[best.edge] += self._seconds[best.edge]
        return best

    def observe(self, hop: Hop, seconds: float) -> None:
        known = self._seconds[hop.edge]
        self._seconds[hop.edge] = SWARM_SMOOTHING * seconds + (1 - SWARM_SMOOTHING) * known


class Random(_Plain):
    """Any hop whose link is free; if none is, the one that will be first."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        return _first_free(open_hops, now, self._rng)


class ShortestQueue(_Plain):
    """Of the hops to the machines with the fewest iterations waiting, any whose link is free."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        waiting = [hop.machine.queued() if hop.machine is not None else 0 for hop in open_hops]
        fewest = min(waiting)
        return _first_free([hop for hop, n in zip(open_hops, waiting, strict=True) if n == fewest], now, self._rng)


class MinLatency(_Plain):
    """The way that would be the quickest if all took as long as lately, links and machines; none of the authors'.

    One choice in EXPLORES is drawn, so that machines that were slow once are looked at again.
    """

    learns = True

    def __init__(self, ways: Ways, rng: random.Random) -> None:
        self._ways, self._rng = ways, rng
        self._seconds = {hop.edge: hop.link.latency_s for hops in ways.values() for hop in hops}

    def choose(self, open_hops: Sequence[Hop], session: Session, now: float) -> Hop:
        if self._rng.randrange(EXPLORES) == 0:
            return open_hops[self._rng.randrange(len(open_hops))]
        rest: dict[int, float] = {OUTSIDE: 0.0}
        return min(open_hops, key=lambda hop: self._seconds[hop.edge] + self._rest(hop.edge[1], rest))

    def observe(self, hop: Hop, seconds: float) -> None:
        self._seconds[hop.edge] += LATENCY_SMOOTHING * (seconds - self._seconds[hop.edge])

    def _rest(self, start: int, known: dict[int, float]) -> float:
        """Seconds from there to the coordinator."""
        if start not in known:
            onward = self._ways.get(start, ())
            known[start] = min(
                (self._seconds[h.edge] + self._rest(h.edge[1], known) for h in onward), default=NOWHERE_S
            )
        return known[start]


ROUTERS: dict[str, Callable[[Ways, random.Random], Router]] = {
    "iwrr": lambda ways, rng: FlowShares(),
    "iwrr_core": lambda ways, rng: CoreShares(ways),
    "swarm": lambda ways, rng: Swarm(ways),
    "random": lambda ways, rng: Random(rng),
    "shortest_queue": lambda ways, rng: ShortestQueue(rng),
    "min_latency": lambda ways, rng: MinLatency(ways, rng),
}
FLOW_ROUTERS = ("iwrr", "iwrr_core")


def usable(hops: Sequence[Hop]) -> list[Hop]:
    """Those with a fair part of the flow from where they start."""
    total = sum(hop.flow for hop in hops)
    return [hop for hop in hops if hop.flow > 0 and hop.flow >= SHARE_MIN * total]


def _first_free(hops: Sequence[Hop], now: float, rng: random.Random) -> Hop:
    free = [hop for hop in hops if hop.link.free_s <= now]
    return free[rng.randrange(len(free))] if free else min(hops, key=lambda hop: hop.link.free_s)

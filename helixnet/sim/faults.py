"""What goes wrong, when: crashes, departures, slow devices, flapping links, partitions, skewed clocks, liars, churn."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence

import msgspec

from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.sim.swarm import Swarm
from helixnet.sim.world import LIFE, machine_of


class Kind(enum.StrEnum):
    """What can happen. Those marked * end after `seconds`."""

    CRASH = "crash"
    """The process dies; the machine's network stack says so."""
    VANISH = "vanish"
    """The machine is switched off without a word."""
    LEAVE = "leave"
    """The peer leaves in good order."""
    JOIN = "join"
    """A machine (again) starts a peer."""
    COORDINATOR = "coordinator"
    """Whoever coordinates just then crashes."""
    SLOW = "slow"
    """* The device takes `factor` times as long."""
    THIN = "thin"
    """* The link to `other` has `factor` of its bandwidth."""
    FLAP = "flap"
    """* The link to `other` is cut every other second."""
    PARTITION = "partition"
    """* The peer and everybody before it in the alphabet are cut off from the others."""
    SKEW = "skew"
    """The peer's clock runs `factor` times as fast from now on."""
    LIE = "lie"
    """As JOIN, but it claims to be `factor` times as fast as it is."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong, `at_s` seconds after the load begins. A peer that is not there is left alone."""

    at_s: float
    kind: Kind
    peer: PeerId = PeerId("")
    other: PeerId = PeerId("")
    seconds: float = 0.0
    factor: float = 1.0

    def __str__(self) -> str:
        parts = [self.kind, self.peer, self.other]
        parts += [f"x{self.factor:g}"] if self.factor != 1.0 else []
        parts += [f"for {self.seconds:g} s"] if self.seconds else []
        return " ".join(part for part in parts if part)


FLAP_S = 1.0
CHURN_KINDS = {Kind.CRASH: 0.4, Kind.LEAVE: 0.4, Kind.VANISH: 0.2}
"""How volunteers go, and in what shares."""


def churn(
    rng: random.Random, present: Sequence[PeerId], absent: Sequence[PeerId], session_s: float, until_s: float
) -> Iterator[Fault]:
    """Departures at exponential session lengths with mean `session_s`; for each, an absent machine joins a while later.

    The number of peers stays about the same. Machines come back as new peers, the longest gone first.
    """
    lives: dict[PeerId, int] = {}
    waiting = list(absent)
    leaving = sorted((rng.expovariate(1 / session_s), peer) for peer in present)
    kinds, weights = list(CHURN_KINDS), list(CHURN_KINDS.values())
    while leaving and leaving[0][0] < until_s:
        at_s, peer = leaving.pop(0)
        yield Fault(at_s=at_s, kind=rng.choices(kinds, weights)[0], peer=peer)
        waiting.append(machine_of(peer))
        machine = waiting.pop(0)
        lives[machine] = lives.get(machine, 0) + 1
        back = PeerId(f"{machine}{LIFE}{lives[machine]}")
        joins_at = at_s + rng.expovariate(1 / 10.0)
        yield Fault(at_s=joins_at, kind=Kind.JOIN, peer=back)
        leaving.append((joins_at + rng.expovariate(1 / session_s), back))
        leaving.sort()


def claimed(truth: Capability, factor: float) -> Capability:
    """What a liar says: everything `factor` times as fast."""

    def faster(curve: tuple[RatePoint, ...]) -> tuple[RatePoint, ...]:
        return tuple(RatePoint(point.tokens, point.seconds / factor) for point in curve)

    return msgspec.structs.replace(truth, decode=faster(truth.decode), prefill=faster(truth.prefill))


def inflict(swarm: Swarm, fault: Fault) -> None:
    """Let it happen now, and end when it ends."""
    peer, engine = fault.peer, swarm.engine
    match fault.kind:
        case Kind.JOIN | Kind.LIE:
            if peer not in swarm.peers and machine_of(peer) in swarm.world.machines:
                truth = swarm.world.machines[machine_of(peer)]
                swarm.join(peer, claimed(truth, fault.factor))
        case Kind.COORDINATOR:
            coordinator = swarm.coordinator()
            if coordinator is not None:
                swarm.crash(coordinator)
        case Kind.PARTITION:
            pairs = [(a, b) for a in swarm.peers for b in swarm.peers if a <= peer < b]
            for a, b in pairs:
                swarm.network.cut(a, b)
                engine.after(fault.seconds, swarm.network.mend, a, b)
        case Kind.FLAP:
            _flap(swarm, fault, engine.now + fault.seconds)
        case Kind.THIN:
            swarm.network.slow(peer, fault.other, fault.factor)
            engine.after(fault.seconds, swarm.network.slow, peer, fault.other, 1.0)
        case _ if peer in swarm.peers:
            _befall(swarm, fault)


def _befall(swarm: Swarm, fault: Fault) -> None:
    """What happens to one peer that is there."""
    peer, one = fault.peer, swarm.peers[fault.peer]
    match fault.kind:
        case Kind.CRASH:
            swarm.crash(peer)
        case Kind.VANISH:
            swarm.vanish(peer)
        case Kind.LEAVE:
            swarm.leave(peer)
        case Kind.SKEW:
            now = swarm.engine.now
            one.clock_offset_s, one.clock_rate = one.clock(now) - now * fault.factor, fault.factor
        case Kind.SLOW:
            one.device.slowdown = fault.factor
            swarm.engine.after(fault.seconds, _recover, swarm, peer)


def _recover(swarm: Swarm, peer: PeerId) -> None:
    if peer in swarm.peers:
        swarm.peers[peer].device.slowdown = 1.0


def _flap(swarm: Swarm, fault: Fault, until: float) -> None:
    """Cut, mend, cut again."""
    swarm.network.cut(fault.peer, fault.other)
    swarm.engine.after(FLAP_S, swarm.network.mend, fault.peer, fault.other)
    if swarm.engine.now + 2 * FLAP_S < until:
        swarm.engine.after(2 * FLAP_S, _flap, swarm, fault, until)

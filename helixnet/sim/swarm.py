"""A swarm of real `Peer` machines under virtual time: the driver's part, played by the event heap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from helixnet.core.machine import (
    NEVER,
    BatchDone,
    DropLayers,
    Dropped,
    Effect,
    Emit,
    Event,
    EvictKv,
    ExtendKv,
    Gone,
    Loaded,
    LoadSpan,
    OpenKv,
    Outcome,
    Publish,
    ReleaseKv,
    RunBatch,
    SealKv,
    Send,
    Solve,
    Solved,
)
from helixnet.core.peer import Peer, PeerConfig, PeerFacts
from helixnet.core.plan.coordinator import pointer_key
from helixnet.core.swarm.capability import Capability
from helixnet.core.swarm.directory import front_key
from helixnet.core.swarm.records import (
    LINKS_MAX,
    LinkMeasure,
    PeerRecord,
    coordinator_named,
    decode_pointer,
    decode_record,
)
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.sim.compute import ROW_BYTES, Device, digested
from helixnet.sim.directory import Directory
from helixnet.sim.engine import Engine
from helixnet.sim.invariants import PeerWatch
from helixnet.sim.network import Frame, Network
from helixnet.sim.sizes import Sizes, record_id_bytes
from helixnet.sim.traffic import Traffic
from helixnet.sim.world import World, machine_of

NETWORK = "sim"
DIRECTORY_S = 0.15
"""A DHT read or write takes about this long: a few hops over the internet."""
UNREACHABLE_S = 3.0
"""Until a message to a machine that is switched off is given up."""
MEASURING_S = 5.0
"""A fresh peer measures itself before it can be planned."""
LINKS_S = 20.0
"""A peer looks at its links this often."""
TICK_S_MIN = 0.005


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the driver's part is played."""

    peer: PeerConfig = PeerConfig()
    read_s: float = 2.0
    """Peers read the directory this often."""
    tick_s_max: float = 0.25
    """Machines are ticked at least this often, as the real driver does; large swarms may take it easier."""
    checked: bool = True
    """Whether all invariants are checked after every event at a peer."""


@dataclass(slots=True)
class SimPeer:
    """One process of a peer, its device, and its clock: whoever comes back by the same name is another."""

    name: PeerId
    peer: Peer
    device: Device
    watch: PeerWatch
    clock_offset_s: float = 0.0
    clock_rate: float = 1.0
    joined_at: float = 0.0
    left_at: float = NEVER
    talked: dict[PeerId, None] = field(default_factory=dict)
    """Who has a channel with it, in order of first contact."""
    sent_bytes: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether this process is gone, even if another runs by its name now."""
        return self.left_at < NEVER

    def clock(self, now: float) -> float:
        """What its own clock says."""
        return self.clock_offset_s + now * self.clock_rate


Answer = Callable[[], Solved]
"""What the planner says. Asked for when it is due; who plans meanwhile on another core has it then."""
Solving = Callable[[Solve], tuple[Answer, float]]
"""A question to the planner, and how long its answer takes."""
Delivered = Callable[[PeerId, PeerId, wire.Message | Outcome], None]
Heard = Callable[[float, PeerId, Event], None]


class Swarm:
    """Peers, their links and their directory. Clients are somebody else's: they are `attach`ed."""

    def __init__(self, engine: Engine, world: World, config: SimConfig, solve: Solving) -> None:
        self.engine = engine
        self.world = world
        self.config = config
        self.manifest = digested(world.manifest)
        self._pointer_key = pointer_key(NETWORK, self.manifest.hash)
        self.network = Network(engine, world, self._deliver)
        self.peers: dict[PeerId, SimPeer] = {}
        self.gone: dict[PeerId, SimPeer] = {}
        """Those that died or left, for the report."""
        self.on_event: Heard = lambda now, peer, event: None
        self._solve = solve
        self._clients: dict[PeerId, Delivered] = {}
        self.traffic = Traffic()
        self._directory = Directory(engine, self.peers, self._count)
        self._decoded: dict[PeerId, tuple[bytes, PeerRecord]] = {}
        """What was last read of each owner's, so that a thousand readers decode it once."""
        self._sizes = Sizes(world.manifest.activation_bytes / ROW_BYTES)

    # --- who is there ------------------------------------------------------------------------------

    def attach(self, client: PeerId, deliver: Delivered) -> None:
        """Messages to `client` go to `deliver(client, sender, message)`."""
        self._clients[client] = deliver

    def join(self, name: PeerId, said: Capability | None = None) -> SimPeer:
        """A machine of the world starts a peer; it says of itself what it measured, or `said`."""
        truth = self.world.machines[machine_of(name)]
        device = Device(self.manifest, self.world.timing(name), self.world.load_bytes_per_s)
        facts = PeerFacts(
            peer=name, name=name, network=NETWORK, manifest=self.manifest, memory_bytes=truth.memory_bytes
        )
        peer = Peer(facts, self.config.peer, self.engine.now)
        peer.addresses = (f"/sim/{name}",)
        one = SimPeer(name, peer, device, PeerWatch(peer), joined_at=self.engine.now)
        self.peers[name] = one
        self._directory.changed()
        self.engine.note(f"join {name}")
        self.engine.after(self.engine.rng.uniform(0, 0.2), self._tick, one)
        self.engine.after(self.engine.rng.uniform(0, 0.2), self._read, one)
        self.engine.after(MEASURING_S * self.engine.rng.uniform(0.5, 1.5), self._measured, one, said or truth)
        return one

    def crash(self, name: PeerId) -> None:
        """The process dies: its machine's network stack tells whoever had a channel with it."""
        one = self._remove(name, "crash")
        for other in one.talked:
            self.engine.after(self.world.link(name, other).latency_s, self._came, name, other, Gone("connection reset"))

    def vanish(self, name: PeerId) -> None:
        """The machine is switched off: nobody is told, and messages to it stay unanswered."""
        self._remove(name, "vanish")

    def leave(self, name: PeerId) -> None:
        """The peer leaves in good order."""
        one = self.peers[name]
        self.engine.note(f"leave {name}")
        self._apply(name, one.peer.leave(one.clock(self.engine.now)))
        self._leaving(one)

    def _leaving(self, one: SimPeer) -> None:
        if one.has_ended:
            return
        if one.peer.may_stop(one.clock(self.engine.now)):
            self._apply(one.name, one.peer.stop())
            self.engine.after(0.5, self._stopped, one)
        else:
            self.engine.after(0.25, self._leaving, one)

    def _stopped(self, one: SimPeer) -> None:
        if not one.has_ended:
            self.crash(one.name)

    def _remove(self, name: PeerId, how: str) -> SimPeer:
        one = self.gone[name] = self.peers.pop(name)
        self._directory.changed()
        one.left_at = self.engine.now
        self.engine.note(f"{how} {name}")
        return one

    # --- the driver's loops ------------------------------------------------------------------------

    def _tick(self, one: SimPeer) -> None:
        if one.has_ended:
            return
        now = one.clock(self.engine.now)
        self._apply(one.name, one.peer.tick(now))
        wait_s = max(TICK_S_MIN, min(self.config.tick_s_max, (one.peer.deadline() - now) / one.clock_rate))
        self.engine.after(wait_s, self._tick, one)

    def _read(self, one: SimPeer) -> None:
        if one.has_ended:
            return
        for key in one.peer.keys_to_read(self.config.read_s, one.clock(self.engine.now)):
            self.engine.after(DIRECTORY_S, self._listed, one, key, self.members(one.name, key))
        self.engine.after(self.config.read_s, self._read, one)

    def members(self, reader: PeerId, key: str = front_key(NETWORK)) -> list[PeerRecord]:
        """What the directory tells `reader`; records of those it is cut off from do not reach it."""
        entries, cut = self._directory.read(key, reader), self.network.cut_from(reader)
        return [self._record(owner, value) for owner, value in entries.items() if owner not in cut]

    def coordinator(self) -> PeerId | None:
        """Who coordinates: of several, the one of the highest term."""
        acting = [(one.peer.coordinator.term, name) for name, one in self.peers.items() if one.peer.coordinator.term]
        return max(acting)[1] if acting else None

    def coordinator_named(self, reader: PeerId) -> PeerId | None:
        """Who coordinates, by the newest pointer in the directory."""
        entries = self._directory.read(self._pointer_key, reader)
        return coordinator_named(decode_pointer(owner, value) for owner, value in entries.items())

    def _record(self, owner: PeerId, value: bytes) -> PeerRecord:
        known = self._decoded.get(owner)
        if known is None or known[0] != value:
            known = self._decoded[owner] = value, decode_record(owner, value)
        return known[1]

    def _listed(self, one: SimPeer, key: str, records: list[PeerRecord]) -> None:
        if not one.has_ended:
            self._apply(one.name, one.peer.listed(records, one.clock(self.engine.now), key))

    def _measured(self, one: SimPeer, capability: Capability) -> None:
        if not one.has_ended:
            self._apply(one.name, one.peer.measured(capability, one.clock(self.engine.now)))
            self._measure_links(one)

    def _measure_links(self, one: SimPeer) -> None:
        """What the real peer's prober would know: its links to as many live members as a record holds."""
        if one.has_ended:
            return
        known = {measure.target: measure for measure in one.peer.links}
        live = [member.record.peer for member in one.peer.membership.live()[:LINKS_MAX]]
        one.peer.links = tuple([known.get(target) or self._measure(one.name, target) for target in live])
        self.engine.after(LINKS_S, self._measure_links, one)

    def _measure(self, source: PeerId, target: PeerId) -> LinkMeasure:
        """What is true of a link stays true."""
        link, back = self.world.link(source, target), self.world.link(target, source)
        return LinkMeasure(target, link.latency_s + back.latency_s, link.bandwidth)

    # --- effects -----------------------------------------------------------------------------------

    def _apply(self, me: PeerId, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.send(me, effect)
            elif isinstance(effect, RunBatch):
                self._run(me, effect)
            else:
                self._carry_out(me, effect)
        if self.config.checked and (one := self.peers.get(me)) is not None:
            one.watch.check()

    def _carry_out(self, me: PeerId, effect: Effect) -> None:
        """What does not come by the million."""
        match effect:
            case OpenKv():
                self.peers[me].device.open(effect.session, effect.layers, effect.tokens, effect.begun)
            case ExtendKv():
                self.peers[me].device.extend(effect.session, effect.tokens)
            case SealKv():
                self.peers[me].device.seal(effect.session, effect.blocks)
            case EvictKv():
                self.peers[me].device.evict(effect.blocks)
            case ReleaseKv():
                self.peers[me].device.release(effect.session)
            case Emit():
                self.on_event(self.engine.now, me, effect.event)
            case Publish():
                self.engine.after(DIRECTORY_S, self._publish, self.peers[me], effect)
            case Solve():
                answer, seconds = self._solve(self._truly(effect))
                self.engine.after(seconds, self._answered, self.peers[me], answer)
            case LoadSpan() | DropLayers():
                self._move(me, effect)

    def _answered(self, one: SimPeer, answer: Answer) -> None:
        if not one.has_ended:
            self._came(one.name, one.name, answer())

    def _truly(self, effect: Solve) -> Solve:
        """The question with the model's real rows, which the planner charges links for."""
        snapshot = msgspec.structs.replace(effect.snapshot, manifest=self.world.manifest)
        return msgspec.structs.replace(effect, snapshot=snapshot)

    def _publish(self, one: SimPeer, effect: Publish) -> None:
        if not one.has_ended:
            key, value = effect.key, effect.value
            longer = record_id_bytes(self._record(one.name, value)) if key != self._pointer_key else 0
            self._directory.publish(one.name, effect, len(value) + longer)

    def _run(self, me: PeerId, effect: RunBatch) -> None:
        one = self.peers[me]
        seconds = one.device.seconds(effect.batch)
        self.engine.after(seconds, self._ran, one, effect, seconds)

    def _ran(self, one: SimPeer, effect: RunBatch, seconds: float) -> None:
        if not one.has_ended:
            self._came(one.name, one.name, BatchDone(one.device.run(effect.batch, seconds), seconds))

    def _move(self, me: PeerId, effect: LoadSpan | DropLayers) -> None:
        one = self.peers[me]
        seconds = one.device.load_s(effect.span) if isinstance(effect, LoadSpan) else TICK_S_MIN
        self.engine.after(seconds, self._moved, one, effect)

    def _moved(self, one: SimPeer, effect: LoadSpan | DropLayers) -> None:
        if one.has_ended:
            return
        if isinstance(effect, LoadSpan):
            one.device.load(effect.span)
            self._came(one.name, one.name, Loaded(one.device.held()))
        else:
            one.device.drop(effect.keep)
            self._came(one.name, one.name, Dropped(one.device.held()))

    # --- messages ----------------------------------------------------------------------------------

    def send(self, me: PeerId, effect: Send) -> None:
        """Put a message of a peer or a client on its way."""
        to, message = effect.to, effect.message
        here, there = self.peers.get(me), self.peers.get(to)
        if there is None and to not in self._clients:
            delay_s = UNREACHABLE_S if here is None or to in here.talked else self.world.link(me, to).latency_s
            self.engine.after(delay_s, self._came, to, me, Gone("cannot be reached"))
            return
        size = self._sizes.of(message, effect.body)
        if here is not None:
            here.talked[to] = None
            here.sent_bytes += size
        if not self._sizes.serves(message):
            self._count(type(message).__name__, size, me, to)
        if there is not None:
            there.talked[me] = None
        self.network.send(me, to, size, effect.lane, (message, effect.body))

    def _count(self, kind: str, size: int, sender: PeerId, to: PeerId) -> None:
        """Control traffic: so many bytes from one to another."""
        traffic, here, there = self.traffic, self.peers.get(sender), self.peers.get(to)
        if here is not None:
            traffic.sent[sender] += size
            traffic.kinds[kind] += size
            if here.peer.coordinator.term:
                traffic.coordinator_sent[kind] += size
        if there is not None and there.peer.coordinator.term:
            traffic.coordinator_received[kind] += size

    def _deliver(self, sender: PeerId, to: PeerId, frame: Frame) -> None:
        message, body = frame
        one = self.peers.get(to)
        if one is not None:
            rows = body if isinstance(body, memoryview) else memoryview(body)
            self._apply(to, one.peer.receive(sender, message, one.clock(self.engine.now), rows))
        elif to in self._clients:
            self._clients[to](to, sender, message)

    def _came(self, sender: PeerId, to: PeerId, outcome: Outcome) -> None:
        """An outcome reaches a peer, or news of a broken channel a client."""
        one = self.peers.get(to)
        if one is not None:
            self._apply(to, one.peer.receive(sender, outcome, one.clock(self.engine.now)))
        elif to in self._clients:
            self._clients[to](to, sender, outcome)

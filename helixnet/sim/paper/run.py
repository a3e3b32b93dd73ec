"""One run of the paper's system: a placement, its routes, a router and a load in; throughput and latencies out."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from helixnet.core.errors import UsageError
from helixnet.core.types import Span
from helixnet.planner.flow import OUTSIDE, Edge
from helixnet.planner.problem import Spans
from helixnet.sim.engine import Engine
from helixnet.sim.paper.admission import Admission, Expected
from helixnet.sim.paper.feeder import Constant, Feed, Feeder, FillKv, mean_output
from helixnet.sim.paper.instance import Instance
from helixnet.sim.paper.machines import CONCATENATES_BYTES_PER_S, COPIES_BYTES_PER_S, Holding, Machine
from helixnet.sim.paper.network import links_of
from helixnet.sim.paper.outcome import Outcome, Tally, spread
from helixnet.sim.paper.routers import FLOW_ROUTERS, ROUTERS, usable
from helixnet.sim.paper.sessions import Hop, Session

LOOK_S = 1.0
"""Between looks at KV memory."""
LIVES_MISSING = 0.01
"""Share of the lives to be measured that need not be."""
MEASURED_S_MAX = 14_400.0


@dataclass(frozen=True, slots=True)
class Windows:
    """What is measured."""

    warm_up_s: float = 60.0
    measured_s: float = 600.0
    lives: float = 0.0
    """Longer, up to MEASURED_S_MAX, if it takes longer to measure so many lives of a mean request under way."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a run depends on, but for its seed."""

    instance: Instance
    spans: Spans
    """By machine."""
    flows: Mapping[Edge, float]
    """Tokens/s on every edge that may be used, 0 where none is planned; `instance.flows_of` or anybody's plan."""
    router: str
    """One of `routers.ROUTERS`."""
    feed: Feed
    admission: Admission | None
    """None: requests are routed to machines however full, as the authors' other schedulers do."""
    windows: Windows = Windows()
    kv_tokens: Mapping[int, int] = field(default_factory=dict)
    """KV tokens of each layer that a machine has room for, where it is not what the profile says."""

    def kv_token_layers(self, number: int) -> int:
        """KV room of a machine that holds something."""
        layers = len(_span(self, number))
        if number in self.kv_tokens:
            return self.kv_tokens[number] * layers
        return self.instance.kv_token_layers(number, layers)


def simulate(setup: Setup, seed: int) -> Outcome:
    """Run it. Pure: equal arguments give equal outcomes, digest included, in any process.

    Raises:
        UsageError: the setup does not fit together.
    """
    return _Run(setup, seed).outcome()


class _Run:
    """The coordinator, and what it has set up."""

    def __init__(self, setup: Setup, seed: int) -> None:
        _check(setup)
        self.setup, self.engine = setup, Engine(seed)
        self.measured_s = setup.windows.measured_s
        self.tally = Tally(setup.windows.warm_up_s, mean_output(setup.feed))
        self.machines = self._machines()
        self.ways = self._ways()
        self.router = ROUTERS[setup.router](self.ways, random.Random(f"router {seed}"))
        self.reach = _reach(self.ways)
        rooms = {number: machine.holding.kv_token_layers for number, machine in self.machines.items()}
        self.expected = Expected(setup.instance.problem.layers, setup.spans, rooms, setup.admission)
        self.feeder = Feeder(setup.feed, self, seed)
        self.waiting: deque[Session] = deque()
        self.numbers = itertools.count()
        self.launched = self.in_flight = self.rejected = self.impossible = 0

    def outcome(self) -> Outcome:
        """Let it happen and sum it up."""
        engine, tally = self.engine, self.tally
        self.feeder.begin()
        engine.at(self.setup.windows.warm_up_s, self._look)
        measured_s = self._measure()
        machines, steps = self.machines.values(), len(tally.decode_s)
        return Outcome(
            measured_s=measured_s,
            life_s=tally.life_s,
            decode_tokens_per_s=steps / measured_s,
            prompt_tokens_per_s=tally.prompt_tokens / measured_s,
            prompt_s=spread(tally.prompt_s),
            decode_s=spread(tally.decode_s),
            ttft_s=spread(tally.ttft_s),
            tpot_s=spread(tally.tpot_s),
            hops_mean=tally.hops / max(1, steps),
            kv_share=tally.kv_share,
            kv_peak_share=max(each.kv_peak / max(1, each.holding.kv_token_layers) for each in machines),
            in_flight_mean=tally.in_flight_mean,
            batch_mean=sum(each.steps for each in machines) / max(1, sum(each.batches for each in machines)),
            busy={number: each.busy_s / engine.now for number, each in self.machines.items()},
            hop_sessions={hop.edge: hop.sessions for hops in self.ways.values() for hop in hops},
            hop_tokens={hop.edge: hop.link.tokens for hops in self.ways.values() for hop in hops},
            timeline=tally.timeline,
            launched=self.launched,
            finished=tally.finished,
            decoded=tally.decoded,
            rejected=self.rejected,
            impossible=self.impossible,
            waiting=len(self.waiting),
            waited=sum(each.waited for each in machines),
            events=engine.events + sum(each.arrivals for each in machines),
            digest=engine.digest(),
        )

    def _measure(self) -> float:
        """Run on until all that should be is measured; returns how long that took."""
        windows = self.setup.windows
        measured_s = windows.measured_s
        self.engine.run(until=windows.warm_up_s + measured_s)
        while (wanted_s := min(MEASURED_S_MAX, windows.lives * self.tally.life_s)) * (1 - LIVES_MISSING) > measured_s:
            measured_s = wanted_s
            self.engine.run(until=windows.warm_up_s + measured_s)
        return measured_s

    def launch(self, at_s: float, input_tokens: int, output_tokens: int) -> None:
        """A request comes to the coordinator then."""
        self.engine.at(at_s, self._come, Session(next(self.numbers), at_s, input_tokens, output_tokens))

    def fullest(self) -> float:
        """Share of KV room expected to be taken, in the fullest layer. There is none for more while somebody waits."""
        return 1.0 if self.waiting else self.expected.fullest()

    def _come(self, session: Session) -> None:
        self.launched += 1
        if session.tokens > self.reach[OUTSIDE]:
            self.impossible += 1
            self.feeder.impossible(self.engine.now)
        elif self.setup.admission is not None and self.setup.admission.waits:
            self.waiting.append(session)
            self._let_in()
        elif not self._enter(session):
            self.rejected += 1
            self.feeder.rejected(self.engine.now)

    def _let_in(self) -> None:
        """Those who wait, in turn. Whoever finds no way while nobody is under way never will."""
        while self.waiting:
            if not self._enter(self.waiting[0]):
                if self.in_flight:
                    return
                self.impossible += 1
                self.feeder.impossible(self.engine.now)
            self.waiting.popleft()

    def _enter(self, session: Session) -> bool:
        """Give it a way, or at least a first hop, and send its prompt."""
        while not session.path or (self.router.ahead and session.path[-1].machine is not None):
            tail = session.path[-1].edge[1] if session.path else OUTSIDE
            hop = self._choose(tail, session, strict=True)
            if hop is None:
                for taken in session.path:
                    self.router.undo(taken, session)
                session.path.clear()
                return False
            session.path.append(hop)
        for hop in session.path:
            self._took(hop, session)
        self.in_flight += 1
        session.started_s = self.engine.now
        self._send(session)
        return True

    def _choose(self, tail: int, session: Session, *, strict: bool) -> Hop | None:
        """A hop to where there is room, or else, unless `strict`, to anywhere that has room at other times."""
        fits = [hop for hop in self.ways[tail] if session.tokens <= self._room_beyond(hop)]
        hops = [hop for hop in fits if hop.machine is None or not self.expected.full(hop.machine.number, session.input)]
        if not hops and not strict:
            hops = fits
        return self.router.choose(hops, session, self.engine.now) if hops else None

    def _room_beyond(self, hop: Hop) -> float:
        if hop.machine is None:
            return float("inf")
        return min(hop.machine.holding.kv_token_layers // hop.layers, self.reach[hop.machine.number])

    def _took(self, hop: Hop, session: Session) -> None:
        hop.sessions += 1
        self.expected.add(session, hop)

    def _send(self, session: Session) -> None:
        """From the coordinator to the first machine of its way."""
        hop = session.path[0]
        assert hop.machine is not None, "nothing leads from the coordinator straight back"
        hop.machine.deliver(session, hop.link.send(session, self.engine.now))

    def _passed(self, batch: list[Session]) -> None:
        """They have run their layers on a machine. This is where a run spends its time."""
        now, router = self.engine.now, self.router
        for session in batch:
            path, stage = session.path, session.stage
            if router.learns:
                router.observe(path[stage], now - session.sent_s)
            stage += 1
            if stage == len(path):
                self._lengthen(session)
            session.stage = stage
            hop = path[stage]
            arrives = hop.link.send(session, now)
            if hop.machine is not None:
                hop.machine.deliver(session, arrives)
            else:
                self.engine.at(arrives, self._returned, session)

    def _lengthen(self, session: Session) -> None:
        """Choose where a prompt goes from the end of its way so far."""
        onward = self._choose(session.path[-1].edge[1], session, strict=False)
        assert onward is not None, "whatever enters fits all the way"
        session.path.append(onward)
        self._took(onward, session)

    def _returned(self, session: Session) -> None:
        """An iteration's token is back at the coordinator."""
        now, first = self.engine.now, not session.in_decode
        if first:
            self.tally.prompted(session, now)
            session.in_decode, session.prompted_s, session.cached = True, now, session.input
        else:
            self.tally.stepped(session, now)
            session.cached += 1
        if session.cached == session.tokens:
            self._end(session)
            return
        session.stage, session.started_s = 0, now
        self.router.repeat(session)
        self._send(session)
        if first:
            self.feeder.prompted(now)

    def _end(self, session: Session) -> None:
        now = self.engine.now
        self.tally.ended(session, now)
        self.engine.note(f"{session.number} {session.input} {session.output}")
        self.in_flight -= 1
        self.expected.remove(session)
        for hop in session.path:
            if hop.machine is not None:
                hop.machine.release(session.tokens, hop.layers)
        self._let_in()
        self.feeder.ended(now)

    def _look(self) -> None:
        machines = self.machines.values()
        room = sum(each.holding.kv_token_layers for each in machines)
        self.tally.look(sum(each.kv_used for each in machines) / max(1, room), self.in_flight)
        self.engine.after(LOOK_S, self._look)

    def _machines(self) -> dict[int, Machine]:
        """Those that an edge leads to."""
        setup, instance = self.setup, self.setup.instance
        unpack_s = instance.activation_bytes * (1 / CONCATENATES_BYTES_PER_S + 1 / COPIES_BYTES_PER_S)
        machines = {}
        for number in sorted({head for _, head in setup.flows if head != OUTSIDE}):
            profile, span = instance.profiles[instance.kinds[number]], _span(setup, number)
            cuts = [*_entries(setup, number), span.stop]
            holding = Holding(
                segments=tuple(after - before for before, after in itertools.pairwise(cuts)),
                kv_token_layers=setup.kv_token_layers(number),
                limits=profile.limits_for(len(span)),
            )
            machines[number] = Machine(self.engine, number, profile, holding, unpack_s, self._passed)
        return machines

    def _ways(self) -> dict[int, list[Hop]]:
        """Hops by where they start; for routers of flow only those with a fair part of it."""
        setup, by_flow = self.setup, self.setup.router in FLOW_ROUTERS
        links = links_of(setup.instance, setup.flows, by_flow)
        ways: dict[int, list[Hop]] = {}
        for edge, flow in sorted(setup.flows.items()):
            tail, head = edge
            entry = 0, 0
            if head != OUTSIDE:
                layer, entries = _layer_before(setup, tail), _entries(setup, head)
                entry = entries.index(layer), _span(setup, head).stop - layer
            hop = Hop(edge, links[edge], self.machines.get(head), flow, entry)
            ways.setdefault(tail, []).append(hop)
        return {tail: usable(hops) if by_flow else hops for tail, hops in ways.items()}


def _reach(ways: Mapping[int, list[Hop]]) -> dict[int, float]:
    """The longest request that can get from each machine, and from the coordinator, to the end."""
    reach: dict[int, float] = {}

    def of(tail: int) -> float:
        if tail not in reach:
            reach[tail] = max((beyond(hop) for hop in ways.get(tail, ())), default=0.0)
        return reach[tail]

    def beyond(hop: Hop) -> float:
        if hop.machine is None:
            return float("inf")
        return min(hop.machine.holding.kv_token_layers // hop.layers, of(hop.machine.number))

    of(OUTSIDE)
    return reach


def _span(setup: Setup, number: int) -> Span:
    span = setup.spans[number]
    assert span is not None, "checked"
    return span


def _layer_before(setup: Setup, tail: int) -> int:
    """The layer that comes next after a machine, or after the coordinator."""
    return 0 if tail == OUTSIDE else _span(setup, tail).stop


def _entries(setup: Setup, number: int) -> list[int]:
    """Layers at which requests enter a machine's span, and its first."""
    layers = {_layer_before(setup, tail) for tail, head in setup.flows if head == number}
    return sorted(layers | {_span(setup, number).start})


def _check(setup: Setup) -> None:
    """Whether a setup fits together."""
    instance, layers = setup.instance, setup.instance.problem.layers
    if len(setup.spans) != len(instance.kinds):
        raise UsageError(f"{instance.name} has {len(instance.kinds)} machines, but the placement {len(setup.spans)}.")
    if setup.router not in ROUTERS:
        raise UsageError(f"There is no router {setup.router!r}. There are {', '.join(ROUTERS)}.")
    for tail, head in setup.flows:
        ends = [number for number in (tail, head) if number != OUTSIDE]
        if not ends or any(not 0 <= number < len(setup.spans) or setup.spans[number] is None for number in ends):
            raise UsageError(f"The edge {tail} -> {head} does not join machines that hold something.")
        before = _layer_before(setup, tail)
        if before != layers if head == OUTSIDE else not _span(setup, head).start <= before < _span(setup, head).stop:
            raise UsageError(f"The edge {tail} -> {head} leads to where layer {before} is not held.")
        if instance.link((tail, head))[0] <= 0:
            raise UsageError(f"The edge {tail} -> {head} has no link in {instance.name}.")
    heads = sorted({head for _, head in setup.flows if head != OUTSIDE})
    prompt_max = min(
        (instance.profiles[instance.kinds[n]].limits_for(len(_span(setup, n))).prompt_tokens for n in heads), default=0
    )
    longest = max((input_tokens for input_tokens, _ in _asked(setup.feed)), default=0)
    if longest > prompt_max:
        raise UsageError(f"A prompt has {longest} tokens, but a machine takes {prompt_max} in a batch at most.")


def _asked(feed: Feed) -> list[tuple[int, int]]:
    if isinstance(feed, FillKv | Constant):
        return list(feed.lengths)
    return [(each.input_tokens, each.output_tokens) for each in feed.arrivals]

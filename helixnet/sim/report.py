"""What a simulation shows: what was served, how quickly, what was busy, what changed, and what had been predicted.

Rates, latencies and shares are of the counted time: from the end of the warm-up to the end of the load. Changes,
retries and losses are of all of it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Hashable, Sequence

import msgspec
import numpy as np

from helixnet.core.plan.plan import Prediction
from helixnet.core.stage.batch import DECODE_BATCH_MAX, PREFILL_BUDGET_TOKENS
from helixnet.core.types import PeerId, Span
from helixnet.planner.problem import seconds_at
from helixnet.sim.samples import Kv, Sampler
from helixnet.sim.simulation import Simulation
from helixnet.sim.swarm import SimPeer
from helixnet.sim.tally import RequestTally
from helixnet.sim.traffic import Traffic
from helixnet.sim.world import machine_of

LINES_MAX = 20
"""The busiest lines are named, no more ..."""
LOSSES_MAX = 10
"""... and so many reasons for losses."""
PERCENTS = (*range(100), 99.5, 99.9, 100)
"""At which a spread keeps its quantiles, for curves."""
LIMITING = 0.8
"""Who is loaded so far, or so full, is what limits; queues grow long before 1."""
PROMPT_TOKENS = (16, 64, PREFILL_BUDGET_TOKENS)
"""Of a batch, at which it is looked where prompts go quickest."""
PLAN_ACTIVE, COORDINATOR_CHANGED = "plan.active", "coordinator.changed"
LOAD_BEGINS, LOAD_ENDS = "load begins", "load ends"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count as good."""

    ttft_s: float = 10.0
    tpot_s: float = 0.5
    """Two tokens/s: somewhat slower than people read."""

    def kept(self, request: RequestTally) -> bool:
        """Whether the answer came whole and in time."""
        return not request.problem and request.ttft_s <= self.ttft_s and request.tpot_s <= self.tpot_s


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How long something took, over all times it happened; seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    quantiles: tuple[float, ...]
    """At PERCENTS."""


class PeerUse(msgspec.Struct, frozen=True, kw_only=True):
    """One peer, while it was there."""

    peer: PeerId
    device: str
    span: Span | None
    """In the last plan."""
    present_s: float
    busy: float
    """Share of the time in which its device computed, be it in small batches."""
    load: float
    """Share of the time that the same work takes in the batches that its device is best at."""
    kv: float
    """Share of its KV pages that were reserved, on average."""
    kv_max: float
    control_bytes_per_s: float
    """Sent to run the swarm: everything but activations, tokens and reservations."""


class ControlUse(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of control traffic, bytes/s: a message by its name, or the directory."""

    kind: str
    bytes_per_s: float
    """Sent by all peers together."""
    coordinator_sent_per_s: float
    coordinator_received_per_s: float


class LineUse(msgspec.Struct, frozen=True, kw_only=True):
    """One line: a link, or an uplink that many links share."""

    line: str
    busy: float
    """Share of the time; what is more than 1 waits."""
    bytes_per_s: float
    waited_s_max: float
    """Longest wait of a frame for others, ever."""


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A few seconds of the load; `at_s` is where they begin, from the beginning of the load."""

    at_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    in_flight: int
    """At the end, as all that follows."""
    peers: int
    kv: float
    predicted_tokens_per_s: float


class MarkAt(msgspec.Struct, frozen=True):
    """Something that happened; `at_s` from the beginning of the load."""

    at_s: float
    what: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it."""

    name: str
    model: str
    layers: int
    seed: int
    machines: int
    """That were there at the beginning."""
    per_s: float
    """Offered requests/s; 0 if `in_flight` was kept instead."""
    in_flight: int
    """Requests that were kept in flight; 0 if they came at their own times."""
    seconds: float
    """Of load."""
    warm_s: float
    counted_s: float

    tokens_per_s: float
    """Decoded, at clients."""
    prompt_tokens_per_s: float
    limits: Limits
    goodput_per_s: float
    """Requests/s within the limits."""
    good: float
    """Share of requests within the limits."""
    ttft: Spread | None
    """None if there was none; of requests that were asked in the counted time, as `tpot`."""
    tpot: Spread | None
    itl: Spread | None
    backlog: int
    """By how much the requests in flight grew over the counted time."""

    asked: int
    ended: int
    lost: int
    """Requests that ended in an error, or never."""
    losses: tuple[str, ...]
    """Why, the most frequent first."""
    retries: int
    tokens_wrong: int
    """Repeated, reordered, missing or others than the undisturbed model's: the clients check every token."""

    kv: float
    """Share of all KV pages that were reserved, on average."""
    kv_max: float
    control_bytes_per_s: float
    """Of a peer, on average."""
    control: tuple[ControlUse, ...]
    """The largest first."""
    plans: int
    """That became active after the load began."""
    coordinators: int
    """Changes of the coordinator after the load began."""
    prediction: Prediction | None
    """Of the plan that was active last."""
    problem: str
    """Why none was, in words."""
    limited_by: str
    peers: tuple[PeerUse, ...]
    """By id; those that were there in the counted time."""
    lines: tuple[LineUse, ...]
    """The busiest first."""
    over_time: tuple[Column, ...]
    marks: tuple[MarkAt, ...]
    events: int
    digest: str

    @property
    def is_sound(self) -> bool:
        """Whether every request ended with all its tokens, once and in order."""
        return not self.lost and not self.tokens_wrong

    @property
    def offered(self) -> str:
        """The load in words."""
        count, where = (self.per_s, "/s") if self.per_s else (self.in_flight, " in flight")
        return f"{count:g} request{'' if count == 1 else 's'}{where}"

    def to_json(self) -> bytes:
        """As one JSON object."""
        return msgspec.json.encode(self)


def from_json(text: bytes) -> Report:
    """The report that `to_json` wrote."""
    return msgspec.json.decode(text, type=Report)


def report(simulation: Simulation, name: str, limits: Limits | None = None) -> Report:
    """What a finished simulation shows."""
    setup, tally, sampler = simulation.setup, simulation.tally, simulation.sampler
    kept = limits or Limits()
    opened, closed = sampler.opened, sampler.closed
    counted_s = closed.at - opened.at
    asked = [one for one in tally.requests if opened.at <= one.asked_at < closed.at]
    good = sum(kept.kept(one) for one in asked)
    peers, lines = _peer_uses(simulation), _line_uses(simulation)
    counted = [one for one in sampler.samples if one.at >= opened.at and one.kv_capacity]
    kv = [one.kv_used / one.kv_capacity for one in counted]
    ended = len(tally.requests)
    never = simulation.in_flight()
    plan = sampler.plan
    later = [mark.what for mark in tally.marks if mark.at > simulation.began_at]
    return Report(
        name=name,
        model=setup.world.manifest.name,
        layers=setup.world.manifest.layers,
        seed=setup.seed,
        machines=len(setup.peers),
        per_s=setup.load.per_s,
        in_flight=setup.load.in_flight,
        seconds=setup.seconds,
        warm_s=simulation.warm_s,
        counted_s=counted_s,
        tokens_per_s=(closed.tokens - opened.tokens) / counted_s,
        prompt_tokens_per_s=(closed.prompt_tokens - opened.prompt_tokens) / counted_s,
        limits=kept,
        goodput_per_s=good / counted_s,
        good=good / max(1, len(asked)),
        ttft=spread([one.ttft_s for one in asked if one.tokens]),
        tpot=spread([one.tpot_s for one in asked if one.tokens > 1]),
        itl=spread(tally.gaps_s[opened.gaps : closed.gaps]),
        backlog=closed.in_flight - opened.in_flight,
        asked=ended + never,
        ended=ended,
        lost=tally.lost + never,
        losses=_losses(tally.requests, never),
        retries=tally.retries,
        tokens_wrong=sum(not one.problem and one.tokens != one.output_tokens for one in tally.requests),
        kv=sum(kv) / max(1, len(kv)),
        kv_max=max(kv, default=0.0),
        control_bytes_per_s=_mean_control(peers),
        control=_control_uses(opened.traffic, closed.traffic, counted_s),
        plans=sum(what.startswith(PLAN_ACTIVE) for what in later),
        coordinators=sum(what.startswith(COORDINATOR_CHANGED) for what in later),
        prediction=plan.placement.prediction if plan is not None else None,
        problem=sampler.problem,
        limited_by=limited_by(peers, lines, setup.load.in_flight, _has_kept_up(sampler, len(asked))),
        peers=peers,
        lines=lines,
        over_time=_columns(simulation),
        marks=tuple(MarkAt(mark.at - simulation.began_at, mark.what) for mark in tally.marks),
        events=simulation.engine.events,
        digest=simulation.engine.digest(),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and quantiles; None of nothing."""
    if not len(values):
        return None
    many = np.asarray(values, dtype=np.float64)
    at = [float(value) for value in np.percentile(many, PERCENTS)]
    return Spread(
        count=len(many), mean=float(many.mean()), p50=at[50], p90=at[90], p95=at[95], p99=at[99], quantiles=tuple(at)
    )


def limited_by(peers: Sequence[PeerUse], lines: Sequence[LineUse], in_flight: int, kept_up: bool) -> str:
    """Why no more was served, in words.

    Devices are judged by their load: they batch whatever is there, so that few requests keep them busy too.
    """
    loads = [(one.load, f"compute of {one.peer}", "loaded") for one in peers]
    loads += [(one.kv, f"KV memory of {one.peer}", "full") for one in peers]
    loads += [(min(1.0, one.busy), one.line, "busy") for one in lines]
    share, what, how = max(loads, key=lambda load: load[0], default=(0.0, "nobody", "loaded"))
    words = f"{what}, {100 * share:.0f} % {how}"
    if kept_up and not in_flight:
        return f"only what was asked for: the swarm kept up (closest to a limit: {words})"
    if share >= LIMITING:
        return words
    whole = "how many requests are in flight" if in_flight else "no single peer or link"
    return f"{whole} (closest to a limit: {words})"


def _has_kept_up(sampler: Sampler, asked: int) -> bool:
    """Whether no more requests are left in flight than chance leaves (their number varies by its square root)."""
    before, after = sampler.opened.in_flight, sampler.closed.in_flight
    return after - before <= 0.02 * asked + 2 * math.sqrt(before + after)


def _losses(requests: Sequence[RequestTally], never: int) -> tuple[str, ...]:
    """Problems that differ only in numbers are one, said in the words of the first."""
    alike: dict[str, list[str]] = {"": ["It never ended."] * never} if never else {}
    for request in requests:
        if request.problem:
            alike.setdefault(re.sub(r"\d+", "", request.problem), []).append(request.problem)
    often = sorted(alike.values(), key=lambda problems: (-len(problems), problems[0]))
    return tuple(f"{len(problems)} x {problems[0]}" for problems in often[:LOSSES_MAX])


def _mean_control(peers: Sequence[PeerUse]) -> float:
    there_s = sum(one.present_s for one in peers)
    return sum(one.control_bytes_per_s * one.present_s for one in peers) / there_s if there_s else 0.0


def _control_uses(opened: Traffic, closed: Traffic, counted_s: float) -> tuple[ControlUse, ...]:
    uses = [
        ControlUse(
            kind=kind,
            bytes_per_s=(closed.kinds[kind] - opened.kinds[kind]) / counted_s,
            coordinator_sent_per_s=(closed.coordinator_sent[kind] - opened.coordinator_sent[kind]) / counted_s,
            coordinator_received_per_s=(closed.coordinator_received[kind] - opened.coordinator_received[kind])
            / counted_s,
        )
        for kind in closed.kinds.keys() | closed.coordinator_received.keys()
    ]
    return tuple(sorted(uses, key=lambda use: (-use.bytes_per_s, use.kind)))


def _peer_uses(simulation: Simulation) -> tuple[PeerUse, ...]:
    sampler, uses = simulation.sampler, []
    for name, one in sampler.everybody().items():
        present_s = min(one.left_at, sampler.closed.at) - max(one.joined_at, sampler.opened.at)
        if present_s > 0:
            uses.append(_peer_use(name, one, present_s, simulation))
    return tuple(uses)


def _peer_use(name: PeerId, one: SimPeer, present_s: float, simulation: Simulation) -> PeerUse:
    sampler = simulation.sampler
    opened, closed, kv = sampler.opened, sampler.closed, sampler.kv.get(name, Kv())
    busy_s = closed.busy_s.get(name, 0.0) - opened.busy_s.get(name, 0.0)
    control = closed.traffic.sent[name] - opened.traffic.sent[name]
    return PeerUse(
        peer=name,
        device=one.peer.capability.device if one.peer.capability else "",
        span=sampler.plan.span_of(name) if sampler.plan is not None else None,
        present_s=present_s,
        busy=min(1.0, busy_s / present_s),
        load=min(1.0, _least_s(name, simulation) / present_s),
        kv=kv.share,
        kv_max=kv.share_max,
        control_bytes_per_s=control / present_s,
    )


def _least_s(name: PeerId, simulation: Simulation) -> float:
    """What a peer ran in the counted time would have taken so long in its device's best batches."""
    sampler, truth = simulation.sampler, simulation.setup.world.machines[machine_of(name)]
    before, after = (totals.layer_tokens.get(name, (0, 0)) for totals in (sampler.opened, sampler.closed))
    decoded = after[1] - before[1]
    prompts = after[0] - before[0] - decoded
    decode_s = min(seconds_at(truth.decode, count) / count for count in range(1, DECODE_BATCH_MAX + 1))
    prefill_s = min(seconds_at(truth.prefill, count) / count for count in PROMPT_TOKENS)
    return decoded * decode_s + prompts * prefill_s


def _line_uses(simulation: Simulation) -> tuple[LineUse, ...]:
    opened, closed = simulation.sampler.opened, simulation.sampler.closed
    counted_s, lines = closed.at - opened.at, simulation.swarm.network.lines
    uses = []
    for line, (busy_s, sent) in closed.lines.items():
        busy_before_s, sent_before = opened.lines.get(line, (0.0, 0))
        uses.append(
            LineUse(
                line=_line_words(line),
                busy=(busy_s - busy_before_s) / counted_s,
                bytes_per_s=(sent - sent_before) / counted_s,
                waited_s_max=lines[line].waited_s_max,
            )
        )
    return tuple(sorted(uses, key=lambda use: (-use.busy, use.line))[:LINES_MAX])


def _line_words(line: Hashable) -> str:
    return f"link {line[0]} -> {line[1]}" if isinstance(line, tuple) else f"uplink of {line}"


def _columns(simulation: Simulation) -> tuple[Column, ...]:
    samples = simulation.sampler.samples
    columns = []
    for before, after in itertools.pairwise(samples):
        seconds = after.at - before.at
        columns.append(
            Column(
                at_s=before.at - simulation.began_at,
                tokens_per_s=(after.tokens - before.tokens) / seconds,
                prompt_tokens_per_s=(after.prompt_tokens - before.prompt_tokens) / seconds,
                in_flight=after.in_flight,
                peers=after.peers,
                kv=after.kv_used / after.kv_capacity if after.kv_capacity else 0.0,
                predicted_tokens_per_s=after.predicted_tokens_per_s,
            )
        )
    return tuple(columns)

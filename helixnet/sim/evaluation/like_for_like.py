"""Every method with every router under one load and one rule of admission, in the paper's own system.

The authors gave each method a load of its own, chosen by hand, and windows of about one request's life. Here, offline,
all methods fill KV memory by the same rule; online, all get the same arrivals. Whoever finds no room waits at the
coordinator, whatever the router; nobody is turned away. Windows last ten lives of a request under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from helixnet.core.errors import UsageError
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import Edge
from helixnet.planner.objective import THROUGHPUT
from helixnet.planner.problem import LINK_SHARE, Spans
from helixnet.planner.solve import place
from helixnet.sim.evaluation.cells import Cell, Data, Row
from helixnet.sim.paper.admission import ONLINE, Admission
from helixnet.sim.paper.feeder import Feed, FillKv, Trace, arrivals_of, lengths_of
from helixnet.sim.paper.instance import Instance, flows_of, read_instance
from helixnet.sim.paper.outcome import Outcome
from helixnet.sim.paper.run import MEASURED_S_MAX, Setup, Windows, simulate

OURS, HELIX = "ours", "helix-milp"
METHODS = (OURS, HELIX, "petals", "swarm", "separate")
ROUTERS = ("iwrr", "swarm", "random", "shortest_queue", "min_latency")
LARGER = "llama70b"
ONLINE_TOKENS_PER_S: Mapping[tuple[str, str], float] = {
    ("single24", "llama70b"): 700.0,
    ("3cluster24", "llama70b"): 320.0,
    ("cluster42", "llama70b"): 2150.0,
    ("single24", "llama30b"): 930.0,
    ("3cluster24", "llama30b"): 790.0,
}
"""Prompt and output tokens asked for by instance. 70B: what the authors asked of Helix; 30B, where that is not stored:
what makes their published decode rates of Helix (216.7 and 183.5 tokens/s), at 4.29 tokens for each decoded one."""
OFFLINE = Admission(waits=True)
LIVES, QUICK_LIVES = 10.0, 2.0
ARRIVALS_LIVES = 4.0
"""Times the lives to be measured for which requests are drawn: they may live longer than they did at first."""
FIRST = Windows(300.0, 300.0)
"""Of a run that only tells how long requests live: so long the next one warms up."""
OVERLOADED_SHARE = 0.05
"""Of the requests asked: if more than these still wait at the coordinator at the end, the load was too much."""


class LikeRow(Row, frozen=True, kw_only=True):
    """What came of it, in its window."""

    decode_tokens_per_s: float
    ttft_s: float
    """Mean, with what requests wait at the coordinator."""
    ttft_p95_s: float
    tpot_s: float
    """Mean of all decode steps."""
    stages: float
    in_flight: float
    finished: int
    waiting: int
    """At the coordinator when it ended."""
    impossible: int
    """Longer than any way has room for; others came in their place, offline."""
    window_s: float
    lives: float
    """Mean lives, from the start of the prompt to the last token, in the window."""
    overloaded: bool
    events: int


class LikeForLike(Cell, frozen=True, kw_only=True, tag="like-for-like"):
    """One method with one router on one instance."""

    row: ClassVar[type[Row]] = LikeRow
    instance: str
    model: str
    method: str
    router: str
    online_tokens_per_s: float
    """Asked for, prompts included; 0: offline."""
    lives: float
    seed: int = 0

    def title(self) -> str:
        """See Cell."""
        load = "online" if self.online_tokens_per_s else "offline"
        return f"like for like: {self.instance} {self.model} {load}, {self.method} with {self.router}"

    def run(self, data: Data) -> LikeRow:
        """See Cell."""
        artifact = data.artifact()
        instance, trace = read_instance(artifact, self.instance, self.model), artifact.trace()
        laid = _laid(artifact, self.instance, self.model, self.method, self.seed)
        lengths = lengths_of(trace)

        def outcome(windows: Windows, asked_s: float) -> Outcome:
            feed: Feed = FillKv(lengths)
            if self.online_tokens_per_s:
                seconds = windows.warm_up_s + asked_s
                feed = Trace(arrivals_of(trace, self.online_tokens_per_s, seconds, self.seed))
            return simulate(
                Setup(
                    instance=instance,
                    spans=laid.spans,
                    flows=laid.flows,
                    router=self.router,
                    feed=feed,
                    admission=ONLINE if self.online_tokens_per_s else OFFLINE,
                    windows=windows,
                    kv_tokens=laid.kv_tokens,
                ),
                self.seed,
            )

        life_s = max(outcome(FIRST, FIRST.measured_s).life_s, 1.0)
        asked_s = min(MEASURED_S_MAX, ARRIVALS_LIVES * self.lives * life_s)
        last = outcome(Windows(life_s, life_s, self.lives), asked_s)
        if self.online_tokens_per_s and last.measured_s > asked_s:
            raise UsageError(f"{self.title()}: requests live {last.life_s:.0f} s, {life_s:.0f} s at first.")
        return _row(last)


@dataclass(frozen=True, slots=True)
class Laid:
    """A method's placement, or several that have no machine in common, as one."""

    spans: Spans
    flows: Mapping[Edge, float]
    kv_tokens: Mapping[int, int]


def cells(quick: bool) -> tuple[Cell, ...]:
    """The whole product for the larger model; for the other one, every method by IWRR.

    Quick: of the larger model, too, other routers only with ours and with Helix's placement.
    """
    return tuple(
        LikeForLike(
            instance=instance,
            model=model,
            method=method,
            router=router,
            online_tokens_per_s=rate,
            lives=QUICK_LIVES if quick else LIVES,
        )
        for (instance, model), online in ONLINE_TOKENS_PER_S.items()
        for rate in (0.0, online)
        for method in METHODS
        for router in ROUTERS
        if router == "iwrr" or (model == LARGER and not (quick and method not in (OURS, HELIX)))
    )


def parts_of(artifact: Artifact, instance: str, model: str, method: str) -> list[str]:
    """What the authors stored for a method: one placement, or one for each type of machine that has KV room in it."""
    stored = artifact.stored(instance, model)
    names = [method] if method in stored else [name for name in stored if name.startswith(f"{method}/")]
    names = [name for name in names if artifact.stored_kv_tokens(instance, model, name) != 0]
    if not names:
        raise UsageError(f"The authors stored no placement of {instance} with {model} for {method}.")
    return names


@lru_cache(maxsize=4)
def _laid(artifact: Artifact, instance: str, model: str, method: str, seed: int) -> Laid:
    if method == OURS:
        # Slow links are planned at a part of what they carry, and requests sent that way: queues cost every token.
        problem = artifact.problem(instance, model, LINK_SHARE)
        spans = place(problem, seed, None, THROUGHPUT)
        return Laid(spans, flows_of(problem, spans), {})
    return _stored(artifact, instance, model, method)


def _stored(artifact: Artifact, instance: str, model: str, method: str) -> Laid:
    """What the authors stored for a method, all of its parts together."""
    read = read_instance(artifact, instance, model)
    spans: Spans = (None,) * len(read.kinds)
    flows, rooms = dict[Edge, float](), dict[int, int]()
    for name in parts_of(artifact, instance, model, method):
        laid = _part(artifact, read, (instance, model, name))
        spans = tuple(mine or its for mine, its in zip(spans, laid.spans, strict=True))
        flows |= laid.flows
        rooms |= laid.kv_tokens
    return Laid(spans, flows, rooms)


def _part(artifact: Artifact, instance: Instance, stored: tuple[str, str, str]) -> Laid:
    """One stored placement with the flow that its authors sent through it."""
    name, model, method = stored
    spans, through = artifact.stored(name, model)[method], artifact.stored_flow(name, model, method)
    room = artifact.stored_kv_tokens(name, model, method)
    by_hand = method.startswith("separate/") and room is not None
    kv_tokens = dict.fromkeys(through, room or 0) if by_hand else {}
    return Laid(spans, flows_of(instance.problem, spans, through), kv_tokens)


def _row(outcome: Outcome) -> LikeRow:
    return LikeRow(
        decode_tokens_per_s=outcome.decode_tokens_per_s,
        ttft_s=outcome.ttft_s.mean,
        ttft_p95_s=outcome.ttft_s.at(95),
        tpot_s=outcome.decode_s.mean,
        stages=outcome.hops_mean,
        in_flight=outcome.in_flight_mean,
        finished=outcome.finished,
        waiting=outcome.waiting,
        impossible=outcome.impossible,
        window_s=outcome.measured_s,
        lives=outcome.measured_s / max(outcome.life_s, 1e-9),
        overloaded=outcome.waiting > OVERLOADED_SHARE * outcome.launched,
        events=outcome.events,
    )

"""Compute nodes of the paper's system: batches of whole prompts mixed with decode steps, KV counted by token and layer.

The authors run a batch layer by layer and look at the queue before each. Nothing joins or leaves between two layers but
where requests enter the span, so one event here is a run of layers up to the next such place, a segment.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from helixnet.sim.engine import Engine
from helixnet.sim.paper.instance import BatchLimits, Profile
from helixnet.sim.paper.sessions import Session

CONCATENATES_BYTES_PER_S, COPIES_BYTES_PER_S = 4e9, 5e9
"""What arrives is gathered and copied to the GPU before a batch starts (authors' get_inference_statistics)."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a machine holds."""

    segments: tuple[int, ...]
    """Layers from one place of entry to the next."""
    kv_token_layers: int
    limits: BatchLimits


class Machine:
    """One compute node. `forward` is called with the sessions that have run their last layer here."""

    __slots__ = (
        "_arrival_s",
        "_engine",
        "_forward",
        "_inbox",
        "_profile",
        "_queues",
        "_running",
        "_segment",
        "_unpacked",
        "_wake_s",
        "arrivals",
        "batches",
        "busy_s",
        "holding",
        "kv_peak",
        "kv_used",
        "number",
        "reserved",
        "steps",
        "waited",
    )

    def __init__(
        self,
        engine: Engine,
        number: int,
        profile: Profile,
        holding: Holding,
        unpack_s: float,
        forward: Callable[[list[Session]], None],
    ) -> None:
        self.number, self.holding = number, holding
        self._engine, self._profile, self._forward = engine, profile, forward
        self._arrival_s = unpack_s
        self._inbox: list[tuple[float, int, Session]] = []
        self._queues: list[list[Session]] = [[] for _ in holding.segments]
        self._segment = 0
        self._running: list[Session] | None = None
        self._wake_s = float("inf")
        self._unpacked = 0
        self.kv_used = self.kv_peak = self.reserved = 0
        self.arrivals = self.batches = self.steps = self.waited = 0
        """`steps`: prompts and decode steps run; `waited`: times that a prompt was left out for want of KV room."""
        self.busy_s = 0.0

    def deliver(self, session: Session, at: float) -> None:
        """Something arrives, now or later."""
        self.arrivals += 1
        heapq.heappush(self._inbox, (at, self.arrivals, session))
        if self._running is None and at < self._wake_s:
            self._wake_s = at
            self._engine.at(at, self._wake)

    def release(self, tokens: int, layers: int) -> None:
        """A session has ended."""
        self.kv_used -= tokens * layers
        self.reserved -= tokens * layers
        if self._running is None and any(self._queues):
            self._engine.at(self._engine.now, self._wake)

    def queued(self) -> int:
        """Iterations that wait at the start of the span."""
        self._take_in()
        return len(self._queues[0])

    def _wake(self) -> None:
        if self._running is None:
            self._wake_s = float("inf")
            self._start()

    def _take_in(self) -> None:
        inbox, now, queues = self._inbox, self._engine.now, self._queues
        while inbox and inbox[0][0] <= now:
            session = heapq.heappop(inbox)[2]
            self._unpacked += 1 if session.in_decode else session.input
            queues[session.path[session.stage].segment].append(session)

    def _start(self) -> None:
        """Run the next segment, round and round, that has something to run; else sleep until something arrives."""
        self._take_in()
        count = len(self._queues)
        for step in range(count):
            segment = (self._segment + step) % count
            if self._queues[segment] and self._run(segment):
                return
        if self._inbox and self._inbox[0][0] < self._wake_s:
            self._wake_s = self._inbox[0][0]
            self._engine.at(self._wake_s, self._wake)

    def _run(self, segment: int) -> bool:
        batch, prompt_tokens, decodes = self._choose(segment)
        if not batch:
            return False
        profile, layers = self._profile, self.holding.segments[segment]
        seconds = layers * (profile.prompt_s[prompt_tokens] + profile.decode_s[decodes])
        if segment == 0:
            seconds += self._unpacked * self._arrival_s
            self._unpacked = 0
        self._segment, self._running = segment, batch
        self.batches += 1
        self.steps += len(batch)
        self.busy_s += seconds
        self._engine.after(seconds, self._finish, (prompt_tokens + decodes) * layers)
        return True

    def _choose(self, segment: int) -> tuple[list[Session], int, int]:
        """First come first served as far as the limits allow; what does not fit is passed over."""
        limits, queue = self.holding.limits, self._queues[segment]
        batch: list[Session] = []
        rest: list[Session] = []
        prompts = prompt_tokens = decodes = context = 0
        for session in queue:
            if session.in_decode:
                if decodes < limits.decodes and context + session.cached <= limits.context:
                    decodes += 1
                    context += session.cached
                    batch.append(session)
                    continue
            elif (
                prompts < limits.prompts
                and prompt_tokens + session.input <= limits.prompt_tokens
                and self._admits(session, segment)
            ):
                prompts += 1
                prompt_tokens += session.input
                batch.append(session)
                continue
            rest.append(session)
        self._queues[segment] = rest
        return batch, prompt_tokens, decodes

    def _admits(self, session: Session, segment: int) -> bool:
        """Whether there is KV room for all of it.

        The authors' simulator stops with an error where KV overflows; here a prompt waits. Its room is kept from its
        first layer to its end, and machines follow each other in the order of layers, so nobody waits for ever.
        """
        hop = session.path[session.stage]
        if hop.segment != segment:
            return True  # it entered before
        need = session.tokens * hop.layers
        if self.reserved + need > self.holding.kv_token_layers:
            self.waited += 1
            return False
        self.reserved += need
        return True

    def _finish(self, token_layers: int) -> None:
        batch, self._running = self._running, None
        assert batch is not None, "only a running batch finishes"
        self.kv_used += token_layers
        if self.kv_used > self.kv_peak:
            self.kv_peak = self.kv_used
        last = self._segment + 1 == len(self._queues)
        if last:
            self._forward(batch)
        else:
            self._queues[self._segment + 1].extend(batch)
        self._segment = 0 if last else self._segment + 1
        self._start()

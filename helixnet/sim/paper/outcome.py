"""What one run of the paper's system gave."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from helixnet.planner.flow import Edge
from helixnet.sim.paper.sessions import Session

TIMELINE_S = 10.0
"""Step of the timeline."""
PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some times in seconds; all 0 without any."""

    count: int
    mean: float
    percentiles: tuple[float, ...]
    """Of PERCENTILES."""

    def at(self, percent: int) -> float:
        """One of the percentiles."""
        return self.percentiles[PERCENTILES.index(percent)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rates and times are of what ended within the measured window, counts of the whole run."""

    measured_s: float
    life_s: float
    """Of a mean request, from the start of its prompt to its last token: by what it is made of, not of those that ended
    in the window, which are the short ones if it is short."""
    decode_tokens_per_s: float
    """What the paper calls throughput: output tokens that reached the coordinator."""
    prompt_tokens_per_s: float
    prompt_s: Spread
    """From the coordinator's sending a prompt to its first token back: the paper's prompt latency."""
    decode_s: Spread
    """Of every decode step: the paper's decode latency."""
    ttft_s: Spread
    """From a request's coming to its first token: with what it waits at the coordinator."""
    tpot_s: Spread
    """Of each request, per output token after the first token back."""
    hops_mean: float
    """Machines that a decoded token passed."""
    kv_share: float
    """KV room filled, mean over time and, by room, machines."""
    kv_peak_share: float
    """Most that any machine had filled at once."""
    in_flight_mean: float
    batch_mean: float
    """Prompts and decode steps in one batch."""
    busy: Mapping[int, float]
    """Share of the run that each machine computed, by its number."""
    hop_sessions: Mapping[Edge, int]
    """Routed along each edge."""
    hop_tokens: Mapping[Edge, int]
    """Sent along each edge."""
    timeline: tuple[int, ...]
    """Output tokens in each TIMELINE_S of the run."""
    launched: int
    """Came to the coordinator."""
    finished: int
    decoded: int
    rejected: int
    """Found no way with KV room to be expected, and were not to wait."""
    impossible: int
    """Longer than any way has room for."""
    waiting: int
    """At the coordinator when the run ended, for want of KV room."""
    waited: int
    """Times that a machine left a prompt out of a batch for want of KV room."""
    events: int
    """Of the engine, and arrivals at machines, which have a heap of their own."""
    digest: str


class Tally:
    """Counts while a run lasts."""

    def __init__(self, begins_s: float, output_tokens: float) -> None:
        self._begins_s, self._output_tokens = begins_s, output_tokens
        self.prompt_s, self.decode_s, self.ttft_s, self.tpot_s = (array("d") for _ in range(4))
        self._timeline: dict[int, int] = {}
        self.prompt_tokens = self.hops = self.decoded = self.finished = 0
        self._kv, self._in_flight, self._looks = 0.0, 0, 0

    def inside(self, now: float) -> bool:
        """Whether what ends now counts."""
        return self._begins_s <= now

    def prompted(self, session: Session, now: float) -> None:
        """A prompt has been through."""
        if self.inside(now):
            self.prompt_s.append(now - session.started_s)
            self.ttft_s.append(now - session.arrived_s)
            self.prompt_tokens += session.input

    def stepped(self, session: Session, now: float) -> None:
        """An output token is there."""
        self.decoded += 1
        slot = int(now / TIMELINE_S)
        self._timeline[slot] = self._timeline.get(slot, 0) + 1
        if self.inside(now):
            self.decode_s.append(now - session.started_s)
            self.hops += len(session.path) - 1

    def ended(self, session: Session, now: float) -> None:
        """A request is complete."""
        self.finished += 1
        if self.inside(now):
            self.tpot_s.append((now - session.prompted_s) / session.output)

    def look(self, kv_share: float, in_flight: int) -> None:
        """At one moment of the window."""
        self._looks += 1
        self._kv += kv_share
        self._in_flight += in_flight

    @property
    def life_s(self) -> float:
        """Of a mean request so far; 0 if there was nothing."""
        return _mean(self.prompt_s) + self._output_tokens * _mean(self.decode_s)

    @property
    def kv_share(self) -> float:
        """Mean over time."""
        return self._kv / max(1, self._looks)

    @property
    def in_flight_mean(self) -> float:
        """Requests under way."""
        return self._in_flight / max(1, self._looks)

    @property
    def timeline(self) -> tuple[int, ...]:
        """Output tokens by time."""
        return tuple(self._timeline.get(slot, 0) for slot in range(max(self._timeline, default=-1) + 1))


def _mean(seconds: array[float]) -> float:
    return float(np.frombuffer(seconds, dtype=np.float64).mean()) if seconds else 0.0


def spread(seconds: array[float]) -> Spread:
    """Raises nothing: without any times all is 0."""
    if not seconds:
        return Spread(0, 0.0, (0.0,) * len(PERCENTILES))
    values = np.frombuffer(seconds, dtype=np.float64)
    return Spread(len(values), float(values.mean()), tuple(np.percentile(values, PERCENTILES).tolist()))

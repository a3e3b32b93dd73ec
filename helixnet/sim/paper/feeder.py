"""What users ask for: saturating load in the authors' two ways, or requests at given times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from helixnet.core.errors import UsageError
from helixnet.planner.artifact_file import TraceData

FIRST_APART_S = 0.1
"""Between the requests that a run starts with."""
NEXT_AFTER_S = 0.1
"""From the end that allows a request to its coming."""
INTERVAL_S = 3
"""Of the trace's arrivals."""

Lengths = tuple[tuple[int, int], ...]
"""Prompt and output tokens of requests to draw from."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class FillKv:
    """As many requests as KV memory is expected to hold: the authors' offline load of their own scheduler.

    Each prompt's end and each request's end let another one in while the fullest layer is expected to be filled to
    `share` at most; so `first` prompts are under way until then.
    """

    lengths: Lengths
    first: int = 20
    share: float = 0.8


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same number of requests under way: the authors' offline load of the other schedulers."""

    lengths: Lengths
    in_flight: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests at given times, sorted: online load."""

    arrivals: tuple[Arrival, ...]

    def __post_init__(self) -> None:
        if any(one.at_s > other.at_s for one, other in zip(self.arrivals, self.arrivals[1:], strict=False)):
            raise UsageError("The arrivals of a trace have to be sorted by time.")


Feed = FillKv | Constant | Trace


class Gate(Protocol):
    """What a feeder acts upon."""

    def launch(self, at_s: float, input_tokens: int, output_tokens: int) -> None:
        """A request comes to the coordinator."""

    def fullest(self) -> float:
        """Share of KV room expected to be taken."""


class Feeder:
    """Lets requests come as a feed says. Lengths are drawn in order, so that the n-th of any two runs is the same.

    They are drawn as the authors' simulator does: seed 0 gives the very lengths that their published runs had.
    """

    def __init__(self, feed: Feed, gate: Gate, seed: int) -> None:
        self._feed, self._gate = feed, gate
        self._rng = random.Random(seed)

    def begin(self) -> None:
        """The run starts."""
        if isinstance(self._feed, Trace):
            for each in self._feed.arrivals:
                self._gate.launch(each.at_s, each.input_tokens, each.output_tokens)
            return
        first = self._feed.first if isinstance(self._feed, FillKv) else self._feed.in_flight
        for number in range(first):
            self._draw(number * FIRST_APART_S)

    def prompted(self, now: float) -> None:
        """A prompt has been through."""
        if isinstance(self._feed, FillKv) and self._gate.fullest() <= self._feed.share:
            self._draw(now + NEXT_AFTER_S)

    def ended(self, now: float) -> None:
        """A request is complete."""
        if isinstance(self._feed, Constant):
            self._draw(now + NEXT_AFTER_S)
        else:
            self.prompted(now)

    def rejected(self, now: float) -> None:
        """A request has been turned away. The authors do not replace it where they fill KV memory."""
        if isinstance(self._feed, Constant):
            self._draw(now + NEXT_AFTER_S)

    def impossible(self, now: float) -> None:
        """A request is longer than any way has room for."""
        if not isinstance(self._feed, Trace):
            self._draw(now + NEXT_AFTER_S)

    def _draw(self, at_s: float) -> None:
        assert not isinstance(self._feed, Trace), "a trace has its own lengths"
        lengths = self._feed.lengths[self._rng.randrange(len(self._feed.lengths))]
        self._gate.launch(at_s, *lengths)


def mean_output(feed: Feed) -> float:
    """Output tokens of a mean request; 0 without any."""
    outputs = (
        [arrival.output_tokens for arrival in feed.arrivals]
        if isinstance(feed, Trace)
        else [output for _, output in feed.lengths]
    )
    return sum(outputs) / max(1, len(outputs))


def lengths_of(trace: TraceData) -> Lengths:
    """Of all requests of a trace."""
    return tuple(zip(trace.input_tokens, trace.output_tokens, strict=True))


def arrivals_of(trace: TraceData, tokens_per_s: float, seconds: float, seed: int) -> tuple[Arrival, ...]:
    """The authors' online load: intervals and lengths drawn from the trace, scaled to an average of tokens/s.

    Tokens are prompt and output tokens of what is asked for. Seed 0 gives the arrivals of their published runs.
    """
    rng, lengths, counts = random.Random(seed), lengths_of(trace), trace.arrivals_per_3s
    mean_tokens = sum(trace.input_tokens + trace.output_tokens) / len(lengths)
    scale = INTERVAL_S * tokens_per_s / mean_tokens / (sum(counts) / len(counts))
    return tuple(_drawn(rng, lengths, counts, scale, seconds))


def _drawn(rng: random.Random, lengths: Lengths, counts: Sequence[int], scale: float, seconds: float) -> list[Arrival]:
    arrivals: list[Arrival] = []
    owed = 0.0
    for interval in range(int(seconds // INTERVAL_S)):
        owed += scale * counts[rng.randrange(len(counts))]
        come = round(owed)
        owed -= come
        times = sorted(INTERVAL_S * (interval + rng.random()) for _ in range(come))
        arrivals += [Arrival(at, *lengths[rng.randrange(len(lengths))]) for at in times]
    return arrivals

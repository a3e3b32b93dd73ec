"""What is asked of the swarm: how long prompts and answers are, and when requests come."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

from helixnet.core.errors import UsageError

SHARES = (*(n / 20 for n in range(20)), 0.99, 1.0)
CONVERSATION_PROMPT = (
    *(7, 181, 203, 240, 378, 391, 397, 403, 412, 447, 947),
    *(1004, 1029, 1050, 1072, 1094, 1121, 1161, 1273, 1353, 1911, 2047),
)
CONVERSATION_OUTPUT = (
    *(7, 52, 68, 80, 87, 92, 97, 104, 115, 133, 157),
    *(181, 217, 383, 394, 397, 407, 415, 429, 463, 608, 1000),
)
"""Quantiles of the Azure conversation trace of 2023 as the Helix paper uses it (16 657 requests, shared/helix)."""
CONVERSATION_CORRELATION = 0.51
"""Between prompt and answer: those who write more read more."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a workload."""

    prompt_tokens: int
    output_tokens: int
    topic: int | None = None
    """Prompts of one topic begin alike, and share what is computed of it."""


class Lengths(Protocol):
    """Where requests' lengths come from."""

    def draw(self, rng: random.Random) -> Ask:
        """One request's."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every request alike."""

    prompt_tokens: int
    output_tokens: int

    def draw(self, rng: random.Random) -> Ask:
        """The same again."""
        return Ask(self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Lengths with the quantiles and the correlation of the Azure conversation trace, scaled and cut."""

    scale: float = 1.0
    tokens_max: int = 1 << 20

    def draw(self, rng: random.Random) -> Ask:
        """One request: two uniform ranks whose normal scores are correlated (a Gaussian copula)."""
        first = rng.gauss(0.0, 1.0)
        rest = math.sqrt(1 - CONVERSATION_CORRELATION**2)
        second = CONVERSATION_CORRELATION * first + rest * rng.gauss(0.0, 1.0)
        normal = NormalDist()
        prompt = self.scale * at_share(CONVERSATION_PROMPT, normal.cdf(first))
        output = self.scale * at_share(CONVERSATION_OUTPUT, normal.cdf(second))
        return Ask(_within(prompt, self.tokens_max // 2), _within(output, self.tokens_max // 2))


@dataclass(frozen=True, slots=True)
class Topical:
    """Requests about a few topics."""

    lengths: Lengths
    topics: int

    def draw(self, rng: random.Random) -> Ask:
        """One about any of them."""
        return replace(self.lengths.draw(rng), topic=rng.randrange(self.topics))


@dataclass(frozen=True, slots=True)
class Recorded:
    """Lengths of a recorded trace, in random order."""

    requests: Sequence[tuple[int, int]]
    """(prompt tokens, output tokens)"""

    def draw(self, rng: random.Random) -> Ask:
        """One of them."""
        return Ask(*rng.choice(self.requests))


def at_share(quantiles: Sequence[float], share: float) -> float:
    """The value below which so large a share lies, on straight lines between the quantiles."""
    for (low_share, high_share), (low, high) in zip(pairwise(SHARES), pairwise(quantiles), strict=True):
        if share <= high_share:
            return low + (high - low) * (share - low_share) / (high_share - low_share)
    return quantiles[-1]


def arrivals(rng: random.Random, per_s: float, until_s: float) -> Iterator[float]:
    """When requests come: a Poisson process.

    Raises:
        UsageError: the rate is not positive.
    """
    if not per_s > 0:
        raise UsageError(f"A load is a positive number of requests per second, not {per_s}.")
    now = rng.expovariate(per_s)
    while now < until_s:
        yield now
        now += rng.expovariate(per_s)


def _within(value: float, most: int) -> int:
    return max(1, min(most, round(value)))

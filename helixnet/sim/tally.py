"""What is counted while a simulation runs: requests, tokens, gaps, and what happened when."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

BIN_S = 10.0
"""Width of a column in plots over time."""
MARKS_MAX = 10_000


@dataclass(slots=True)
class RequestTally:
    """One request, as its client saw it. Times are of the simulation."""

    asked_at: float
    prompt_tokens: int
    output_tokens: int
    first_at: float = 0.0
    last_at: float = 0.0
    tokens: int = 0
    stages: int = 0
    """Of the pipeline it ended on."""
    attempts: int = 0
    finish: str = ""
    problem: str = ""

    @property
    def ttft_s(self) -> float:
        """From asking to the first token."""
        return self.first_at - self.asked_at

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.last_at - self.first_at) / max(1, self.tokens - 1)


@dataclass(slots=True)
class Mark:
    """Something a plot over time points at."""

    at: float
    what: str


@dataclass(slots=True)
class Tally:
    """Everything the reports are made of."""

    requests: list[RequestTally] = field(default_factory=list)
    """Those that have ended, in the order in which they did."""
    gaps_s: array[float] = field(default_factory=lambda: array("f"))
    """Between a token and the one before it, of all requests."""
    decoded: dict[int, int] = field(default_factory=dict)
    """Tokens that reached clients, by BIN_S."""
    prompted: dict[int, int] = field(default_factory=dict)
    """Prompt tokens whose first answer token came, by BIN_S."""
    marks: list[Mark] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    """How often what happened at peers, by kind."""
    retries: int = 0
    lost: int = 0
    """Requests that ended in an error."""

    def token(self, request: RequestTally, now: float) -> None:
        """A client got one more token."""
        if request.tokens:
            self.gaps_s.append(now - request.last_at)
        else:
            request.first_at = now
            column = int(now / BIN_S)
            self.prompted[column] = self.prompted.get(column, 0) + request.prompt_tokens
        request.tokens += 1
        request.last_at = now
        column = int(now / BIN_S)
        self.decoded[column] = self.decoded.get(column, 0) + 1

    def mark(self, at: float, what: str) -> None:
        """Something for plots over time to point at; only so many are kept."""
        if len(self.marks) < MARKS_MAX:
            self.marks.append(Mark(at, what))

    def decoded_between(self, start_s: float, stop_s: float) -> int:
        """Tokens that reached clients in whole columns of `[start_s, stop_s)`."""
        return sum(count for column, count in self.decoded.items() if start_s <= column * BIN_S < stop_s)

"""What `helixnet plan` says of the way from one plan to the next: who moves, what it takes, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from helixnet.core.plan.adoption import new_layers
from helixnet.core.types import Span
from helixnet.daemon.wording import span_words
from helixnet.planner.case import Case
from helixnet.planner.migration import Step, migration, steps
from helixnet.planner.problem import SpanOrNone, Spans


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A peer whose span changes."""

    peer: str
    held: Span | None
    """None for one that is new or held nothing."""
    span: Span | None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One peer loads what is new in its span, or drops what is no longer in it."""

    peer: str
    load: bool
    layers: tuple[Span, ...]
    """Which, as few spans as hold them."""

    def words(self) -> str:
        """For a person."""
        return f"{self.peer} {'loads' if self.load else 'drops'} {' and '.join(span_words(s) for s in self.layers)}"


class Moves(msgspec.Struct, frozen=True, kw_only=True):
    """The whole way."""

    moves: tuple[Move, ...]
    bytes: int
    seconds: float
    """Until the slowest peer has loaded; peers load at the same time."""
    order: tuple[Turn, ...] | None
    """In which no layer that was covered is uncovered on the way; None if there is no such order."""

    def as_json(self) -> dict[str, object]:
        """What `--json` prints."""
        return {
            "moves": [{"peer": move.peer, "from": _pair(move.held), "to": _pair(move.span)} for move in self.moves],
            "bytes": self.bytes,
            "seconds": self.seconds,
            "order": None
            if self.order is None
            else [
                [turn.peer, "load" if turn.load else "drop", [_pair(span) for span in turn.layers]]
                for turn in self.order
            ],
        }


def moving(case: Case, held: Spans, spans: Spans) -> Moves:
    """From what the peers of a case hold to what they are to hold."""
    problem = case.problem
    moves = tuple(
        Move(peer=peer.peer, held=have, span=span)
        for peer, have, span in zip(problem.peers, held, spans, strict=True)
        if have != span
    )
    cost, order = migration(problem, held, spans, case.loading), steps(problem, held, spans)
    return Moves(
        moves=moves,
        bytes=cost.bytes,
        seconds=cost.seconds,
        order=None if order is None else tuple(_turns(case, held, spans, order)),
    )


def _turns(case: Case, held: Spans, spans: Spans, order: Sequence[Step]) -> Iterator[Turn]:
    """The steps with their layers, without those that have none."""
    for step in order:
        have, span = held[step.index], spans[step.index]
        layers = _beside(have, span) if step.load else _beside(span, have)
        if layers:
            yield Turn(peer=case.problem.peers[step.index].peer, load=step.load, layers=layers)


def _beside(kept: SpanOrNone, span: SpanOrNone) -> tuple[Span, ...]:
    """The layers of `span` that are not in `kept`."""
    layers = [] if span is None else new_layers(() if kept is None else (kept,), span)
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer + 1 for layer in layers if layer + 1 not in layers]
    return tuple(Span(start, stop) for start, stop in zip(starts, stops, strict=True))


def _pair(span: Span | None) -> list[int] | None:
    return None if span is None else [span.start, span.stop]

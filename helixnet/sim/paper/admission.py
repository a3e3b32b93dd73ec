"""What the coordinator expects of KV memory: which machines it routes to no more, and when it lets more requests in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from helixnet.planner.problem import Spans
from helixnet.sim.paper.sessions import Hop, Session

OUTPUT_TOKENS_EXPECTED = 240
"""Whatever the request really asks for (authors' AVG_OUTPUT_LEN)."""


@dataclass(frozen=True, slots=True)
class Admission:
    """When a machine counts as full, the authors' high-water mark."""

    kv_share: float = 0.85
    """Of its KV room that may be expected to be taken (their offline simulations; 0.9 in the online ones)."""
    output_share: float = 1.0
    """Of OUTPUT_TOKENS_EXPECTED that each request is expected to hold (theirs offline; 0.6 online)."""
    waits: bool = False
    """A request that finds no way waits at the coordinator, instead of being turned away (theirs offline). Theirs
    online is an error."""


OFFLINE = Admission()
ONLINE = Admission(kv_share=0.9, output_share=0.6, waits=True)


class Expected:
    """KV token-layers that the sessions under way are expected to take."""

    def __init__(self, layers: int, spans: Spans, rooms: Mapping[int, int], admission: Admission | None) -> None:
        self._rule = admission or OFFLINE
        self._masks = admission is not None
        self._held = {number: span for number, span in enumerate(spans) if span is not None and number in rooms}
        self._room = dict(rooms)
        self._taken = dict.fromkeys(self._held, 0)
        self._per_layer = np.zeros(layers)
        self._room_per_layer = np.zeros(layers)
        for number, span in self._held.items():
            self._room_per_layer[span.start : span.stop] += rooms[number] / len(span)

    def full(self, number: int, input_tokens: int) -> bool:
        """Whether a machine should get no such session now, were it to run all the machine's layers."""
        if not self._masks:
            return False
        need = self._tokens(input_tokens) * len(self._held[number])
        return self._room[number] - self._taken[number] - need < (1 - self._rule.kv_share) * self._room[number]

    def add(self, session: Session, hop: Hop) -> None:
        """A session will run through a machine."""
        self._change(session, hop, 1)

    def remove(self, session: Session) -> None:
        """It has ended."""
        for hop in session.path:
            self._change(session, hop, -1)

    def fullest(self) -> float:
        """Share taken of the room of all holders of a layer, where it is largest."""
        rooms = self._room_per_layer
        return float((self._per_layer[rooms > 0] / rooms[rooms > 0]).max())

    def _tokens(self, input_tokens: int) -> int:
        return int(input_tokens + OUTPUT_TOKENS_EXPECTED * self._rule.output_share)

    def _change(self, session: Session, hop: Hop, sign: int) -> None:
        if hop.machine is None:
            return
        number = hop.machine.number
        taken = sign * self._tokens(session.input) * hop.layers
        span = self._held[number]
        self._taken[number] += taken
        self._per_layer[span.start : span.stop] += taken / len(span)

"""Continuous batching: ready decode steps first, then prefill chunks within a token budget.

Steps that share a batch arrive at the next stage together and share its batch, too: left alone, all requests in
flight end up in a few large lumps that move from stage to stage while the others wait. So a batch takes no more than
the steps that a stage should have in hand when requests are spread evenly over their stages, and a quarter of what is
ready where more than that piles up; but all of it where the stage hardly ever rests (docs/decisions/0014).

As long as anybody makes tokens, each prompt in line takes half as long as a batch of decode steps, and a token may meet
two such pieces, one before it and one beside it (where there is no other stage, three quarters, and it meets one): one
prompt alone at most doubles the gaps between tokens, and many have what a full stage can give them
(docs/decisions/0020).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import ceil, inf

from helixnet.core.stage.prompts import PIECE_TOKENS_MIN, Prompts
from helixnet.core.stage.work import Work
from helixnet.core.types import SessionId

DECODE_BATCH_MAX = 64
"""Decode steps that meet in a layer; where many run only some of a stage's layers, a batch takes more of them."""
PREFILL_CHUNK_TOKENS = 128
"""Prompt tokens that an entry sends down the pipeline at a time."""
PREFILL_BUDGET_TOKENS = 512
"""Prompt tokens run beside the decode steps of one batch: bounds what a long prompt adds to each gap."""
SHARES_MAX = 1.5
"""Times its even share of the requests in flight that a stage takes at once ..."""
PILED = 4
"""... or this part of a pile of steps, where larger batches are what is needed ..."""
BUSY = 0.8
"""... or all of it, if the stage has been busy for this share of its time: then it is what the others wait for."""


class Batcher:
    """Ready work of one stage, in arrival order. A batch holds at most one item of each session."""

    def __init__(self, decode_max: int = DECODE_BATCH_MAX, prefill_budget: int = PREFILL_BUDGET_TOKENS) -> None:
        self._decode_max = decode_max
        self._prefill_budget = prefill_budget
        self._decode: deque[Work] = deque()
        self._prompts = Prompts()

    def add(self, work: Work, owner: str = "", yields: bool = False) -> None:
        """Queue one chunk or step. Owners take turns with their prompts, after those who do not yield."""
        if work.decode:
            self._decode.append(work)
        else:
            self._prompts.add(work, owner, yields)

    def forget(self, session: SessionId) -> None:
        """Drop what is queued for a session."""
        self._decode = deque([work for work in self._decode if work.session != session])
        self._prompts.forget(session)

    def take(self, share: float = inf, busy: float = 0.0, beside: float = inf) -> tuple[Work, ...]:
        """The next batch; empty if nothing is ready.

        `share`: steps that should be in hand here, were all even. `busy`: how much of its time lately the stage was.
        `beside`: tokens that each prompt in line may bring.
        """
        steps, chosen = self._take_steps(share, busy)
        if not len(self._prompts):
            return steps
        budget = min(self._prefill_budget, max(PIECE_TOKENS_MIN, beside * self._prompts.waiting))
        return (*steps, *self._prompts.take(int(budget), chosen))

    def _take_steps(self, share: float, busy: float) -> tuple[tuple[Work, ...], set[SessionId]]:
        """Decode steps, and whose they are."""
        pile = len(self._decode) / (1 if busy >= BUSY else PILED)
        most = ceil(min(len(self._decode), max(SHARES_MAX * share, pile)))
        chosen = {work.session for work in self._decode}
        if len(chosen) == len(self._decode) <= min(most, self._decode_max):  # everybody at once, as is usual
            everybody = tuple(self._decode)
            self._decode.clear()
            return everybody, chosen
        batch: list[Work] = []
        chosen = set()
        later: deque[Work] = deque()
        room = self._decode_max * _extent(self._decode)
        while self._decode and len(batch) < most and room > 0:
            work = self._decode.popleft()
            if work.session in chosen:
                later.append(work)
                continue
            batch.append(work)
            chosen.add(work.session)
            room -= len(work.layers)
        self._decode.extendleft(reversed(later))
        return tuple(batch), chosen

    def __len__(self) -> int:
        return len(self._decode) + len(self._prompts)


def _extent(works: Iterable[Work]) -> int:
    """Layers from the first to the last that any of them runs."""
    spans = [work.layers for work in works]
    return max((span.stop for span in spans), default=0) - min((span.start for span in spans), default=0)

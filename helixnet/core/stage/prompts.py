"""Prompts in line at a stage: clients take turns, whoever sent little is not behind whoever sent much."""

from __future__ import annotations

from collections import Counter, deque

import msgspec

from helixnet.core.stage.work import Work
from helixnet.core.types import SessionId

PIECE_TOKENS_MIN = 4
"""A chunk is not cut into smaller pieces than this: the weights are read again for each."""

_Line = dict[str, deque[Work]]
"""Chunks by owner, whose turn it is first."""


class Prompts:
    """Chunks by owner and, of each owner, in the order they came. Those who yield come after all others."""

    def __init__(self) -> None:
        self._lines: tuple[_Line, _Line] = ({}, {})
        self._chunks: Counter[SessionId] = Counter()

    def add(self, work: Work, owner: str, yields: bool) -> None:
        """Queue one chunk."""
        self._lines[yields].setdefault(owner, deque()).append(work)
        self._chunks[work.session] += 1

    def forget(self, session: SessionId) -> None:
        """Drop what is queued for a session."""
        if not self._chunks.pop(session, 0):
            return
        for line in self._lines:
            for owner, queue in list(line.items()):
                line[owner] = deque([work for work in queue if work.session != session])
                if not line[owner]:
                    del line[owner]

    @property
    def waiting(self) -> int:
        """How many prompts are in line."""
        return len(self._chunks)

    def __len__(self) -> int:
        return self._chunks.total()

    def take(self, budget: int, chosen: set[SessionId]) -> list[Work]:
        """Chunks of so many tokens together, one of each session that is not among the chosen, which it joins."""
        batch: list[Work] = []
        for line in self._lines:
            passed: set[str] = set()
            while budget > 0:
                owner = next((one for one in line if one not in passed), None)
                if owner is None:
                    break
                work = self._next(line[owner], budget, chosen, not batch)
                if work is None:
                    passed.add(owner)
                    continue
                batch.append(work)
                chosen.add(work.session)
                budget -= work.tokens
                queue = line.pop(owner)
                if queue:
                    line[owner] = queue  # behind all others
        return batch

    def _next(self, queue: deque[Work], budget: int, chosen: set[SessionId], is_first: bool) -> Work | None:
        """The owner's first chunk that may run now, out of its queue; or a piece of it."""
        for place, work in enumerate(queue):
            if work.session in chosen:
                continue
            if work.tokens <= budget or is_first:
                del queue[place]
                piece, rest = _cut(work, max(budget, PIECE_TOKENS_MIN))
                if rest is not None:
                    queue.insert(place, rest)
                    return piece
                self._chunks[work.session] -= 1
                if not self._chunks[work.session]:
                    del self._chunks[work.session]
                return work
            chosen.add(work.session)  # keeps a session's chunks in order
        return None


def _cut(work: Work, tokens: int) -> tuple[Work, Work | None]:
    """A chunk's first tokens and the rest. Only where it enters the pipeline: later stages take it as it comes."""
    ids = work.token_ids
    if ids is None or len(ids) <= tokens:
        return work, None
    first = msgspec.structs.replace(work, token_ids=ids[:tokens], wanted=False, sample=None, history=None)
    return first, msgspec.structs.replace(work, token_ids=ids[tokens:], position=work.position + tokens)

"""Drafts: tokens that are guessed because the text has been there before, and are checked in one pass of the pipeline.

Text repeats itself (names, code, what an answer quotes of its prompt): where the last few tokens were seen earlier,
what followed them then is sent along with the newest token. The exit keeps as many as it would have chosen itself, so
the answer is the same, and each of them saves a round through all stages. This is speculative decoding (Leviathan et
al., arXiv 2211.17192) with the text itself as the draft model (docs/decisions/0024).
"""

from __future__ import annotations

from collections.abc import Iterable

ROWS_MAX = 16
"""Steps and their drafts that an entry has in flight: so many rows take hardly longer than one where weights are read
from memory; with more in a batch, drafts would cost what they save."""
GRAM = 3
"""So many last tokens must have been there before."""
FIRST = 4
"""So many are guessed at first; twice as many whenever all came true, half as many whenever none did."""
LOOK_BACK_TOKENS = 8192
"""Of a prompt: what came earlier is not searched."""


class Drafter:
    """The text of one session, so far, and how well its guesses do."""

    def __init__(self, tokens: tuple[int, ...], most: int) -> None:
        self._most = most
        self._width = min(FIRST, most)
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Where each run of `GRAM` tokens went on, the last time."""
        self.add(tokens[-LOOK_BACK_TOKENS:])

    def add(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            if len(self._text) >= GRAM:
                self._after[tuple(self._text[-GRAM:])] = len(self._text)
            self._text.append(token)

    def guess(self, room: int) -> tuple[int, ...]:
        """What may come next, `room` tokens at most; nothing if the text was never here before."""
        start = self._after.get(tuple(self._text[-GRAM:]))
        if start is None:
            return ()
        count, seen = max(0, min(self._width, room)), self._text[start:]
        return tuple([seen[place % len(seen)] for place in range(count)])

    def judge(self, guessed: int, right: int) -> None:
        """Of so many so many came true."""
        if guessed and right == guessed:
            self._width = min(2 * self._width, self._most)
        elif guessed and not right:
            self._width = max(1, self._width // 2)

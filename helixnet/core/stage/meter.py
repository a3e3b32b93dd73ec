"""How many tokens/s ran lately, and where they came from."""

from __future__ import annotations

from collections import deque

from helixnet.core.swarm.records import OBSERVED_MAX, Observed
from helixnet.core.types import PeerId

WINDOW_S = 10.0
BUCKET_S = 0.5


class Meter:
    """Counts tokens by source over a sliding window, in buckets so that memory stays bounded."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[float, dict[PeerId | None, int]]] = deque()
        self.total = 0

    def count(self, source: PeerId | None, tokens: int, now: float) -> None:
        """Add tokens that came from `source` (None: from clients)."""
        self.total += tokens
        if not self._buckets or now - self._buckets[-1][0] >= BUCKET_S:
            self._buckets.append((now, {}))
            self._expire(now)
        counts = self._buckets[-1][1]
        if source in counts or len(counts) < OBSERVED_MAX:
            counts[source] = counts.get(source, 0) + tokens

    def rates(self, now: float) -> tuple[Observed, ...]:
        """Tokens/s by source over the window, sorted by source."""
        self._expire(now)
        sums: dict[PeerId | None, int] = {}
        for _, counts in self._buckets:
            for source, tokens in counts.items():
                sums[source] = sums.get(source, 0) + tokens
        ordered = sorted(sums.items(), key=lambda pair: pair[0] or "")
        return tuple(Observed(source, tokens / WINDOW_S) for source, tokens in ordered)[:OBSERVED_MAX]

    def _expire(self, now: float) -> None:
        while self._buckets and now - self._buckets[0][0] > WINDOW_S:
            self._buckets.popleft()

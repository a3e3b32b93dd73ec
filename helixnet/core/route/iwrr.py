"""Interleaved weighted round robin with the smallest possible deviation.

R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): with n items of weight
w_i (summing to 1), always choosing the item with the earliest deadline among those that are due keeps
every item's count within 1 - 1/(2n - 2) of its share, after any number of choices; no rule does better
for all weights. Over a window that starts anywhere the deviation is below twice that, and for n = 2
below one. (No sequence stays within one in *every* window for general weights and n >= 3: such
"balanced" sequences exist only for special weights; docs/decisions/iwrr.md.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item")

PHASE_STEPS_MAX = 64


class Iwrr(Generic[Item]):
    """Chooses among weighted items in turn. Deterministic; ties go to the item given first.

    Items of weight 0 are never chosen. A masked item neither is chosen nor earns credit meanwhile:
    the others share its part in proportion.
    """

    def __init__(self, weights: Mapping[Item, float]) -> None:
        self._weights = {item: weight for item, weight in weights.items() if weight > 0}
        self._credit = dict.fromkeys(self._weights, 0.0)

    def skip(self, rng: random.Random) -> None:
        """Start at a random phase, so that many clients together do not all begin with the same item."""
        for _ in range(rng.randrange(PHASE_STEPS_MAX) if self._weights else 0):
            self.choose()

    def choose(self, masked: Collection[Item] = ()) -> Item | None:
        """The next item that is not masked, or None if there is none."""
        weights = self._unmasked(masked)
        if not weights:
            return None
        total = sum(weights.values())
        slack = 1.0 / (2 * len(weights) - 2) if len(weights) > 1 else 1.0
        for item, weight in weights.items():
            self._credit[item] += weight / total
        due = [item for item in weights if self._credit[item] >= slack - 1e-12]
        # Rounding, or a mask that just changed, may leave nobody due: then take the most deserving.
        pool = due or list(weights)
        chosen = min(pool, key=lambda item: (1.0 - slack - self._credit[item]) / (weights[item] / total))
        self._credit[chosen] -= 1.0
        return chosen

    def ahead(self, item: Item) -> float:
        """How many turns the item has had before they were due; infinite for one that has none."""
        return -self._credit[item] if item in self._credit else math.inf

    def take(self, item: Item, masked: Collection[Item] = ()) -> None:
        """Choose this one, whosever turn it is: the others come sooner for it. It must not be masked."""
        self._settle(item, self._unmasked(masked), 1)

    def give_back(self, item: Item, masked: Collection[Item] = ()) -> None:
        """As if the item had not been chosen, when these were masked: it is among the first in line again."""
        weights = self._unmasked(masked)
        if item in weights:
            self._settle(item, weights, -1)

    def _settle(self, item: Item, weights: Mapping[Item, float], turns: int) -> None:
        """The item has had so many turns, and all of them earn their parts of these."""
        total = sum(weights.values())
        for other, weight in weights.items():
            self._credit[other] += turns * weight / total
        self._credit[item] -= turns

    def _unmasked(self, masked: Collection[Item]) -> dict[Item, float]:
        return {item: weight for item, weight in self._weights.items() if item not in masked}

"""IWRR: every item's share, at any moment and over any window."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.route.iwrr import Iwrr

WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


def _choices(weights: list[float], count: int, seed: int | None = None) -> list[int]:
    turns = Iwrr(dict(enumerate(weights)))
    if seed is not None:
        turns.skip(random.Random(seed))
    return [turns.choose() for _ in range(count)]  # type: ignore[misc]


@given(WEIGHTS, st.integers(1, 300))
def test_from_the_start_every_count_is_within_one_request_of_its_share(weights: list[float], count: int) -> None:
    counts = Counter(_choices(weights, count))
    for item, weight in enumerate(weights):
        assert abs(counts[item] - count * weight / sum(weights)) < 1 + 1e-6


@given(WEIGHTS, st.lists(st.booleans(), max_size=300))
def test_turns_that_are_given_back_do_not_count(weights: list[float], taken: list[bool]) -> None:
    turns = Iwrr(dict(enumerate(weights)))
    counts = Counter[int | None]()
    for is_taken in taken:
        item = turns.choose()
        counts[item] += is_taken
        if not is_taken and item is not None:
            turns.give_back(item)
    for item, weight in enumerate(weights):
        assert abs(counts[item] - sum(taken) * weight / sum(weights)) < 1 + 1e-6


@given(WEIGHTS, st.integers(0, 100), st.integers(1, 200), st.integers(0, 2**32))
def test_over_any_window_every_count_is_within_the_proven_bound(
    weights: list[float], start: int, length: int, seed: int
) -> None:
    # Two prefixes, each within 1 - 1/(2n - 2) of its share (Tijdeman), differ by less than twice that.
    items = len(weights)
    bound = 2 * (1 - 1 / (2 * items - 2)) if items > 1 else 0
    window = Counter(_choices(weights, start + length, seed)[start:])
    for item, weight in enumerate(weights):
        assert abs(window[item] - length * weight / sum(weights)) <= bound + 1e-6


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.integers(0, 100), st.integers(1, 200))
def test_two_items_stay_within_one_request_over_any_window(a: float, b: float, start: int, length: int) -> None:
    window = Counter(_choices([a, b], start + length)[start:])
    assert abs(window[0] - length * a / (a + b)) < 1 + 1e-6


@given(WEIGHTS, st.data())
def test_a_masked_item_is_never_chosen_and_the_others_share_its_part(weights: list[float], data: st.DataObject) -> None:
    masked = data.draw(st.sets(st.integers(0, len(weights) - 1), max_size=len(weights)))
    turns = Iwrr(dict(enumerate(weights)))
    chosen = [turns.choose(masked) for _ in range(50)]
    rest = {item: weight for item, weight in enumerate(weights) if item not in masked}
    if not rest:
        assert set(chosen) == {None}
        return
    for item, weight in rest.items():
        assert abs(chosen.count(item) - 50 * weight / sum(rest.values())) < 1 + 1e-6
    assert not masked & set(chosen)


def test_items_without_weight_are_never_chosen() -> None:
    turns = Iwrr({"a": 0.0, "b": 1.0})
    assert {turns.choose() for _ in range(10)} == {"b"}
    assert Iwrr({"a": 0.0}).choose() is None


def test_many_clients_at_random_phases_add_up_to_the_flow() -> None:
    first = Counter(_choices([3.0, 1.0], 1, seed)[0] for seed in range(400))
    assert 0.65 < first[0] / 400 < 0.85

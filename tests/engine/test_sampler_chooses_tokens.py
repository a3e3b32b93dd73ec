from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.sampling import SEED_MAX, Sampling
from helixnet.engine.sampler import sample, uniform

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
logits_rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda row: np.array(row, np.float32))
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, SEED_MAX),
)


def shares(settings: dict[str, float], draws: int = 4000) -> list[float]:
    tokens = [sample(Sampling(**settings), position, LOGITS) for position in range(draws)]  # type: ignore[arg-type]
    return [tokens.count(token) / draws for token in range(LOGITS.size)]


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(Sampling(), 0, np.array([1.0, 3.0, 3.0, 2.0], np.float32)) == 1


def test_tokens_come_as_often_as_their_probability_says() -> None:
    assert shares({"temperature": 1.0}) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_a_low_temperature_sharpens() -> None:
    squares = np.array([0.1, 0.2, 0.3, 0.4]) ** 2
    assert shares({"temperature": 0.5}) == pytest.approx(list(squares / squares.sum()), abs=0.03)


def test_top_k_keeps_the_likeliest() -> None:
    assert shares({"temperature": 1.0, "top_k": 2}) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert shares({"temperature": 1.0, "top_p": 0.65}) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.03)


def test_a_tiny_top_p_still_leaves_the_likeliest() -> None:
    assert shares({"temperature": 1.0, "top_p": 1e-9}, 50) == [0, 0, 0, 1]


@given(samplings, logits_rows, st.integers(0, 10_000))
def test_the_same_seed_and_position_give_the_same_token(settings: Sampling, row: np.ndarray, position: int) -> None:
    token = sample(settings, position, row)
    assert token == sample(settings, position, row.copy())
    assert 0 <= token < row.size


@given(samplings, logits_rows, st.integers(0, 10_000))
def test_only_tokens_among_the_k_likeliest_are_drawn(settings: Sampling, row: np.ndarray, position: int) -> None:
    token = sample(settings, position, row)
    if settings.top_k:
        assert (row > row[token]).sum() < settings.top_k


def test_a_token_without_weight_is_never_drawn() -> None:
    row = np.array([-math.inf, 0.0, -math.inf, 0.0], np.float32)
    assert {sample(Sampling(temperature=1.0, seed=seed), 0, row) for seed in range(100)} == {1, 3}


def test_uniform_numbers_are_those_of_every_machine() -> None:
    """Frozen: a change here changes what a seed means for every user."""
    assert [round(uniform(7, position), 6) for position in range(3)] == UNIFORM_7
    assert 0 <= uniform(SEED_MAX, 2**40) < 1


UNIFORM_7 = [0.141499, 0.170062, 0.033267]

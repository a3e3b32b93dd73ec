from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.sampling import SEED_MAX, History, Sampling
from helixnet.engine.sampler import NO_HISTORY, choose, uniform

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
logits_rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda row: np.array(row, np.float32))


def sample(settings: Sampling, position: int, row: np.ndarray) -> int:
    return choose(settings, position, row).token_id


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


def chosen(row: list[float], history: History = NO_HISTORY, **settings: Any) -> int:
    return choose(Sampling(**settings), 0, np.array(row, np.float32), history).token_id


def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest() -> None:
    assert shares({"temperature": 1.0, "min_p": 0.7}) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.03)
    assert shares({"temperature": 1.0, "min_p": 0.5, "top_k": 1}, 50) == [0, 0, 0, 1]


def test_a_bias_moves_a_logit() -> None:
    assert chosen([1.0, 2.0, 3.0], logit_bias=((0, 2.5), (99, 100.0))) == 0
    assert chosen([1.0, 2.0, 3.0], logit_bias=((2, -100.0),)) == 1


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [
        ({}, 0),
        ({"presence_penalty": 0.15}, 0),  # both of the answer's are a bit less likely
        ({"frequency_penalty": 0.15}, 1),  # 2.0 - 0.45 and 1.9 - 0.15: how often counts
        ({"presence_penalty": 0.5}, 3),  # what only the prompt has is none of the answer's
        ({"repetition_penalty": 1.25}, 2),  # but for this one it counts
    ],
)
def test_penalties_make_what_was_there_less_likely(penalties: dict[str, float], expected: int) -> None:
    history = History(prompt=(3, 3), made=[0, 0, 0, 1])
    assert chosen([2.0, 1.9, 1.65, 1.7, -1.0], history, **penalties) == expected


def test_a_repetition_penalty_lowers_negative_logits_too() -> None:
    assert chosen([-1.0, -1.5], History(prompt=(0,)), repetition_penalty=2.0) == 1


def test_bad_words_never_come_whole() -> None:
    bad = ((0,), (3, 2))
    assert chosen([5.0, 1.0, 3.0, 2.0], bad_words=bad) == 2
    assert chosen([5.0, 1.0, 3.0, 2.0], History(made=[1, 3]), bad_words=bad) == 3
    assert chosen([5.0, 1.0, 3.0, 2.0], History(prompt=(3,)), bad_words=bad) == 2, "the prompt is not the answer's"


def test_no_stop_id_comes_before_the_answer_is_long_enough() -> None:
    history = History(made=[1], stop_ids=(2,))
    assert chosen([0.0, 1.0, 3.0], history, min_tokens=2) == 1
    history.made.append(1)
    assert chosen([0.0, 1.0, 3.0], history, min_tokens=2) == 2


def test_where_everything_is_banned_the_model_decides() -> None:
    assert chosen([0.0, 1.0], bad_words=((0,), (1,))) == 1


def test_log_probabilities_are_the_models_own() -> None:
    found = choose(Sampling(logprobs=2, logit_bias=((0, 50.0),)), 0, LOGITS)
    assert found.token_id == 0
    assert found.logprobs is not None
    assert [token for token, _ in found.logprobs] == [0, 3, 2]
    assert [math.exp(value) for _, value in found.logprobs] == pytest.approx([0.1, 0.4, 0.3])
    assert choose(Sampling(), 0, LOGITS).logprobs is None


@given(samplings, logits_rows, st.lists(st.integers(0, 60), max_size=20), st.integers(0, 10_000), st.data())
def test_history_and_not_its_order_of_arrival_decides(
    settings: Sampling, row: np.ndarray, tokens: list[int], position: int, data: st.DataObject
) -> None:
    """Resumed anywhere: what the swarm made before counts as made, whatever pipeline made it."""
    settings = msgspec.structs.replace(
        settings, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, bad_words=((1, 2),), min_tokens=4
    )
    cut = data.draw(st.integers(0, len(tokens)))
    undisturbed = History(prompt=(5, 1), made=list(tokens), stop_ids=(0,))
    resumed = History(prompt=(5, 1), made=[*tokens[:cut]], stop_ids=(0,))
    for token in tokens[cut:]:
        resumed.made.append(token)
    assert choose(settings, position, row, undisturbed) == choose(settings, position, row, resumed)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"bad_words": ((),)},
        {"bad_words": ((-1,),)},
        {"min_tokens": -1},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_uniform_numbers_are_those_of_every_machine() -> None:
    """Frozen: a change here changes what a seed means for every user."""
    assert [round(uniform(7, position), 6) for position in range(3)] == UNIFORM_7
    assert 0 <= uniform(SEED_MAX, 2**40) < 1


UNIFORM_7 = [0.141499, 0.170062, 0.033267]

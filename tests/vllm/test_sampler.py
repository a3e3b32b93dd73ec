"""Our sampler means by its settings what vLLM's own sampler means by them; only the draw differs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from helixnet.core.sampling import History, Sampling
from helixnet.engine.sampler import choose, distribution

VOCAB = 300
STOP = 2


def asked(count: int, seed: int) -> list[tuple[Sampling, History]]:
    """So many requests with random settings; every third is greedy."""
    random = np.random.default_rng(seed)
    histories = [_history(random) for _ in range(count)]
    return [(_settings(random, number, history.made), history) for number, history in enumerate(histories)]


def _settings(random: np.random.Generator, number: int, made: list[int]) -> Sampling:
    def maybe(value: Any, otherwise: Any) -> Any:
        return value if random.random() < 0.5 else otherwise

    begun = maybe(made[-int(random.integers(1, 3)) :], [3, 5])
    ended = [(*begun, int(token)) for token in random.integers(0, VOCAB, 40)]  # some of them are likely
    return Sampling(
        temperature=0.0 if number % 3 == 0 else float(random.uniform(0.3, 2.0)),
        top_k=maybe(int(random.integers(1, 60)), 0),
        top_p=maybe(float(random.uniform(0.2, 0.99)), 1.0),
        min_p=maybe(float(random.uniform(0.001, 0.2)), 0.0),
        repetition_penalty=maybe(float(random.uniform(0.7, 1.8)), 1.0),
        presence_penalty=maybe(float(random.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(random.uniform(-2, 2)), 0.0),
        logit_bias=maybe(tuple((int(token), 4.0) for token in random.integers(0, VOCAB, 3)), ()),
        bad_words=maybe((*ended, (7,)), ()),
        min_tokens=maybe(int(random.integers(1, 30)), 0),
        logprobs=5,
    )


def _history(random: np.random.Generator) -> History:
    prompt = tuple(int(token) for token in random.integers(0, VOCAB, 30))
    return History(prompt=prompt, made=[int(token) for token in random.integers(0, 12, 20)], stop_ids=(STOP,))


def params_of(settings: Sampling) -> SamplingParams:
    """The same for vLLM."""
    params = SamplingParams(
        temperature=settings.temperature,
        min_p=settings.min_p,
        logit_bias=dict(settings.logit_bias) or None,
        min_tokens=settings.min_tokens,
        max_tokens=1000,
        stop_token_ids=[STOP],
    )
    params.update_from_generation_config({}, None)
    return params


def by_vllm(rows: torch.Tensor, requests: list[tuple[Sampling, History]], mode: str) -> Any:
    """What its sampler makes of a batch."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(requests)), speculative_config=None)
    kinds: tuple[Any, ...] = (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    processors = [kind(config, torch.device("cpu"), False) for kind in kinds]
    added = [(at, params_of(one), list(past.prompt), past.made) for at, (one, past) in enumerate(requests)]
    for processor in processors:
        processor.update_state(BatchUpdate(batch_size=len(requests), removed=(), added=added, moved=()))

    def each(name: str) -> torch.Tensor:
        return torch.tensor([getattr(one, name) for one, _ in requests])

    metadata = SamplingMetadata(
        temperature=each("temperature"),
        all_greedy=False,
        all_random=False,
        top_p=each("top_p"),
        top_k=torch.tensor([one.top_k or VOCAB for one, _ in requests]),
        generators={at: torch.Generator().manual_seed(at) for at in range(len(requests))},
        max_num_logprobs=-1,
        no_penalties=False,
        prompt_token_ids=torch.tensor([past.prompt for _, past in requests]),
        frequency_penalties=each("frequency_penalty"),
        presence_penalties=each("presence_penalty"),
        repetition_penalties=each("repetition_penalty"),
        output_token_ids=[past.made for _, past in requests],
        allowed_token_ids_mask=None,
        bad_words_token_ids={at: [list(word) for word in one.bad_words] for at, (one, _) in enumerate(requests)},
        logitsprocs=LogitsProcessors(processors),
    )
    return Sampler(logprobs_mode=mode).forward(rows.clone(), metadata)


@pytest.mark.parametrize("seed", range(6))
def test_settings_mean_what_they_mean_there(seed: int) -> None:
    requests = asked(48, seed)
    rows = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = by_vllm(rows, requests, "processed_logprobs")
    probabilities = theirs.logprobs_tensors.logprobs.exp().double()
    for at, (settings, history) in enumerate(requests):
        if settings.temperature == 0:
            assert choose(settings, 5, rows[at].numpy(), history).token_id == int(theirs.sampled_token_ids[at, 0])
            continue
        ids, ours = distribution(settings, rows[at].numpy(), history)
        whole = np.zeros(VOCAB)
        whole[ids] = ours
        np.testing.assert_allclose(whole, probabilities[at].numpy(), atol=1e-5, err_msg=str(settings))


def test_log_probabilities_are_those_it_reports() -> None:
    requests = asked(12, 99)
    rows = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(99)) * 3
    theirs = by_vllm(rows, requests, "raw_logprobs").logprobs_tensors.logprobs
    for at, (settings, history) in enumerate(requests):
        found = choose(settings, 5, rows[at].numpy(), history)
        assert found.logprobs is not None
        for token, value in found.logprobs:
            assert value == pytest.approx(float(theirs[at, token]), abs=1e-5)

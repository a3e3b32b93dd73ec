"""How the next token is chosen: a pure function of (settings, position, logits, what came before)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

STOP_IDS_MAX = 64
SEED_MAX = 2**63 - 1
LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 1024
BIAS_MAX = 100.0
BAD_WORDS_MAX, BAD_WORD_TOKENS_MAX = 128, 32
TOKENS_MAX = 2**31
"""Above every vocabulary and every number of tokens."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of one request. Temperature 0 is greedy: the first of the largest logits.

    They act in the order of vLLM's sampler: bias and bans, penalties, temperature, min_p, top_k, top_p.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep only tokens that are at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer have are divided by it, or multiplied where they are negative."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has ..."""
    frequency_penalty: float = 0.0
    """... and as often as it has them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids that the answer never has."""
    min_tokens: int = 0
    """No stop id is chosen before the answer has so many tokens."""
    logprobs: int | None = None
    """With each token, its log probability and those of so many likeliest; None for none at all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must not be negative and top_p must be in (0, 1], not {self.top_k}, {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not 0 < self.repetition_penalty <= 10:
            raise ValueError(f"repetition_penalty must be above 0 and at most 10, not {self.repetition_penalty}")
        if not (-2 <= self.presence_penalty <= 2 and -2 <= self.frequency_penalty <= 2):
            given = f"{self.presence_penalty}, {self.frequency_penalty}"
            raise ValueError(f"presence_penalty and frequency_penalty must be between -2 and 2, not {given}")
        if not 0 <= self.min_tokens < TOKENS_MAX:
            raise ValueError(f"min_tokens must not be negative, not {self.min_tokens}")
        if self.logprobs is not None and not 0 <= self.logprobs <= LOGPROBS_MAX:
            raise ValueError(f"logprobs must be between 0 and {LOGPROBS_MAX}, not {self.logprobs}")
        if not 0 <= self.seed <= SEED_MAX:
            raise ValueError(f"seed must be between 0 and {SEED_MAX}, not {self.seed}")
        _check_lists(self.logit_bias, self.bad_words)

    @property
    def looks_back(self) -> bool:
        """Whether it matters what came before, besides the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.min_tokens > 0
            or any(len(word) > 1 for word in self.bad_words)
        )


@dataclass(slots=True)
class History:
    """What came before the token to be chosen. Whoever samples adds each chosen token to `made`."""

    prompt: tuple[int, ...] = ()
    made: list[int] = field(default_factory=list)
    """The answer so far, also what other pipelines made of it."""
    stop_ids: tuple[int, ...] = ()


Logprobs = tuple[tuple[int, float], ...]
"""(token id, natural logarithm of its probability): first the chosen token's, then the likeliest, best first."""


def _check_lists(logit_bias: tuple[tuple[int, float], ...], bad_words: tuple[tuple[int, ...], ...]) -> None:
    if len(logit_bias) > LOGIT_BIAS_MAX:
        raise ValueError(f"logit_bias has at most {LOGIT_BIAS_MAX} tokens, not {len(logit_bias)}")
    for token, bias in logit_bias:
        if not (0 <= token < TOKENS_MAX and -BIAS_MAX <= bias <= BIAS_MAX):
            raise ValueError(f"logit_bias must be between -{BIAS_MAX:g} and {BIAS_MAX:g}, not {bias} for token {token}")
    if len(bad_words) > BAD_WORDS_MAX or any(not 1 <= len(word) <= BAD_WORD_TOKENS_MAX for word in bad_words):
        raise ValueError(f"bad_words are at most {BAD_WORDS_MAX} sequences of 1 to {BAD_WORD_TOKENS_MAX} tokens")
    if any(not 0 <= token < TOKENS_MAX for word in bad_words for token in word):
        raise ValueError("a token id of bad_words is out of range")

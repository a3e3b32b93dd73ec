"""The next token: a pure function of (settings, position, logits, history), the same everywhere for the same logits.

The order of its steps and what each does are those of vLLM 0.32's sampler, so that a request means the same on either
engine; the draw itself is ours, for it must not depend on a generator's state.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from helixnet.core.sampling import History, Logprobs, Sampling

NO_HISTORY = History()


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and what was asked about its chances."""

    token_id: int
    logprobs: Logprobs | None = None
    """Of the model's own distribution: nothing of the settings changes them."""


def choose(settings: Sampling, position: int, logits: np.ndarray, history: History = NO_HISTORY) -> Chosen:
    """The token chosen from one row of logits `[vocab]`, for the token at `position` of the sequence.

    Greedy takes the first of the largest. Otherwise the inverse of the cumulative distribution, over the
    ids in order, at a number derived from (seed, position) alone: resuming a request elsewhere continues
    it with the same tokens. Everything is computed on the CPU in float64.
    """
    row = _biased(settings, logits, history)
    token = int(np.argmax(row)) if settings.temperature == 0 else _drawn(settings, position, row)
    return Chosen(token, None if settings.logprobs is None else _logprobs(logits, token, settings.logprobs))


def distribution(
    settings: Sampling, logits: np.ndarray, history: History = NO_HISTORY
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may come after everything the settings say, ascending, and how probable each of them is.

    Raises ValueError for greedy settings, which know no probabilities.
    """
    if settings.temperature == 0:
        raise ValueError("greedy settings leave one token, without a probability")
    kept, weights = _weighed(settings, _biased(settings, logits, history))
    return kept, weights / weights.sum()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) derived from (seed, position); 53 bits of BLAKE2b, so it needs no state."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"helixnet-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _drawn(settings: Sampling, position: int, logits: np.ndarray) -> int:
    kept, weights = _weighed(settings, logits)
    cumulative = np.cumsum(weights)
    drawn = uniform(settings.seed, position) * cumulative[-1]
    # `right`: a draw exactly on a boundary belongs to the next token, so that zero weight is never drawn.
    index = int(np.searchsorted(cumulative, drawn, side="right"))
    return int(kept[min(index, kept.size - 1)])


def _weighed(settings: Sampling, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that are left, and their weights."""
    row = np.asarray(logits, dtype=np.float64) / settings.temperature
    weights = np.exp(row - row.max())
    kept = _kept(weights, settings)
    return kept, weights[kept]


def _biased(settings: Sampling, logits: np.ndarray, history: History) -> np.ndarray:
    """The logits after bias, bans and penalties; the very ones given if there is none of these."""
    if not (settings.logit_bias or settings.bad_words or settings.looks_back):
        return logits
    row = np.array(logits, dtype=np.float64)
    for token, bias in settings.logit_bias:
        if token < row.size:
            row[token] += bias
    banned = _banned(settings, history)
    row[[token for token in banned if token < row.size]] = -np.inf
    if settings.repetition_penalty != 1.0:
        seen, by = _ids(row, (*history.prompt, *history.made)), settings.repetition_penalty
        row[seen] = np.where(row[seen] > 0, row[seen] / by, row[seen] * by)
    if history.made and (settings.presence_penalty or settings.frequency_penalty):
        made, often = np.unique(np.array(history.made), return_counts=True)
        there = made < row.size
        row[made[there]] -= settings.frequency_penalty * often[there] + settings.presence_penalty
    # Somebody banned everything: better a banned token than none.
    return row if np.isfinite(row.max()) else np.asarray(logits)


def _ids(row: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    ids = np.unique(np.array(tokens, dtype=np.int64))
    return ids[ids < row.size]


def _banned(settings: Sampling, history: History) -> set[int]:
    """What may not come now: the ends of bad words that are there but for their last token, and early stop ids."""
    banned = set(history.stop_ids) if len(history.made) < settings.min_tokens else set()
    for *begun, last in settings.bad_words:
        if not begun or history.made[-len(begun) :] == begun:
            banned.add(last)
    return banned


def _logprobs(logits: np.ndarray, token: int, count: int) -> Logprobs:
    row = np.asarray(logits, dtype=np.float64)
    row = row - row.max()
    row = row - np.log(np.exp(row).sum())
    best = np.argsort(-row, kind="stable")[:count] if count else ()
    return tuple((int(each), float(row[each])) for each in (token, *best))


def _kept(weights: np.ndarray, settings: Sampling) -> np.ndarray:
    """Ids that min-p, top-k and top-p leave, ascending. Equal weights are ranked by id; the likeliest always stays."""
    if settings.top_k == 0 and settings.top_p == 1.0 and settings.min_p == 0.0:
        return np.arange(weights.size)
    candidates = np.flatnonzero(weights >= settings.min_p * weights.max())
    if 0 < settings.top_k < candidates.size:
        # Only the k largest (and what ties with the smallest of them) need sorting.
        among = weights[candidates]
        threshold = np.partition(among, among.size - settings.top_k)[among.size - settings.top_k]
        candidates = candidates[among >= threshold]
    ranked = candidates[np.argsort(-weights[candidates], kind="stable")]
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    if settings.top_p < 1.0:
        cumulative = np.cumsum(weights[ranked])
        enough = int(np.searchsorted(cumulative, settings.top_p * cumulative[-1], side="left"))
        ranked = ranked[: enough + 1]
    return np.sort(ranked)

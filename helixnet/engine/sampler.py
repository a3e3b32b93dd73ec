"""The next token: a pure function of (settings, position, logits), the same on every machine for the same logits."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from helixnet.core.sampling import Sampling


def sample(settings: Sampling, position: int, logits: np.ndarray) -> int:
    """The token id chosen from one row of logits `[vocab]`, for the token at `position` of the sequence.

    Greedy takes the first of the largest. Otherwise the inverse of the cumulative distribution, over the
    ids in order, at a number derived from (seed, position) alone: resuming a request elsewhere continues
    it with the same tokens. Everything is computed on the CPU in float64.
    """
    if settings.temperature == 0:
        return int(np.argmax(logits))
    row = np.asarray(logits, dtype=np.float64) / settings.temperature
    weights = np.exp(row - row.max())
    kept = _kept(weights, settings)
    cumulative = np.cumsum(weights[kept])
    drawn = uniform(settings.seed, position) * cumulative[-1]
    # `right`: a draw exactly on a boundary belongs to the next token, so that zero weight is never drawn.
    index = int(np.searchsorted(cumulative, drawn, side="right"))
    return int(kept[min(index, kept.size - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) derived from (seed, position); 53 bits of BLAKE2b, so it needs no state."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"helixnet-sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _kept(weights: np.ndarray, settings: Sampling) -> np.ndarray:
    """Ids that top-k and top-p leave, ascending. Equal weights are ranked by id; the likeliest id always stays."""
    if settings.top_k == 0 and settings.top_p == 1.0:
        return np.arange(weights.size)
    if 0 < settings.top_k < weights.size:
        # Only the k largest (and what ties with the smallest of them) need sorting.
        threshold = np.partition(weights, weights.size - settings.top_k)[weights.size - settings.top_k]
        candidates = np.flatnonzero(weights >= threshold)
    else:
        candidates = np.arange(weights.size)
    ranked = candidates[np.argsort(-weights[candidates], kind="stable")]
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    if settings.top_p < 1.0:
        cumulative = np.cumsum(weights[ranked])
        enough = int(np.searchsorted(cumulative, settings.top_p * cumulative[-1], side="left"))
        ranked = ranked[: enough + 1]
    return np.sort(ranked)

"""Whether a new plan is worth its cost: moving weights and disturbing sessions must pay within a horizon."""

from __future__ import annotations

import msgspec

from helixnet.core.model import Manifest
from helixnet.core.plan.plan import Placement
from helixnet.core.types import PeerId, Span


class AdoptionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a change must earn."""

    horizon_s: float = 600.0
    """A gain counts for this long: swarms of volunteers change before that."""
    gain_min: float = 0.05
    """Smaller relative gains are noise of the measurements."""
    load_bytes_per_s: float = 100e6
    """How fast peers read weights, for the cost of a move."""


class Verdict(msgspec.Struct, frozen=True):
    """The decision, and why, in words."""

    adopt: bool
    why: str


def moved_bytes(held: dict[PeerId, tuple[Span, ...]], placement: Placement, manifest: Manifest) -> int:
    """Bytes of weights that peers must load for `placement` beyond what they hold."""
    total = 0
    for assignment in placement.assignments:
        total += manifest.layer_bytes * len(new_layers(held.get(assignment.peer, ()), assignment.span))
    return total


def new_layers(held: tuple[Span, ...], span: Span) -> list[int]:
    """The layers of `span` that a peer which holds `held` must load, in order."""
    return [layer for layer in span.layers() if not any(layer in have.layers() for have in held)]


def replicas_min(placement: Placement, layers: int) -> int:
    """How many peers hold the least replicated layer."""
    counts = [0] * layers
    for assignment in placement.assignments:
        for layer in assignment.span.layers():
            counts[layer] += 1
    return min(counts)


def weigh(
    current: Placement | None,
    candidate: Placement,
    held: dict[PeerId, tuple[Span, ...]],
    manifest: Manifest,
    config: AdoptionConfig,
) -> Verdict:
    """Whether to change from `current` (as it would do today; None if it cannot serve) to `candidate`."""
    if current is None or current.prediction.tokens_per_s <= 0:
        return Verdict(True, "nothing serves now")
    if {a.peer: a.span for a in current.assignments} == {a.peer: a.span for a in candidate.assignments}:
        return _weigh_flows(current, candidate, config)
    now_rate, new_rate = current.prediction.tokens_per_s, candidate.prediction.tokens_per_s
    cost_s = moved_bytes(held, candidate, manifest) / config.load_bytes_per_s
    gained_tokens = (new_rate - now_rate) * config.horizon_s
    lost_tokens = now_rate * cost_s
    if new_rate >= now_rate * (1 + config.gain_min) and gained_tokens > lost_tokens:
        return Verdict(True, f"{new_rate:.0f} instead of {now_rate:.0f} tokens/s, {cost_s:.1f} s of loading")
    safer = replicas_min(candidate, manifest.layers) - replicas_min(current, manifest.layers)
    helps_more = len(candidate.assignments) > len(current.assignments)
    if new_rate >= now_rate * (1 - config.gain_min) and (safer > 0 or (helps_more and safer >= 0)):
        return Verdict(True, "more peers share the work" if helps_more else "survives more departures")
    return Verdict(False, f"{new_rate:.0f} instead of {now_rate:.0f} tokens/s does not pay for the move")


def _weigh_flows(current: Placement, candidate: Placement, config: AdoptionConfig) -> Verdict:
    """Same spans, other flows: free to adopt, but only worth a message if they differ noticeably."""
    old = {(f.source, f.target): f.tokens_per_s for f in current.flows}
    new = {(f.source, f.target): f.tokens_per_s for f in candidate.flows}
    total = max(sum(rate for (source, _), rate in new.items() if source is None), 1e-9)
    shift = sum(abs(new.get(edge, 0.0) - old.get(edge, 0.0)) for edge in sorted(old.keys() | new.keys(), key=str))
    changed = shift > config.gain_min * total
    return Verdict(changed, "the flows shifted" if changed else "nothing changed")

"""The engine that is to serve: what was asked for, or whichever is faster here, by measuring."""

from __future__ import annotations

from dataclasses import dataclass

from helixnet.core.errors import HelixError, MemoryTooSmall
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.engine.base import Progress
from helixnet.engine.benchmark import Asked, measure
from helixnet.engine.kinds import Kind, kinds_for
from helixnet.engine.weights.prepared import PreparedModel

TYPICAL_BATCH = 16
TYPICAL_PROMPT, TYPICAL_ANSWER = 256, 256
"""Tokens of a request by which engines are compared."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person said about engines."""

    engine: str = "auto"
    """auto, torch or vllm."""
    device: str = "cpu"
    threads: int | None = None
    vllm_python: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that serves, and why not the other."""

    kind: Kind
    capability: Capability
    instead_of: str = ""
    """In words; empty if there was no other."""


def choose(model: PreparedModel, wish: Wish, memory_bytes: int, progress: Progress | None = None) -> Choice:
    """Measure the engines that come into question (or read what was measured before) and take the faster.

    Raises UsageError for an engine that is not there, MemoryTooSmall, and whatever keeps the only one from working.
    """
    kinds = kinds_for(wish.engine, wish.device, wish.vllm_python, model.manifest.quantization)
    found: list[tuple[float, Kind, Capability]] = []
    problem = ""
    threads = wish.threads
    for number, kind in enumerate(kinds):
        asked = Asked(model, wish.device, memory_bytes, kind, threads)
        try:
            capability = measure(asked, progress=_part(progress, number, len(kinds)))
        except MemoryTooSmall:
            raise
        except HelixError as error:
            if len(kinds) == 1 or not number:
                raise
            problem = f"{kind.version} cannot serve this model here: {error}"
            continue
        threads = threads or capability.threads  # the other gets as many, and need not find out
        found.append((request_s(capability, model.manifest.layers), kind, capability))
    found.sort(key=lambda one: one[0])
    _, kind, capability = found[0]
    if len(found) > 1:
        problem = f"{found[1][1].version} takes {found[1][0] / found[0][0]:.1f} times as long"
    return Choice(kind, capability, problem)


def request_s(capability: Capability, layers: int) -> float:
    """Seconds of this device that a typical request takes in so many layers, when it is not alone."""
    decode = _at(capability.decode, TYPICAL_BATCH)
    prefill = _at(capability.prefill, TYPICAL_PROMPT)
    step_s = (layers * decode.seconds + capability.batch_s) / decode.tokens
    prompt_s = (layers * prefill.seconds + capability.batch_s) / prefill.tokens
    return TYPICAL_ANSWER * step_s + TYPICAL_PROMPT * prompt_s


def _at(curve: tuple[RatePoint, ...], tokens: int) -> RatePoint:
    """The point measured with so many tokens, or the one before."""
    return max((point for point in curve if point.tokens <= tokens), default=curve[0], key=lambda point: point.tokens)


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """One of several measurements, as a part of all of them."""
    return None if progress is None else lambda done, total: progress(number * total + done, count * total)

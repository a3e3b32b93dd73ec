"""A request's way through the swarm: ordered stages that cover each layer exactly once."""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from helixnet.core.types import PeerId, Span
from helixnet.core.wire.activation import INT8, PACKINGS, PAIR, RAW

STAGES_MAX = 64


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """A peer and the layers it runs for one request; the layers may be part of what it holds."""

    peer: PeerId
    layers: Span
    sends: str = RAW
    """How it packs what it hands on."""


Pipeline = tuple[Stage, ...]

WISHES = {"raw": RAW, "int8": INT8, "exact": PAIR}
"""What clients may want of the hops of their requests: hidden states as they are; in half of the bytes, with small
errors; or as vLLM keeps them, where nothing is to differ from its own whole model."""


def packed(pipeline: Pipeline, wish: str, takes: Callable[[PeerId], Collection[str]]) -> Pipeline:
    """The pipeline with each hop packed as is wished where both of its ends can, and otherwise as it is."""
    wanted = WISHES[wish]
    stages = []
    for stage, onward in zip(pipeline, (*pipeline[1:], None), strict=True):
        both = onward is not None and wanted in takes(stage.peer) and wanted in takes(onward.peer)
        stages.append(Stage(stage.peer, stage.layers, wanted if both else RAW))
    return tuple(stages)


def check_pipeline(pipeline: Pipeline, layers: int) -> None:
    """Refuse a pipeline that does not cover `[0, layers)` exactly once, in order.

    Raises:
        ValueError: it is empty, too long, has a gap or an overlap, visits a peer twice, or packs a hop in no known way.
    """
    if not 1 <= len(pipeline) <= STAGES_MAX:
        raise ValueError(f"a pipeline has 1 to {STAGES_MAX} stages, not {len(pipeline)}")
    reached = 0
    for stage in pipeline:
        if stage.layers.start != reached:
            raise ValueError(f"stage {stage.layers} does not continue at layer {reached}")
        reached = stage.layers.stop
    if reached != layers:
        raise ValueError(f"the pipeline ends at layer {reached} of {layers}")
    if any(stage.sends not in PACKINGS for stage in pipeline) or pipeline[-1].sends:
        raise ValueError("the pipeline packs a hop in no known way")
    if len({stage.peer for stage in pipeline}) != len(pipeline):
        raise ValueError("a pipeline visits each peer at most once")

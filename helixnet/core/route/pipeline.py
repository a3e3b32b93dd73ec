"""A request's way through the swarm: ordered stages that cover each layer exactly once."""

from __future__ import annotations

import msgspec

from helixnet.core.types import PeerId, Span

STAGES_MAX = 64


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """A peer and the layers it runs for one request; the layers may be part of what it holds."""

    peer: PeerId
    layers: Span


Pipeline = tuple[Stage, ...]


def check_pipeline(pipeline: Pipeline, layers: int) -> None:
    """Refuse a pipeline that does not cover `[0, layers)` exactly once, in order.

    Raises:
        ValueError: it is empty, too long, has a gap or an overlap, or visits a peer twice.
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
    if len({stage.peer for stage in pipeline}) != len(pipeline):
        raise ValueError("a pipeline visits each peer at most once")

"""Which way prompts went lately: whoever begins alike does well to go there again."""

from __future__ import annotations

from helixnet.core.prefix import Chain
from helixnet.core.route.pipeline import Pipeline

BLOCKS_MAX = 4096
"""That are remembered: some hundred conversations."""


class Ways:
    """The newest pipeline that ran each block of tokens; the peers may have forgotten it since."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._pipelines: dict[bytes, Pipeline] = {}
        self._blocks_max = blocks_max

    def ran(self, pipeline: Pipeline, chain: Chain) -> None:
        """It has run all of this."""
        for block in reversed(chain):  # what is asked for first is forgotten last
            self._pipelines.pop(block, None)
            self._pipelines[block] = pipeline
        while len(self._pipelines) > self._blocks_max:
            del self._pipelines[next(iter(self._pipelines))]

    def find(self, chain: Chain) -> Pipeline | None:
        """Who ran most of this."""
        return next((self._pipelines[block] for block in reversed(chain) if block in self._pipelines), None)

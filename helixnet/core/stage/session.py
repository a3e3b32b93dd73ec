"""One request's part at one stage."""

from __future__ import annotations

from dataclasses import dataclass

from helixnet.core.route.pipeline import Pipeline
from helixnet.core.sampling import Sampling
from helixnet.core.types import PeerId, SessionId, Span


@dataclass(slots=True)
class StageSession:
    """State of a session here. `next_position` is where the next step must begin."""

    session: SessionId
    pipeline: Pipeline
    stage: int
    tokens_max: int
    prompt_left: int
    """Prompt tokens that have not run here yet."""
    sampling: Sampling | None
    active_at: float
    next_position: int = 0

    @property
    def layers(self) -> Span:
        """The layers this stage runs for the session."""
        return self.pipeline[self.stage].layers

    @property
    def entry(self) -> PeerId:
        """The first stage's peer."""
        return self.pipeline[0].peer

    @property
    def next_hop(self) -> PeerId | None:
        """The next stage's peer; None at the exit."""
        return self.pipeline[self.stage + 1].peer if self.stage + 1 < len(self.pipeline) else None

    @property
    def previous_hop(self) -> PeerId | None:
        """The stage before; None at the entry."""
        return self.pipeline[self.stage - 1].peer if self.stage else None

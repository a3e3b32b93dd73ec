"""Chooses a pipeline for each request: IWRR over the plan's flows at every vertex, around the masked."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from helixnet.core.plan.plan import Plan
from helixnet.core.route.iwrr import Iwrr
from helixnet.core.route.pipeline import STAGES_MAX, Pipeline, Stage
from helixnet.core.types import PeerId, Span

AHEAD_TURNS = 4
"""A pipeline may have so many turns before they are due, if it holds what a prompt begins with."""

Held = Mapping[PeerId, tuple[Span, ...]]


class Router:
    """Routes over one plan. A new plan needs a new router; sessions in flight stay where they are.

    `held` says which layers each peer really has ready; a peer of the plan that is not in it is not used. It may be
    set anew as peers load and leave: whose turn it is is not forgotten.
    """

    def __init__(self, plan: Plan, held: Held, rng: random.Random) -> None:
        self.plan = plan
        self.held = held
        self._spans = {a.peer: a.span for a in plan.placement.assignments}
        self._rng = rng
        self._next: dict[PeerId | None, Iwrr[PeerId]] = {}
        weights: dict[PeerId | None, dict[PeerId, float]] = {}
        for flow in plan.placement.flows:
            if flow.target is not None:
                weights.setdefault(flow.source, {})[flow.target] = flow.tokens_per_s
        self._edges = weights

    def pick(self, masked: Collection[PeerId] = ()) -> Pipeline | None:
        """The next pipeline over live peers, or None if the unmasked peers do not cover the model.

        Follows the plan's flows where they lead from end to end; otherwise any peers that hold the layers.
        """
        return self._along_flows(masked) or self._anywhere(masked)

    def again(self, pipeline: Pipeline, masked: Collection[PeerId] = ()) -> bool:
        """Take this very pipeline, whosever turn it is, if it costs the plan's flows little.

        False, and nothing has changed, if the flows do not lead that way, or if it is too far ahead of its share.
        """
        blocked = self._dead_ends(masked)
        vertex: PeerId | None = None
        reached = 0
        for stage in pipeline:
            peer, span = stage.peer, self._spans.get(stage.peer)
            if peer in blocked or span is None or stage.layers != Span(reached, span.stop):
                return False
            if self._chooser(vertex).ahead(peer) >= AHEAD_TURNS:
                return False
            vertex, reached = peer, span.stop
        for before, stage in zip((None, *pipeline), pipeline, strict=False):
            self._chooser(before.peer if before else None).take(stage.peer, blocked)
        return True

    def give_back(self, pipeline: Pipeline) -> None:
        """Nobody let the request in that got this pipeline unmasked: whoever asks next has its turns."""
        blocked = self._dead_ends(())
        vertex: PeerId | None = None
        for stage in pipeline:
            chooser = self._next.get(vertex)
            if chooser is None:
                return
            chooser.give_back(stage.peer, blocked)
            vertex = stage.peer

    def _along_flows(self, masked: Collection[PeerId]) -> Pipeline | None:
        blocked = self._dead_ends(masked)
        stages: list[Stage] = []
        vertex: PeerId | None = None
        reached = 0
        while reached < self.plan.layers and len(stages) < STAGES_MAX:
            peer = self._chooser(vertex).choose(blocked)
            if peer is None:
                return None
            stop = self._spans[peer].stop
            stages.append(Stage(peer, Span(reached, stop)))
            vertex, reached = peer, stop
        return tuple(stages) if reached == self.plan.layers else None

    def _chooser(self, vertex: PeerId | None) -> Iwrr[PeerId]:
        """Whose turn it is after `vertex`; begun at a random phase when it is first asked."""
        chooser = self._next.get(vertex)
        if chooser is None:
            chooser = self._next[vertex] = Iwrr(self._edges.get(vertex, {}))
            chooser.skip(self._rng)
        return chooser

    def _dead_ends(self, masked: Collection[PeerId]) -> set[PeerId]:
        """Peers that are masked, not ready, or from which no unmasked flow leads to the last layer."""
        blocked = {peer for peer in self._spans if peer in masked or not self._is_ready(peer)}
        # Spans stop later and later along an edge, so one pass from the back settles everything.
        for peer in sorted(self._spans, key=lambda p: -self._spans[p].stop):
            onward = self._edges.get(peer, {})
            if self._spans[peer].stop < self.plan.layers and all(target in blocked for target in onward):
                blocked.add(peer)
        return blocked

    def _is_ready(self, peer: PeerId) -> bool:
        return any(span.holds(self._spans[peer]) for span in self.held.get(peer, ()))

    def _anywhere(self, masked: Collection[PeerId]) -> Pipeline | None:
        """Fewest stages over whatever the unmasked peers hold: always the span that reaches farthest."""
        stages: list[Stage] = []
        reached = 0
        used: set[PeerId] = set()
        while reached < self.plan.layers and len(stages) < STAGES_MAX:
            ahead = [
                (min(span.stop, self.plan.layers), peer)
                for peer, spans in sorted(self.held.items())
                for span in spans
                if peer not in masked and peer not in used and span.start <= reached < span.stop
            ]
            if not ahead:
                return None
            stop, peer = max(ahead, key=lambda pair: pair[0])
            stages.append(Stage(peer, Span(reached, stop)))
            used.add(peer)
            reached = stop
        return tuple(stages) if reached == self.plan.layers else None

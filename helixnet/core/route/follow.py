"""A client's picture of the swarm: the newest view it was sent, and the router over that view's plan."""

from __future__ import annotations

import random

import msgspec

from helixnet.core.route.pipeline import Pipeline
from helixnet.core.route.router import Router
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire

KV_HIGH_WATER = 0.05
"""Peers with a smaller share of free KV pages are routed around while others can serve."""


class SwarmView:
    """Follows one swarm. `view` is None before the first; a plan never gives way to one with a smaller number."""

    def __init__(self, rng: random.Random) -> None:
        self.view: wire.View | None = None
        self._rng = rng
        self._router: Router | None = None
        self._router_key: object = None
        self._full: frozenset[PeerId] = frozenset()

    def take(self, view: wire.View) -> bool:
        """A view came. Returns whether it is of the model that is followed."""
        old = self.view
        if old is not None and view.manifest_hash != old.manifest_hash:
            return False
        if old is not None and _number(view) < _number(old):
            view = msgspec.structs.replace(view, plan=old.plan, active=old.active)
        self.view = view
        self._full = frozenset(row.record.peer for row in view.members if row.record.kv_free < KV_HIGH_WATER)
        self._renew_router(view)
        return True

    def _renew_router(self, view: wire.View) -> None:
        """A new router only for another plan or other layers held: it remembers whose turn it is."""
        if view.plan is None:
            return
        held = {row.record.peer: row.record.held for row in view.members if row.state == "active" and row.record.held}
        key = (view.plan.number, tuple(held.items()))
        if self._router is None or key != self._router_key:
            self._router, self._router_key = Router(view.plan, held, self._rng), key

    def pick(self, masked: frozenset[PeerId]) -> Pipeline | str:
        """A pipeline around the masked and, if possible, around the full; or why there is none, in words."""
        if self.view is None or self._router is None:
            return (self.view.problem if self.view else "") or "The swarm has no plan yet."
        found = self._router.pick(masked | self._full) or self._router.pick(masked)
        return found or self.view.problem or "No live peers cover every layer of the model right now."


def _number(view: wire.View) -> tuple[int, int]:
    return (view.plan.term, view.plan.epoch) if view.plan else (0, 0)

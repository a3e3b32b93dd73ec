"""A client's picture of the swarm: whom it asks, the newest view it was sent, and the router over that view's plan."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import msgspec

from helixnet.core.prefix import Chain
from helixnet.core.route.pipeline import Pipeline
from helixnet.core.route.prefixes import Ways
from helixnet.core.route.router import Router
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.core.wire.activation import RAW

KV_HIGH_WATER = 0.05
"""Peers with a smaller share of free KV pages are routed around while others can serve."""

VIEW_STALE_S = 12.0
"""Peers push their view more often than this; silence means that the one asked is gone."""


VIEW_RENEW_S = 20.0
"""Views are asked for again this often: nobody is sent any for whom nobody looks."""


class SwarmView:
    """Follows one swarm. `view` is None before the first; a plan never gives way to one with a smaller number.

    `asked` is who was asked last for its views. Peers send what changed: `view` is always all of it.
    """

    def __init__(self, rng: random.Random) -> None:
        self.view: wire.View | None = None
        self.asked: PeerId | None = None
        self._viewed_at = -math.inf
        self._renew_at = math.inf
        self._serial = 0
        """Of the newest view of whom we asked; 0 if there is none to go on from."""
        self._rng = rng
        self._router: Router | None = None
        self._full: frozenset[PeerId] = frozenset()
        self._takes: dict[PeerId, tuple[str, ...]] = {}
        self._ways = Ways()

    def is_stale(self, now: float) -> bool:
        """Whether somebody else should be asked, because whom we asked has fallen silent."""
        return now - self._viewed_at > VIEW_STALE_S

    def gone(self, peer: PeerId) -> None:
        """A peer cannot be reached: if it is the one we asked, look for another at once."""
        if peer == self.asked:
            self._viewed_at, self._serial = -math.inf, 0

    def ask(self, peer: PeerId, now: float) -> wire.GetView:
        """What to send to a peer that is to show us the swarm from now on."""
        if peer != self.asked:
            self.asked, self._serial = peer, 0
        self._renew_at = now + VIEW_RENEW_S
        return wire.GetView(subscribe=True, since=self._serial, plan=_number(self.view) if self.view else (0, 0))

    def renewal(self, now: float) -> wire.GetView | None:
        """What to send to the one asked, if it is time to ask again."""
        return self.ask(self.asked, now) if self.asked is not None and now >= self._renew_at else None

    def better_informed(self) -> PeerId | None:
        """The coordinator, if there is one and somebody else was asked: it knows most."""
        coordinator = self.view.coordinator if self.view is not None else None
        return coordinator if coordinator != self.asked else None

    def is_ours(self, view: wire.View) -> bool:
        """Whether a view is of the model that is followed; the first decides which that is."""
        return self.view is None or view.manifest_hash == self.view.manifest_hash

    def take(self, view: wire.View, now: float, sender: PeerId | None = None) -> bool:
        """A view came from `sender`. Returns whether routes may differ: another plan, or other layers held."""
        old = self.view
        if not self.is_ours(view):
            return False
        if view.since:
            if old is None or sender != self.asked:
                return False
            if not view.since <= self._serial <= view.serial:
                self._serial, self._renew_at = 0, now  # something was lost: everything again
                return False
            view = msgspec.structs.replace(view, members=_merged(old.members, view), since=0, gone=())
        if view.serial and sender == self.asked:
            self._serial = view.serial
        if old is not None and _number(view) < _number(old):
            active = view.active if view.number == _number(old) else old.active
            view = msgspec.structs.replace(view, plan=old.plan, active=active)
        self.view, self._viewed_at = view, now
        self._takes = {row.record.peer: row.record.takes for row in view.members if row.record.takes != (RAW,)}
        self._full = frozenset(row.record.peer for row in view.members if row.record.kv_free < KV_HIGH_WATER)
        return self._renew_router(view)

    def _renew_router(self, view: wire.View) -> bool:
        """A new router only for another plan: it remembers whose turn it is."""
        if view.plan is None:
            return False
        held = {row.record.peer: row.record.held for row in view.members if row.state == "active" and row.record.held}
        if self._router is None or self._router.plan.number != view.plan.number:
            self._router = Router(view.plan, held, self._rng)
            return True
        changed = held != self._router.held
        self._router.held = held
        return changed

    def pick(self, masked: frozenset[PeerId], chain: Chain = ()) -> Pipeline | str:
        """A pipeline around the masked and then, if possible, the full, too; or why there is none, in words.

        As long as nobody is masked, everybody has the turns that the plan gives them, however full they are. Where
        that costs the flows little, it is one that ran a prompt that began like this one.
        """
        if self.view is None or self._router is None:
            return (self.view.problem if self.view else "") or "The swarm has no plan yet."
        known = self._ways.find(chain)
        if known is not None and self._router.again(known, masked | self._full):
            return known
        found = self._router.pick(masked | self._full) if masked else None
        return (
            found
            or self._router.pick(masked)
            or self.view.problem
            or "No live peers cover every layer of the model right now."
        )

    def takes(self, peer: PeerId) -> tuple[str, ...]:
        """Packings of activations that a peer reads and writes."""
        return self._takes.get(peer, (RAW,))

    def ran(self, pipeline: Pipeline, chain: Chain) -> None:
        """All blocks of a chain were run there."""
        self._ways.ran(pipeline, chain)

    def give_back(self, pipeline: Pipeline) -> None:
        """A pipeline that was picked with nobody masked had no room: its turns go to whoever asks next."""
        if self._router is not None:
            self._router.give_back(pipeline)


def best_informed(records: Sequence[PeerRecord], named: PeerId | None) -> list[PeerId]:
    """Whom of these members to ask, first choices first: who is named as coordinator, then who has seen most."""
    best = max(records, key=lambda record: (record.plan, record.term, record.uptime_s, record.peer), default=None)
    first = [record.peer for record in records if record.peer == named]
    return list(dict.fromkeys((*first, best.peer) if best is not None else first))


def _merged(members: Iterable[wire.MemberView], changes: wire.View) -> tuple[wire.MemberView, ...]:
    """Members after a view that says what changed, by id."""
    rows = {row.record.peer: row for row in members if row.state != "dead"}
    for peer in changes.gone:
        rows.pop(peer, None)
    rows.update((row.record.peer, row) for row in changes.members)
    return tuple(row for _, row in sorted(rows.items()))


def _number(view: wire.View) -> tuple[int, int]:
    return (view.plan.term, view.plan.epoch) if view.plan else (0, 0)

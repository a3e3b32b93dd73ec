"""What one peer shows of the swarm to those who look: an outline of every member once, then what changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from helixnet.core.plan.plan import PEERS_MAX
from helixnet.core.route.follow import KV_HIGH_WATER
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import GetView, MemberView, View

GONE_MAX = PEERS_MAX
"""So many departures are remembered; who has not looked for longer is shown everybody again."""


class ViewsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of those who look."""

    subscribers_max: int = 256
    subscribed_s: float = 60.0
    """Who does not ask again is sent no more views after this."""


@dataclass(slots=True)
class _Subscriber:
    """Somebody who follows our views: what it was sent, and until when it wants more."""

    serial: int
    plan: tuple[int, int]
    until: float


@dataclass(slots=True)
class _Row:
    record: PeerRecord
    state: str
    shown: MemberView
    serial: int
    """At which it changed last."""


class Views:
    """Members as they were shown last, and those who follow them. Each change of a member takes the next serial.

    `head` in its calls is the view of now without members, with the plan if all of it is known.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.serial = 1
        self._config = config
        self._subscribers: dict[PeerId, _Subscriber] = {}
        self._rows: dict[PeerId, _Row] = {}
        self._gone: dict[PeerId, int] = {}
        """Who went at which serial, the oldest first."""
        self._knows_from = 0
        """Goings before this serial are forgotten."""

    def refresh(self, members: Iterable[tuple[PeerRecord, str]]) -> None:
        """These are the members now, with their states; the dead are not shown."""
        serial, missing = self.serial + 1, set(self._rows)
        for record, state in members:
            if state != "dead":
                missing.discard(record.peer)
                self._see(record, state, serial)
        for peer in sorted(missing):
            del self._rows[peer]
            self._gone[peer] = self.serial = serial
        while len(self._gone) > GONE_MAX:
            oldest = next(iter(self._gone))
            self._knows_from = self._gone.pop(oldest)

    def look(self, sender: PeerId, message: GetView, head: View, now: float) -> View:
        """What `sender` is shown who asks, and from now on if it subscribes."""
        view = self._view(head, message.since, message.plan)
        if message.subscribe and (sender in self._subscribers or len(self._subscribers) < self._config.subscribers_max):
            until = now + self._config.subscribed_s
            self._subscribers[sender] = _Subscriber(view.serial, _shown_plan(head, message.plan), until)
        return view

    def news(self, head: View) -> list[tuple[PeerId, View]]:
        """What each subscriber is shown now; equal views are one object."""
        made: dict[tuple[int, tuple[int, int]], View] = {}
        told = []
        for peer, one in sorted(self._subscribers.items(), key=lambda item: (item[1].serial, item[1].plan, item[0])):
            known = one.serial, one.plan
            if known not in made:
                made[known] = self._view(head, *known)
            told.append((peer, made[known]))
            one.serial, one.plan = self.serial, _shown_plan(head, one.plan)
        return told

    @property
    def are_followed(self) -> bool:
        """Whether anybody subscribed who may still follow."""
        return bool(self._subscribers)

    def has_subscribers(self, now: float) -> bool:
        """Whether anybody still follows; those who did not ask again no longer do."""
        self._subscribers = {peer: one for peer, one in self._subscribers.items() if one.until > now}
        return bool(self._subscribers)

    def forget(self, peer: PeerId) -> None:
        """Nobody is there to look."""
        self._subscribers.pop(peer, None)

    def _view(self, head: View, since: int, plan: tuple[int, int]) -> View:
        """What changed after the view of a serial, or everything; the plan only for whoever has another."""
        serial, rows, gone = self.since(since)
        has_it = head.plan is None or head.plan.number == plan
        return msgspec.structs.replace(
            head, members=rows, gone=gone, serial=self.serial, since=serial, plan=None if has_it else head.plan
        )

    def _see(self, record: PeerRecord, state: str, serial: int) -> None:
        row = self._rows.get(record.peer)
        if row is not None and row.record is record and row.state == state:
            return
        shown = MemberView(record=outline(record), state=state)
        if row is not None and row.shown == shown:
            row.record = record
            return
        self._rows[record.peer] = _Row(record, state, shown, serial)
        self._gone.pop(record.peer, None)
        self.serial = serial

    def since(self, serial: int) -> tuple[int, tuple[MemberView, ...], tuple[PeerId, ...]]:
        """The serial from which a view can go on (0: from nothing), the rows that changed since, and who is gone."""
        if not self._knows_from <= serial <= self.serial:
            serial = 0
        rows = tuple(row.shown for _, row in sorted(self._rows.items()) if row.serial > serial)
        gone = sorted(peer for peer, went in self._gone.items() if went > serial) if serial else []
        return serial, rows, tuple(gone)


def _shown_plan(head: View, before: tuple[int, int]) -> tuple[int, int]:
    """The number of the plan that somebody has who was shown this."""
    return head.plan.number if head.plan is not None else before


def outline(record: PeerRecord) -> PeerRecord:
    """What routing takes of a record: where its owner is, what it holds, and whether it is full."""
    return PeerRecord(
        peer=record.peer,
        name=record.name,
        addresses=record.addresses,
        model="",
        manifest_hash="",
        state=record.state,
        held=record.held,
        takes=record.takes,
        kv_free=1.0 if record.kv_free >= KV_HIGH_WATER else 0.0,
    )

"""What must hold after every event (design, section 7); the first that does not ends the simulation."""

from __future__ import annotations

from typing import NoReturn

from helixnet.core.peer import Peer
from helixnet.core.types import PeerId


class InvariantBroken(AssertionError):
    """Our bug: the message says what does not hold, and the simulation's seed brings it back."""


def broken(what: str) -> NoReturn:
    """Something that must hold does not.

    Raises:
        InvariantBroken: always.
    """
    raise InvariantBroken(what)


class PeerWatch:
    """What is remembered of one peer to see that it never goes back."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._number = (0, 0)
        self._used = 0
        self._sessions = 0
        self._plan = peer.follower.plan

    def check(self) -> None:
        """After an event at this peer.

        Raises:
            InvariantBroken: pages are over-committed or leaked, or a plan was followed by an older one.
        """
        stage, plan = self._peer.stage, self._peer.follower.plan
        pool = stage.ledger
        if pool.used == self._used and len(stage.sessions) == self._sessions and plan is self._plan:
            return  # what is checked has not changed since it was
        if pool.cached and pool.used + pool.cached > pool.capacity:
            broken(f"{self._peer.me}: {pool.cached} KV pages are cached beside {pool.used} of {pool.capacity}")
        if pool.used > pool.capacity and pool.used > self._used:
            broken(f"{self._peer.me}: {pool.used} KV pages are reserved of {pool.capacity}")
        if (pool.used > 0) != bool(stage.sessions):
            broken(f"{self._peer.me}: {pool.used} KV pages for {len(stage.sessions)} sessions")
        self._used, self._sessions, self._plan = pool.used, len(stage.sessions), plan
        number = self._peer.follower.number
        if number < self._number:
            broken(f"{self._peer.me} followed plan {self._number} and now {number}")
        self._number = number


def check_at_rest(name: PeerId, peer: Peer, sessions: int, blocks: int) -> None:
    """When no request is left: no peer has anything of one but what is cached, and its device has that and no more.

    Raises:
        InvariantBroken: a session, a KV page or a block has stayed behind.
    """
    stage = peer.stage
    if stage.sessions or peer.entry.sessions or stage.ledger.used or sessions:
        left = f"{len(stage.sessions)} sessions, {stage.ledger.used} KV pages, {sessions} sessions on its device"
        broken(f"{name} still has {left} although no request runs")
    if blocks != stage.ledger.blocks:
        broken(f"{name} counts {stage.ledger.blocks} blocks where its device has {blocks}")

"""Keeps this peer's links measured: each neighbour once soon after it appears, seldom afterwards, and passively."""

from __future__ import annotations

import asyncio
import random
import secrets
import time

from helixnet.core.peer import Peer
from helixnet.core.swarm.records import LINKS_MAX
from helixnet.core.types import PeerId
from helixnet.core.wire import messages as wire
from helixnet.net.base import Host
from helixnet.net.probe import Post, Prober

LOOK_S = 1.0
REMEASURE_S = (15.0, 60.0, 300.0)
"""Pauses between the measurements of one link: a peer that has just started is busy with itself."""
OBSERVE_S = 5.0


class LinkKeeper:
    """Owns the prober of one peer and writes what it finds into the peer's record."""

    def __init__(self, peer: Peer, host: Host) -> None:
        self._peer = peer
        self._host = host
        self._prober = Prober(random.Random(secrets.randbits(64)))
        self._due_at: dict[PeerId, tuple[float, int]] = {}
        """When each neighbour is to be measured, and how often it was."""

    def take(self, sender: PeerId, message: wire.Message, body: memoryview) -> bool:
        """Handle a probe message; False if it is none, or the machine's own (pings, and the entry's pongs)."""
        if isinstance(message, wire.Ping) or (isinstance(message, wire.Pong) and message.nonce == 0):
            return False
        posts = self._prober.receive(sender, message, body, time.monotonic())
        self._post(posts or [])
        return posts is not None

    async def run(self) -> None:
        """Look around until cancelled."""
        observed_at = time.monotonic()
        while True:
            now = time.monotonic()
            self._choose(now)
            self._post(self._prober.tick(now))
            if now - observed_at >= OBSERVE_S:
                self._prober.observe(self._host.traffic(), now)
                observed_at = now
            links = self._prober.links()
            self._peer.links = tuple(links[target] for target in sorted(links)[:LINKS_MAX])
            await asyncio.sleep(LOOK_S)

    def _choose(self, now: float) -> None:
        """Measure neighbours that are new or were measured long ago; forget those that are gone."""
        live = [member.record.peer for member in self._peer.membership.live()]
        for peer in sorted(self._due_at.keys() - set(live)):
            del self._due_at[peer]
            self._post(self._prober.forget(peer, now))
        for peer in live[:LINKS_MAX]:
            due_at, count = self._due_at.get(peer, (now, 0))
            if now >= due_at:
                self._due_at[peer] = (now + REMEASURE_S[min(count, len(REMEASURE_S) - 1)], count + 1)
                self._post(self._prober.measure(peer, now))

    def _post(self, posts: list[Post]) -> None:
        for post in posts:
            self._host.post(post.to, post.message, post.body, post.lane)

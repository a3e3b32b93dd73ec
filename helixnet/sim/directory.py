"""The DHT of a simulated swarm: what it keeps, and what it costs to ask it.

The costs are those of hivemind's DHT as `net.directory` uses it. A lookup asks, one after the other, the LOOKUP_PEERS
peers nearest to the key, and each answers with as many contacts. A write goes to the REPLICAS nearest of them. A read
wants the latest records, so every replica sends all it has under the key. Bytes are counted, not carried: the links of
the simulation are not slowed by them.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Collection

from helixnet.core.machine import Publish
from helixnet.core.swarm.records import RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId
from helixnet.sim.engine import Engine

LOOKUP_PEERS = 20
"""hivemind's bucket and beam."""
REPLICAS = 5
REQUEST_BYTES = 120
"""A key, who asks, and what frames it; about the same for an answer without contacts."""
CONTACT_BYTES = 62
"""Node id, peer id, and their lengths."""
RECORD_BYTES = 142
"""Of a record beside its value: signature, expiry, and the peer id as its name."""
LOOKUP, READ, WRITE = "directory lookup", "directory read", "directory write"

Count = Callable[[str, int, PeerId, PeerId], None]
"""Told of so many bytes of a kind from one to another."""


class Directory:
    """Records by key and owner. `present` are the peers that keep it; `count` hears what it costs."""

    def __init__(self, engine: Engine, present: Collection[PeerId], count: Count) -> None:
        self._engine = engine
        self._present = present
        self._count = count
        self._records: dict[str, dict[PeerId, tuple[float, int, bytes]]] = {}
        self._places: dict[str, dict[PeerId, bytes]] = {}
        self._nearest: dict[str, tuple[int, list[PeerId]]] = {}
        self._version = 0

    def changed(self) -> None:
        """Somebody came or went."""
        self._version += 1

    def publish(self, owner: PeerId, effect: Publish, value_bytes: int) -> bool:
        """Keep a record, whose value would really take so many bytes. Returns whether there was room."""
        size = value_bytes + RECORD_BYTES
        for keeper in self._look_up(owner, effect.key)[:REPLICAS]:
            self._count(WRITE, size, owner, keeper)
        alive = self._alive(effect.key)
        if owner not in alive and len(alive) >= RECORDS_PER_KEY_MAX:
            return False
        alive[owner] = (self._engine.now + effect.lifetime_s, size, effect.value)
        return True

    def read(self, key: str, reader: PeerId) -> dict[PeerId, bytes]:
        """What is kept under a key, by owner."""
        alive = self._alive(key)
        size = sum(size for _, size, _ in alive.values())
        for keeper in self._look_up(reader, key)[:REPLICAS]:
            self._count(READ, size, keeper, reader)
        return {owner: value for owner, (_, _, value) in sorted(alive.items())}

    def _alive(self, key: str) -> dict[PeerId, tuple[float, int, bytes]]:
        now, known = self._engine.now, self._records.setdefault(key, {})
        for owner in [owner for owner, (expires, _, _) in known.items() if expires <= now]:
            del known[owner]
        return known

    def _look_up(self, asker: PeerId, key: str) -> list[PeerId]:
        """The peers nearest to the key, nearest first; the asker itself costs nothing."""
        found = [peer for peer in self._near(key) if peer != asker]
        for peer in found:
            self._count(LOOKUP, REQUEST_BYTES, asker, peer)
            self._count(LOOKUP, REQUEST_BYTES + CONTACT_BYTES * len(found), peer, asker)
        return found

    def _near(self, key: str) -> list[PeerId]:
        version, near = self._nearest.get(key, (-1, []))
        if version != self._version:
            known = self._places.get(key, {})
            places = self._places[key] = {peer: known.get(peer) or _place(key, peer) for peer in self._present}
            near = heapq.nsmallest(LOOKUP_PEERS, places, key=lambda peer: (places[peer], peer))
            self._nearest[key] = self._version, near
        return near


def _place(key: str, peer: PeerId) -> bytes:
    """How far a peer is from a key: as good as random, and always the same."""
    return hashlib.blake2b(f"{key} {peer}".encode(), digest_size=8).digest()

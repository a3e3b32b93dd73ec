"""The simulated DHT forgets, has the real one's bounds, and says what it costs."""

from __future__ import annotations

from collections import Counter

import pytest

from helixnet.core.machine import Publish
from helixnet.core.swarm.records import RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId
from helixnet.sim.directory import (
    CONTACT_BYTES,
    LOOKUP,
    LOOKUP_PEERS,
    READ,
    RECORD_BYTES,
    REPLICAS,
    REQUEST_BYTES,
    WRITE,
    Directory,
)
from helixnet.sim.engine import Engine
from helixnet.sim.simulation import Simulation
from tests.sim.small_simulation import small_setup

VALUE = b"x" * 100


class Told:
    """A directory that many peers keep, and what it cost them."""

    def __init__(self, peers: int) -> None:
        self.engine = Engine(0)
        self.peers = [PeerId(f"p{n:03d}") for n in range(peers)]
        self.kinds: Counter[str] = Counter()
        self.sent: Counter[PeerId] = Counter()
        self.directory = Directory(self.engine, self.peers, self._count)

    def _count(self, kind: str, size: int, sender: PeerId, to: PeerId) -> None:
        self.kinds[kind] += size
        self.sent[sender] += size

    def publish(self, owner: str, lifetime_s: float = 60.0) -> bool:
        return self.directory.publish(PeerId(owner), Publish("key", VALUE, lifetime_s), len(VALUE))

    def read(self) -> dict[PeerId, bytes]:
        return self.directory.read("key", PeerId("reader"))


def test_records_are_kept_until_they_expire() -> None:
    told = Told(3)
    assert told.publish("a", 10.0) and told.publish("b", 30.0)
    assert told.read() == {"a": VALUE, "b": VALUE}
    told.engine.run(10.0)
    assert told.read() == {"b": VALUE}


def test_a_full_key_takes_nobody_new_until_somebody_expires() -> None:
    told = Told(3)
    assert all(told.publish(f"o{n}", 10.0 + n) for n in range(RECORDS_PER_KEY_MAX))
    assert not told.publish("late"), "the key is full"
    assert told.publish("o5", 60.0), "what is there can be renewed"
    told.engine.run(10.0)
    assert told.publish("late")
    assert len(told.read()) == RECORDS_PER_KEY_MAX


@pytest.mark.parametrize(
    ("peers", "asked", "keepers"), [(200, LOOKUP_PEERS, REPLICAS), (3, 3, 3)], ids=["large", "small"]
)
def test_a_lookup_asks_the_nearest_and_a_read_brings_every_replica(peers: int, asked: int, keepers: int) -> None:
    told = Told(peers)
    record = len(VALUE) + RECORD_BYTES
    lookup = asked * (2 * REQUEST_BYTES + CONTACT_BYTES * asked)
    for owner in ("a", "b"):
        told.publish(owner)
    assert told.kinds == {LOOKUP: 2 * lookup, WRITE: 2 * keepers * record}
    told.read()
    assert told.kinds == {LOOKUP: 3 * lookup, WRITE: 2 * keepers * record, READ: keepers * 2 * record}


def test_the_same_few_peers_answer_for_a_key() -> None:
    told = Told(200)
    told.publish("a")
    for _ in range(10):
        told.read()
    large = [peer for peer in told.peers if told.sent[peer] > 10 * (len(VALUE) + RECORD_BYTES)]
    assert len(large) >= REPLICAS
    assert len([peer for peer in told.peers if told.sent[peer]]) == LOOKUP_PEERS


def test_whoever_joins_next_to_a_key_keeps_it_too() -> None:
    told = Told(5)
    told.publish("a")
    told.peers.extend(PeerId(f"q{n}") for n in range(100))
    told.directory.changed()
    told.sent.clear()
    told.read()
    assert any(peer.startswith("q") for peer in told.sent)


def test_all_control_traffic_is_counted_by_kind_and_by_peer() -> None:
    simulation = Simulation(small_setup(seconds=10.0))
    simulation.run()
    traffic = simulation.swarm.traffic
    assert sum(traffic.sent.values()) == sum(traffic.kinds.values())
    assert {"Announce", "Lease", LOOKUP, READ, WRITE} <= traffic.kinds.keys()
    assert traffic.coordinator_received["Announce"] == traffic.kinds["Announce"]
    assert traffic.coordinator_sent["Lease"] == traffic.kinds["Lease"]

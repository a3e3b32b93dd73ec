"""Links under virtual time: what latency, bandwidth, lanes, cuts and loss do to frames."""

from __future__ import annotations

import pytest

from helixnet.core.types import PeerId
from helixnet.core.wire.codec import CHUNK_BYTES_MAX, Lane
from helixnet.core.wire.messages import Ping
from helixnet.sim.engine import Engine
from helixnet.sim.network import Frame, Network, Path

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
LATENCY_S, BANDWIDTH = 0.01, 1e6


class World:
    """Three peers; with `uplink` all that one sends shares a line."""

    def __init__(self, uplink: bool = False, loss: float = 0.0) -> None:
        self.uplink, self.loss = uplink, loss

    def path(self, source: PeerId, target: PeerId) -> Path:
        return Path(LATENCY_S, BANDWIDTH, source if self.uplink else (source, target), self.loss)


class Links:
    def __init__(self, world: World | None = None) -> None:
        self.engine = Engine(0)
        self.arrived: list[tuple[float, str]] = []
        self.network = Network(self.engine, world or World(), self._take)
        self.names: dict[int, str] = {}

    def send(self, name: str, size: int, lane: Lane, target: PeerId = B) -> None:
        self.names[len(self.names)] = name
        self.network.send(A, target, size, lane, (Ping(nonce=len(self.names) - 1), b""))

    def _take(self, source: PeerId, target: PeerId, frame: Frame) -> None:
        assert isinstance(frame[0], Ping)
        self.arrived.append((self.engine.now, self.names[frame[0].nonce]))

    def run(self) -> dict[str, float]:
        self.engine.run(1_000.0)
        return {name: at for at, name in self.arrived}


def test_a_frame_takes_its_bytes_and_the_way() -> None:
    links = Links()
    links.send("x", 1_000, Lane.TOKEN)
    assert links.run()["x"] == pytest.approx(1_000 / BANDWIDTH + LATENCY_S)


def test_frames_of_one_lane_queue_and_keep_their_order() -> None:
    links = Links()
    for name in "xyz":
        links.send(name, 500_000, Lane.PREFILL)
    at = links.run()
    assert [at[name] for name in "xyz"] == pytest.approx([n * 0.5 + LATENCY_S for n in (1, 2, 3)])


def test_a_token_waits_for_one_chunk_of_bulk_at_most_and_pushes_it_back() -> None:
    links = Links()
    links.send("bulk", 10_000_000, Lane.PREFILL)
    links.engine.run(1.0)
    links.send("token", 100_000, Lane.TOKEN)
    at = links.run()
    assert at["token"] <= 1.0 + (CHUNK_BYTES_MAX + 100_000) / BANDWIDTH + LATENCY_S
    assert at["bulk"] == pytest.approx(10.1 + LATENCY_S)


def test_an_uplink_is_shared_by_all_that_a_peer_sends() -> None:
    shared, own = Links(World(uplink=True)), Links()
    for links in (shared, own):
        links.send("b", 1_000_000, Lane.PREFILL, B)
        links.send("c", 1_000_000, Lane.PREFILL, C)
    assert shared.run()["c"] == pytest.approx(2.0 + LATENCY_S)
    assert own.run()["c"] == pytest.approx(1.0 + LATENCY_S)


def test_nothing_crosses_a_cut_even_if_it_was_under_way() -> None:
    links = Links()
    links.send("under way", 10, Lane.TOKEN)
    links.network.cut(A, B)
    links.send("later", 10, Lane.TOKEN)
    links.engine.run(1.0)
    links.network.mend(A, B)
    links.send("mended", 10, Lane.TOKEN)
    assert list(links.run()) == ["mended"]


def test_a_lost_packet_holds_up_what_comes_after_it() -> None:
    links = Links(World(loss=0.3))
    for number in range(50):
        links.send(str(number), 100, Lane.TOKEN)
    links.run()
    assert [name for _, name in links.arrived] == [str(number) for number in range(50)]
    assert links.arrived[-1][0] > 0.2, "some packet was sent again"


def test_a_thin_link_is_slower_until_it_recovers() -> None:
    links = Links()
    links.network.slow(A, B, 0.1)
    links.send("thin", 100_000, Lane.TOKEN)
    links.engine.run(5.0)
    links.network.slow(A, B, 1.0)
    links.send("wide", 100_000, Lane.TOKEN)
    at = links.run()
    assert at["thin"] == pytest.approx(1.0 + LATENCY_S) and at["wide"] == pytest.approx(5.1 + LATENCY_S)

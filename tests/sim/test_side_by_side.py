"""Our protocol on the paper's machines: routed by the flows given, within the KV room given, nothing lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from helixnet.core.types import PeerId
from helixnet.sim.comparison import Comparison
from helixnet.sim.side_by_side import Served, Serving, name_of, our_setup, serve
from helixnet.sim.simulation import Load, Setup, Simulation
from helixnet.sim.workload import Recorded
from tests.sim.tiny_paper import LENGTHS, SQUARE, STAGES, artifact, instance

SECONDS = 20.0


def a_setup(folder: Path, in_flight: int = 4, serving: Serving | None = None) -> Setup:
    load = Load(lengths=Recorded(LENGTHS), in_flight=in_flight, clients=2)
    return our_setup(instance(folder), STAGES, SQUARE, load, SECONDS, serving)


def test_requests_follow_the_flows_of_the_plan(tmp_path: Path) -> None:
    simulation = Simulation(a_setup(tmp_path))
    entries: Counter[PeerId] = Counter()
    simulation.swarm.on_event = lambda now, peer, event: None
    tally = simulation.run()
    for name, one in simulation.swarm.peers.items():
        entries[name] = one.peer.stage.meter.total
    first, second = entries[name_of(0)], entries[name_of(1)]
    assert tally.lost == 0 and len(tally.requests) > 20
    assert first / (first + second) == pytest.approx(0.75, abs=0.05), "30 of 40 tokens/s"


def test_no_more_is_in_flight_than_kv_has_room_for(tmp_path: Path) -> None:
    served = serve(a_setup(tmp_path, in_flight=30), warm_s=4.0)
    assert served.lost == 0 and served.retries > 0, "those who find it full wait"


def test_prompts_in_pieces_change_when_things_happen_not_what_is_said(tmp_path: Path) -> None:
    pieces, whole = (serve(a_setup(tmp_path, serving=Serving(chunked=chunked)), 4.0) for chunked in (True, False))
    assert pieces.lost == whole.lost == 0 and pieces.finished > 0 < whole.finished


def test_windows_last_as_many_lives_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Setup, float]] = []

    def watched(setup: Setup, warm_s: float) -> Served:
        asked.append((setup, warm_s))
        return serve(setup, warm_s)

    monkeypatch.setattr("helixnet.sim.comparison.serve", watched)
    served = Comparison(artifact(tmp_path), "square", "tiny", 3.0, 0).in_our_way(STAGES)
    ((setup, warm_s),) = asked
    assert setup.seconds == pytest.approx(4 * warm_s) and served.seconds == pytest.approx(3 * warm_s, rel=0.01)
    life_s = served.ttft_s + sum(output for _, output in LENGTHS) / len(LENGTHS) * served.tpot_s
    assert warm_s == pytest.approx(life_s, rel=0.4), "as long as predicted"

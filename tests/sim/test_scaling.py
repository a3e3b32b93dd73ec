"""A swarm that comes and goes, measured at several sizes, and the document that is made of it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from helixnet.sim.report import ControlUse
from helixnet.sim.scaling import Scaled, of_size, scaled
from helixnet.sim.scenarios import CONVERSATION
from helixnet.sim.solving import first_fit
from helixnet.sim.workload import Fixed

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate_scale"


def a_size(peers: int, **changes: object) -> Scaled:
    """Figures as a run gives them, without the run."""
    size = Scaled(
        peers=peers,
        seconds=120.0,
        joined=2,
        left=2,
        asked=10,
        lost=0,
        tokens_wrong=0,
        retries=1,
        tokens_per_s=20.0,
        goodput_per_s=0.1,
        good=0.9,
        ttft=None,
        tpot=None,
        plans_per_hour=60.0,
        layers_loaded_per_peer_hour=8.0,
        coordinators=1,
        control_per_peer=100.0 * peers,
        coordinator_sent=300.0,
        coordinator_received=400.0,
        control=(
            ControlUse(
                kind="Beat", bytes_per_s=100.0 * peers, coordinator_sent_per_s=1.0, coordinator_received_per_s=1.0
            ),
        ),
        ended_per_minute=(3, 6),
        good_per_minute=(3, 4),
        failovers_at_s=(61.0,),
        events=1_000,
        wall_s=2.0,
        digest="",
    )
    return msgspec.structs.replace(size, **changes)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    loader = importlib.machinery.SourceFileLoader("simulate_scale", str(SCRIPT))
    spec = importlib.util.spec_from_loader("simulate_scale", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_only_the_measured_part_of_the_document_is_written_anew(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "docs" / "scaling.md"
    document.parent.mkdir()
    document.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n")
    for name, value in (
        ("ROOT", tmp_path),
        ("DOCUMENT", document),
        ("PICTURES", document.parent / "scaling"),
    ):
        monkeypatch.setattr(script, name, value)
    for _ in range(2):
        script.write([a_size(10), a_size(100)], 0.5, 3)
    text = document.read_text()
    assert text.startswith(f"before\n\n{script.BEGIN}") and text.endswith(f"{script.END}\n\nafter\n")
    assert "old" not in text and text.count("10 peers") == 2 and "--hours 0.5 --seed 3" in text
    assert sorted(path.name for path in (document.parent / "scaling").iterdir()) == ["goodput.svg", "growth.svg"]


def test_a_lost_request_or_a_wrong_token_is_not_sound() -> None:
    assert a_size(10).is_sound
    assert not a_size(10, lost=1).is_sound and not a_size(10, tokens_wrong=1).is_sound


@pytest.mark.parametrize("text", ["", "3", "10,x", "20000", ",".join(["10"] * 9)])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(script: ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="numbers from 4 to 10000"):
        script.sizes_of(text)


@pytest.mark.slow
def test_peers_that_come_and_go_lose_nothing() -> None:
    setup = of_size(10, 900.0, seed=1)
    load = replace(setup.load, lengths=Fixed(400, 100))  # ten such machines have no room for the longest conversations
    size = scaled(replace(setup, load=load, solving=first_fit(CONVERSATION)))
    assert size.is_sound and size.asked > 10
    assert size.left > 0 and size.joined > 0 and size.plans_per_hour > 0
    assert size.control_per_peer > 0 and size.coordinator_received > 0
    assert len(size.good_per_minute) == len(size.ended_per_minute) == 15
    assert sum(size.good_per_minute) <= sum(size.ended_per_minute) <= size.asked

"""The paper's published figures, from its own data: paper mode comes within 15 % of each, with Helix ahead of Swarm."""

from __future__ import annotations

import pytest

from helixnet.planner.artifact import Artifact
from helixnet.sim.paper.published import CALIBRATION, FURTHER, SEED, Figure, setups
from helixnet.sim.paper.run import simulate
from tests.planner.small_artifact import FOLDER, needs_data

WITHIN = 0.15


def served(figure: Figure) -> float:
    """Decode tokens/s of ours."""
    return sum(simulate(setup, SEED).decode_tokens_per_s for setup in setups(Artifact(FOLDER), figure))


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", CALIBRATION, ids=lambda pair: pair[0].title)
def test_offline_throughput_is_the_published_one(pair: tuple[Figure, Figure]) -> None:
    helix, swarm = map(served, pair)
    assert helix == pytest.approx(pair[0].decode_tokens_per_s, rel=WITHIN)
    assert swarm == pytest.approx(pair[1].decode_tokens_per_s, rel=WITHIN)
    assert helix > swarm


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_online_latencies_are_the_published_ones() -> None:
    figure = next(each for each in FURTHER if each.title == "3cluster24 70B Helix online")
    assert figure.latency is not None
    (setup,) = setups(Artifact(FOLDER), figure)
    outcome = simulate(setup, SEED)
    assert outcome.prompt_s.at(50) == pytest.approx(figure.latency.prompt_p50, rel=WITHIN)
    assert outcome.prompt_s.at(95) == pytest.approx(figure.latency.prompt_p95, rel=WITHIN)
    assert outcome.decode_s.at(50) == pytest.approx(figure.latency.decode_p50, rel=WITHIN)
    assert outcome.decode_s.at(95) == pytest.approx(figure.latency.decode_p95, rel=WITHIN)


@needs_data
def test_every_published_run_can_be_set_up() -> None:
    artifact = Artifact(FOLDER)
    for figure in (*(each for pair in CALIBRATION for each in pair), *FURTHER):
        assert len(setups(artifact, figure)) == len(figure.runs)

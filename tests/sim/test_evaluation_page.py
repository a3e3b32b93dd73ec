"""The evaluation's sections on a made-up instance: what is simulated, what is judged of it, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixnet.core.errors import UsageError
from helixnet.sim.evaluation import calibration, like_for_like, ours, predictions, shares
from helixnet.sim.evaluation.calibration import Published, PublishedRow
from helixnet.sim.evaluation.cells import Cell, Ended, Folder, Row
from helixnet.sim.evaluation.chapters import ablation, like_for_likes
from helixnet.sim.evaluation.like_for_like import LikeForLike
from helixnet.sim.evaluation.ours import Way
from helixnet.sim.evaluation.page import Origin, chapter, write
from helixnet.sim.evaluation.sections import SECTIONS
from helixnet.sim.evaluation.shares import SharesRow
from helixnet.sim.prediction_check import Check
from helixnet.sim.side_by_side import Served
from tests.planner.small_artifact import stored
from tests.planner.small_artifact import write as write_artifact
from tests.sim import tiny_paper

ORIGIN = Origin("the command", "c0ffee", "a machine", quick=False)
BY_HAND = 1_500
"""KV tokens: far more than what the profile says."""


def folder(path: Path) -> Folder:
    """The square with a placement of all machines, and one of two separate pairs, with the KV room set by hand."""
    made = tiny_paper.files()
    pairs = {2: ["BIG", 0, 3, 30.0], 3: ["BIG", 0, 3, 10.0], 4: ["BIG", 3, 6, 25.0], 5: ["BIG", 3, 6, 15.0]}
    rows: list[dict[str, Any]] = [
        stored("helix-milp", pairs),
        stored("separate/big", {2: ["BIG", 0, 3, 30.0], 3: ["BIG", 3, 6, 30.0]}) | {"min_kv_tokens": BY_HAND},
    ]
    made["placements.json"] = {"placements": [row | {"cluster": "square"} for row in rows]}
    write_artifact(path, made)
    return Folder(str(path))


def cell(method: str, router: str = "iwrr", online: float = 0.0) -> LikeForLike:
    return LikeForLike(
        instance="square", model="tiny", method=method, router=router, online_tokens_per_s=online, lives=30.0
    )


def ended(cell: Cell, row: Row | None, problem: str = "") -> Ended:
    return Ended(cell=cell, row=row, problem=problem, seconds=3600.0)


def ours_row(tokens_per_s: float, ttft_s: float = 1.0, tpot_s: float = 1.0, lost: int = 0) -> Served:
    return Served(
        decode_tokens_per_s=tokens_per_s,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        stages=2.0,
        in_flight=9,
        finished=100,
        lost=lost,
        retries=0,
        seconds=60.0,
        events=1,
    )


def shares_row(served: float, run: float) -> SharesRow:
    return SharesRow(
        peers=2,
        limits="compute of a",
        flow=100.0,
        served=served,
        in_flight=9,
        requests=100,
        lost=0,
        retries=0,
        planned={"a": 0.5, "b": 0.5},
        run={"a": run, "b": 1 - run},
        busy={"a": 1.0, "b": 1.0},
        events=1,
    )


def prediction_row(simulated: float) -> Check:
    return Check(
        seed=0, peers=9, bottleneck="KV", tokens_per_s=(100.0, simulated), ttft_s=(1.0, 1.0), tpot_s=(0.1, 0.1)
    )


# --- like for like -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "router"),
    [("ours", "iwrr"), ("helix-milp", "iwrr"), ("helix-milp", "shortest_queue"), ("separate", "random")],
)
def test_every_method_is_served_and_nobody_is_turned_away(tmp_path: Path, method: str, router: str) -> None:
    row = cell(method, router).run(folder(tmp_path))
    assert row.finished > 20 and row.decode_tokens_per_s > 0 and row.impossible == 0
    assert row.lives >= 0.5 * 30.0 and not row.overloaded


def test_all_methods_get_the_same_arrivals_and_too_many_of_them_are_told(tmp_path: Path) -> None:
    data = folder(tmp_path)
    easy, hard = (cell("helix-milp", online=rate).run(data) for rate in (20.0, 4_000.0))
    assert not easy.overloaded and easy.waiting <= 2
    assert hard.overloaded and hard.ttft_s > easy.ttft_s


def test_pipelines_by_type_are_one_swarm_with_the_room_that_was_set_by_hand(tmp_path: Path) -> None:
    data = folder(tmp_path)
    wide, narrow = (cell(method).run(data) for method in ("helix-milp", "separate"))
    assert narrow.in_flight > 1.5 * wide.in_flight, "on half of the machines"


def test_what_nobody_stored_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no placement of square with tiny for petals"):
        cell("petals").run(folder(tmp_path))


def test_words_about_who_is_ahead_come_from_the_rows(tmp_path: Path) -> None:
    row = cell("helix-milp").run(folder(tmp_path))
    twice = msgspec.structs.replace(row, decode_tokens_per_s=2 * row.decode_tokens_per_s, overloaded=True)
    words = like_for_likes(
        [ended(cell("ours"), twice), ended(cell("helix-milp"), row), ended(cell("ours", "swarm"), row)]
    )
    assert "our placement serves 2.00 x that of Helix" in words
    assert "On our placement IWRR serves 2.00 x that of the best other router, Swarm's" in words
    assert f"{twice.decode_tokens_per_s:.1f}\\*" in words
    words = like_for_likes([ended(cell("ours"), row), ended(cell("helix-milp"), twice)])
    assert "our placement serves 0.50 x that of Helix" in words


# --- targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "met"),
    [
        pytest.param(ours_row(200.0), True, id="twice"),
        pytest.param(ours_row(199.0), False, id="too-little"),
        pytest.param(ours_row(300.0, ttft_s=1.1), False, id="first-token-later"),
        pytest.param(ours_row(300.0, tpot_s=1.1), False, id="tokens-slower"),
        pytest.param(ours_row(300.0, lost=1), False, id="one-lost"),
    ],
)
def test_ours_has_to_be_twice_as_fast_at_no_cost(last: Served, met: bool) -> None:
    rows = {ours.THEIRS: ours_row(100.0), ours.OURS: last}
    cells = [
        ended(Way(instance=instance, way=way, lives=1.0), row)
        for instance in ours.INSTANCES
        for way, row in rows.items()
    ]
    assert [target.met for target in ours.targets(cells)] == [met] * 3
    assert not any(target.met for target in ours.targets(cells[:1])), "nothing found is nothing met"


def test_the_parts_of_ours_multiply_to_the_whole() -> None:
    rates = {ours.THEIRS: 100.0, ours.RING: 150.0, ours.CHUNKS: 180.0, ours.OURS: 270.0, ours.RANDOM: 135.0}
    cells = [ended(Way(instance="single24", way=way, lives=1.0), ours_row(rate)) for way, rate in rates.items()]
    words = ablation(cells)
    assert "protocol 1.50 x, chunked prompts 1.20 x and our placement 1.50 x; together 2.70 x" in words
    assert "Without IWRR's shares ours serves 0.50 x" in words


def test_shares_and_predictions_are_judged_cluster_by_cluster() -> None:
    good, bad = shares_row(95.0, 0.51), shares_row(85.0, 0.53)
    clusters = [ended(shares.Cluster(seed=seed), row) for seed, row in enumerate((good, bad))]
    assert [target.met for target in shares.targets(clusters[:1])] == [True, True]
    assert [target.met for target in shares.targets(clusters)] == [False, False]
    swarms = [ended(predictions.Cluster(seed=n), prediction_row(rate)) for n, rate in enumerate((110.0, 120.0))]
    assert [target.met for target in predictions.targets(swarms)] == [False, True, True]
    assert "1 of 2" in predictions.targets(swarms)[0].found
    assert not any(target.met for target in predictions.targets([ended(predictions.Cluster(seed=0), None, "why")]))


def test_calibration_asks_for_every_figure_and_for_helix_ahead() -> None:
    def row(figure: str, factor: float) -> PublishedRow:
        said = calibration.FIGURES[figure].decode_tokens_per_s
        rest = {"latency_published": (), "latency_ours": (), "finished": 1, "launched": 1, "waited": 0, "events": 1}
        return msgspec.convert({"published": said, "ours": factor * said, **rest}, PublishedRow)

    cells = calibration.cells(quick=False)
    near = [ended(one, row(one.figure, 1.1)) for one in cells if isinstance(one, Published)]
    assert len(near) == 8 and all(target.met for target in calibration.targets(near))
    off = [ended(near[0].cell, row("single24 70B Helix", 1.2)), *near[1:]]
    assert [target.met for target in calibration.targets(off)].count(False) == 1
    assert not all(target.met for target in calibration.targets(near[1:]))


# --- the document ------------------------------------------------------------------------------------


def test_every_section_is_written_with_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "data").mkdir()
    row = cell("helix-milp").run(folder(tmp_path / "data"))
    results = {
        "like-for-like": [ended(cell("ours"), row), ended(cell("petals"), None, "nobody stored it")],
        "ours": [ended(Way(instance="single24", way=way, lives=1.0), ours_row(100.0)) for way in ours.WAYS],
        "shares": [ended(shares.Cluster(seed=0), shares_row(85.0, 0.53))],
        "predictions": [ended(predictions.Cluster(seed=0), prediction_row(110.0))],
    }
    written = write(tmp_path / "evaluation.md", results, ORIGIN)
    text = (tmp_path / "evaluation.md").read_text()
    for path in written[1:]:
        assert path.is_file() and f"evaluation/{path.name}" in text
    assert "3 of 6 targets are met." in text and "the command" in text and "c0ffee" in text
    assert "petals with iwrr: nobody stored it" in text
    again = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write(tmp_path / "evaluation.md", results, ORIGIN)] == again


def test_a_section_without_any_row_says_why() -> None:
    words = chapter("ours", [ended(Way(instance="single24", way="ours", lives=1.0), None, "there is no room")])
    assert "there is no room" in words


def test_quick_looks_are_parts_of_the_whole_and_name_no_cell_twice() -> None:
    for section in SECTIONS.values():
        whole, quick = section.cells(False), section.cells(True)
        assert len(set(whole)) == len(whole) >= len(quick)
    assert len(like_for_like.cells(False)) == 3 * 5 * 5 * 2 + 2 * 5 * 2

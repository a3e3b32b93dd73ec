from __future__ import annotations

import pytest

from helixnet.core.types import Span
from helixnet.planner.compare import compare, table
from helixnet.planner.flow import CapacityModel
from helixnet.planner.problem import Problem, Spans, from_snapshot
from helixnet.planner.served import served
from tests.planner.small_swarms import loopback_swarm

HALVES: Spans = (Span(0, 15), Span(15, 30), None, None)
TWO_PIPELINES: Spans = (Span(0, 15), Span(15, 30), Span(0, 15), Span(15, 30))


@pytest.fixture
def problem() -> Problem:
    return from_snapshot(loopback_swarm(900, 900, 900, 900))


def test_figures_are_those_of_the_flow_and_the_forecast(problem: Problem) -> None:
    (row,) = compare(problem, {"halves": HALVES}, CapacityModel.EXACT)
    routing, outlook = served(problem, HALVES, CapacityModel.EXACT)
    assert (row.name, row.flow, row.tokens_per_s) == ("halves", routing.tokens_per_s, outlook.tokens_per_s)
    assert (row.ttft_s, row.tpot_s, row.sessions) == (outlook.ttft_s, outlook.tpot_s, outlook.sessions)


def test_a_token_makes_as_many_hops_as_it_passes_stages(problem: Problem) -> None:
    alone, halves = compare(problem, {"alone": (Span(0, 30), None, None, None), "halves": HALVES})
    assert alone.hops == pytest.approx(1)
    assert halves.hops == pytest.approx(2)


def test_only_hops_between_regions_are_crossings(problem: Problem) -> None:
    placements = {"halves": HALVES, "two": TWO_PIPELINES}
    near, _ = compare(problem, placements, regions=("east", "east", "west", "west"))
    far, both = compare(problem, placements, regions=("east", "west", "west", "east"))
    assert near.crossings == 0
    assert far.crossings == pytest.approx(1)
    assert both.crossings is not None
    assert 0 <= both.crossings <= 1


def test_rows_stay_in_order_and_what_cannot_serve_is_all_zero(problem: Problem) -> None:
    gap: Spans = (Span(0, 10), Span(15, 30), None, None)
    rows = compare(problem, {"none": None, "gap": gap, "halves": HALVES})
    assert [row.name for row in rows] == ["none", "gap", "halves"]
    assert [row.flow > 0 for row in rows] == [False, False, True]
    assert all((row.tokens_per_s, row.hops, row.sessions) == (0, 0, 0) for row in rows[:2])


def test_the_table_is_aligned_markdown_with_dashes_for_what_cannot_serve(problem: Problem) -> None:
    lines = table(compare(problem, {"separate": None, "uniform": HALVES}, regions=(0, 0, 1, 1))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [len(line.split("|")) for line in lines] == [10] * 4
    assert lines[0].split()[1] == "placement"
    assert set(lines[2].split()) == {"|", "separate", "-"}
    assert "2.0" in lines[3].split()


def test_the_table_leaves_crossings_out_where_regions_are_not_known(problem: Problem) -> None:
    assert "crossings" not in table(compare(problem, {"halves": HALVES}))

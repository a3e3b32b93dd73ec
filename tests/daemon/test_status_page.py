"""A swarm's view becomes rows, a page and JSON."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from helixnet.core.plan.plan import Assignment, Flow, Placement, Plan, Prediction
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.swarm.records import LinkMeasure, Observed, PeerRecord
from helixnet.core.types import PeerId, Span
from helixnet.core.wire.messages import MemberView, View
from helixnet.daemon.status_report import StatusReport, report
from helixnet.daemon.status_view import layer_bar, render
from helixnet.daemon.up_view import DONE, progress_of

A, B, C = PeerId("12D3KooWAAAAAA"), PeerId("12D3KooWBBBBBB"), PeerId("12D3KooWCCCCCC")
CAPABILITY = Capability(
    device="AMD EPYC, 1 thread",
    matmul_flops=94.8e9,
    memory_bandwidth=18.7e9,
    decode=(RatePoint(1, 0.0025), RatePoint(64, 0.016)),
    prefill=(RatePoint(512, 0.0625),),
    memory_bytes=400_000_000,
)


def member(peer: PeerId, name: str, held: Span, observed: tuple[Observed, ...], *links: LinkMeasure) -> MemberView:
    record = PeerRecord(
        peer=peer,
        name=name,
        addresses=(),
        model="tiny",
        manifest_hash="h",
        state="active",
        capability=CAPABILITY,
        held=(held,),
        kv_free=0.85,
        sessions=2,
        tokens_per_s=sum(o.tokens_per_s for o in observed),
        links=links,
        observed=observed,
    )
    return MemberView(record=record, state="active")


def view(*, active: bool = True, problem: str = "", second_name: str = "attic") -> View:
    """Two peers: kitchen (B) holds the first half and hands on to attic (A)."""
    prediction = Prediction(
        tokens_per_s=40.0, bound_tokens_per_s=62.5, ttft_s=0.21, tpot_s=0.05, bottleneck="compute of kitchen"
    )
    placement = Placement(
        assignments=(Assignment(A, Span(5, 10)), Assignment(B, Span(0, 6))),
        flows=(Flow(None, B, 50.0), Flow(A, None, 50.0), Flow(B, A, 50.0)),
        prediction=prediction,
    )
    plan = Plan(term=2, epoch=7, coordinator=A, manifest_hash="h", layers=10, placement=placement)
    return View(
        manifest_hash="h",
        model="tiny",
        layers=10,
        context_tokens=512,
        term=2,
        coordinator=A,
        plan=plan,
        active=active,
        members=(
            member(A, second_name, Span(5, 10), (Observed(B, 21.5),)),
            member(B, "kitchen", Span(0, 6), (Observed(None, 22.0),), LinkMeasure(A, 0.00065, 1.5e8)),
        ),
        problem=problem,
    )


def page(status: StatusReport, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(render(status))
    return out.getvalue()


def test_peers_and_flows_come_in_the_order_of_the_layers() -> None:
    status = report(view(), "main")
    assert [row.name for row in status.peers] == ["kitchen", "attic"]
    assert [(row.source, row.target) for row in status.flows] == [("clients", B), (B, A), (A, "clients")]


def test_each_edge_has_what_was_planned_and_what_was_observed() -> None:
    flows = report(view(), "main").flows
    assert [(row.planned_tokens_per_s, row.observed_tokens_per_s) for row in flows] == [
        (50.0, 22.0),
        (50.0, 21.5),
        (50.0, None),
    ]


def test_the_plan_is_compared_with_its_bound_and_with_what_clients_brought() -> None:
    plan = report(view(), "main").plan
    assert plan is not None
    assert (plan.flow_tokens_per_s, plan.share_of_bound, plan.observed_tokens_per_s) == (50.0, 0.8, 22.0)


def test_the_page_says_who_holds_what_and_how_it_flows() -> None:
    shown = page(report(view(), "main"))
    for words in (
        "tiny · network main · 2 peers · serving",
        "plan 2.7 (term.epoch), coordinator attic ★ in term 2",
        "━━━━━━····",
        "·····━━━━━",
        "0-5",
        "5-9",
        "400 MB",
        "85 %",
        "94.8 G",
        "predicted 40 tokens/s when busy, observed 22",
        "80 % of the proven bound",
        "bottleneck: compute of kitchen",
        "0.65 ms",
        "150 MB/s",
    ):
        assert words in shown, f"{words!r} is not in\n{shown}"


def test_a_swarm_that_does_not_serve_says_why() -> None:
    shown = page(report(view(active=False, problem="Layers 3-5 are uncovered; 2 GB are missing."), "main"))
    assert "not serving yet" in shown
    assert "Layers 3-5 are uncovered; 2 GB are missing." in shown


def test_an_empty_swarm_has_a_page() -> None:
    empty = msgspec.structs.replace(view(), members=(), plan=None, active=False, coordinator=None)
    assert "coordinator nobody yet" in page(report(empty, "main"))


def test_peers_of_one_name_are_told_apart() -> None:
    shown = page(report(view(second_name="kitchen"), "main"))
    assert "kitchen …AAAAAA" in shown
    assert "kitchen …BBBBBB" in shown


def test_names_of_strangers_cannot_steer_the_terminal() -> None:
    status = report(view(second_name="\x1b[2J[red]attic[/]"), "main")
    assert status.peers[1].name == "[2J[red]attic[/]"
    assert "[2J[red]attic[/]" in page(status)


def test_the_json_reads_back_as_the_same_report() -> None:
    status = report(view(), "main")
    assert msgspec.json.decode(msgspec.json.encode(status), type=StatusReport) == status


@pytest.mark.parametrize(
    ("spans", "layers", "cells", "drawn"),
    [
        pytest.param([(0, 2)], 4, 4, "━━··", id="a-cell-a-layer"),
        pytest.param([(0, 1), (3, 4)], 4, 4, "━··━", id="two-spans"),
        pytest.param([], 4, 4, "····", id="nothing"),
        pytest.param([(0, 80)], 80, 8, "━━━━━━━━", id="more-layers-than-cells"),
        pytest.param([(79, 80)], 80, 8, "·······━", id="one-of-many-is-still-seen"),
        pytest.param([(0, 1)], 1, 30, "━", id="fewer-layers-than-cells"),
    ],
)
def test_spans_are_drawn_over_the_layers(spans: list[tuple[int, int]], layers: int, cells: int, drawn: str) -> None:
    assert layer_bar(spans, layers, cells) == drawn


def test_up_tells_how_far_a_peer_is() -> None:
    row = report(view(), "main").peers[0]
    steps = [
        None,
        msgspec.structs.replace(row, device=None, planned=None, held=[]),
        msgspec.structs.replace(row, planned=None, held=[]),
        msgspec.structs.replace(row, held=[(0, 3)]),
        row,
    ]
    assert [progress_of(step) for step in steps] == [
        "starting",
        "joined, measuring",
        "measured, waiting for a plan",
        "loading layers 0-5",
        DONE,
    ]

"""A plan in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from helixnet.daemon.plan_report import Change, PeerLine, PlanReport
from helixnet.daemon.status_view import layer_bar
from helixnet.daemon.wording import amount, many, percent, rate, seconds, size, span_words
from helixnet.planner.cluster import CATALOGUE

BAR_CELLS = 40
PEER_ROWS_MAX = 200
EDGE_ROWS_MAX = 60
STEPS_MAX = 12


def render(report: PlanReport, change: Change | None) -> Group:
    """The whole page."""
    parts: list[RenderableType] = [
        Text.assemble((report.model, "bold"), f" · {many(len(report.peers), 'peer')} · objective {report.objective}"),
        _peer_table(report),
        _edge_table(report),
        "",
        *(Text(line) for line in headline(report)),
    ]
    if change is not None:
        parts += ["", *(Text(line) for line in difference(report, change))]
    if report.from_catalogue:
        parts += [Text(catalogue_note(report), "dim")]
    return Group(*parts)


def headline(report: PlanReport) -> list[str]:
    """What the plan serves and what stops it from serving more."""
    counted = "" if report.flow_per_token == 1 else ", prompt tokens included"
    bound = f"{percent(report.share_of_bound)} of the proven bound of {amount(report.bound)}"
    said = [
        f"predicted {rate(report.tokens_per_s)} when busy · first token {seconds(report.ttft_s)} after a prompt of "
        f"{report.prompt_tokens} tokens, then one every {seconds(report.tpot_s)}",
        f"flow {rate(report.flow)}{counted}, {bound}",
        f"bottleneck: {report.bottleneck}",
        f"planned in {seconds(report.seconds)}",
    ]
    if report.survives is not None:
        left = report.survives
        about = "about " if left.estimated else ""
        said.insert(3, f"worst departure: if {left.without} leaves, {about}{percent(left.share)} of the flow is left")
    return said


def difference(report: PlanReport, change: Change) -> list[str]:
    """What adding and removing peers did."""
    before = change.before
    if before is None:
        return [f"before: {change.problem}"]
    gain = report.tokens_per_s / before.tokens_per_s - 1 if before.tokens_per_s > 0 else 0.0
    return [
        f"before: {rate(before.tokens_per_s)}, now {rate(report.tokens_per_s)} ({100 * gain:+.0f} %)",
        f"first token {seconds(before.ttft_s)} -> {seconds(report.ttft_s)}, each further one "
        f"{seconds(before.tpot_s)} -> {seconds(report.tpot_s)}",
        f"if nobody moved: {rate(change.unmoved_tokens_per_s)}"
        if change.unmoved_tokens_per_s > 0
        else "if nobody moved: nothing could be served",
        *movement(change),
    ]


def movement(change: Change) -> list[str]:
    """What would be loaded and dropped, and in which order."""
    moves = change.migration
    peers = f"{many(change.moved_peers, 'peer')} would change spans"
    if not moves.moves:
        return [peers]
    loads = f"{size(moves.bytes, 'B')} of weights to load, in about {seconds(moves.seconds)}"
    said = [f"{peers}; {loads if moves.bytes else 'nothing to load'}"]
    if moves.order is None:
        return [*said, "no order of these moves keeps every layer covered on the way"]
    shown = ", then ".join(step.words() for step in moves.order[:STEPS_MAX])
    more = f"; {len(moves.order) - STEPS_MAX} more are in --json" if len(moves.order) > STEPS_MAX else ""
    return [*said, f"such that no layer is uncovered on the way: {shown}{more}"]


def catalogue_note(report: PlanReport) -> str:
    """What to think of rates that nobody measured."""
    return (
        f"≈ catalogue: the rates of {many(report.from_catalogue, 'peer')} come from data sheets, not from "
        "measurements; a real swarm measures them."
    )


def device_words(peer: PeerLine) -> str:
    """The device, with a mark if its rates are only the catalogue's."""
    return f"≈ {peer.device}" if peer.rates == CATALOGUE else peer.device


def _peer_table(report: PlanReport) -> Table:
    table = _table(
        "region", "peer", "device", "rates", "memory", f"{report.layers} layers", "holds", "tokens/s", "busy"
    )
    for column in (table.columns[4], *table.columns[7:]):
        column.justify = "right"
    for peer in report.peers[:PEER_ROWS_MAX]:
        spans = [(peer.span.start, peer.span.stop)] if peer.span else []
        table.add_row(
            escape(peer.region),
            escape(peer.name),
            escape(device_words(peer)),
            peer.rates,
            size(peer.memory_bytes, "B"),
            Text(layer_bar(spans, report.layers, BAR_CELLS), "red" if peer.limits else "green"),
            span_words(peer.span) if peer.span else "-",
            amount(peer.tokens_per_s) if peer.tokens_per_s > 0 else "-",
            (percent(peer.busy) if peer.span else "-") + (" ◀" if peer.limits else "  "),
        )
    table.caption = _left_out("◀ limits the plan; ≈ from the catalogue", len(report.peers), PEER_ROWS_MAX)
    return table


def _edge_table(report: PlanReport) -> Table:
    table = _table("flow from", "to", "at layer", "tokens/s", "of the link")
    for column in table.columns[2:]:
        column.justify = "right"
    for edge in report.edges[:EDGE_ROWS_MAX]:
        share = percent(edge.share) if edge.share is not None else ""
        table.add_row(
            escape(edge.source),
            escape(edge.target),
            str(edge.stop),
            amount(edge.tokens_per_s),
            Text(share + (" ◀" if edge.limits else "  "), "red" if edge.limits else ""),
        )
    table.caption = _left_out("of the link: share of what is planned for it", len(report.edges), EDGE_ROWS_MAX)
    return table


def _left_out(caption: str, rows: int, shown: int) -> str:
    return caption if rows <= shown else f"{caption}; {rows - shown} more are in --json"


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption_style="dim")

"""The swarm's status in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from helixnet.daemon.status_report import CLIENTS, FlowRow, LinkRow, PeerRow, PlanRow, StatusReport
from helixnet.daemon.wording import amount, many, percent, seconds, short_id, size

BAR_CELLS = 15
LINK_ROWS_MAX = 40
FLOW_ROWS_MAX = 60
FLOW_MIN = 0.005
"""Observed tokens/s below this are nothing."""
_STATE_STYLES = {"active": "green", "joining": "yellow", "suspect": "red", "draining": "yellow", "dead": "red"}


def render(status: StatusReport, *, details: bool = True) -> Group:
    """The whole page; without `details` only the headline and the peers."""
    names = names_of(status.peers)
    parts: list[RenderableType] = [_headline(status, names), peer_table(status)]
    if details:
        parts += [_rates_table(status.peers, names)]
        if status.plan is not None:
            parts += [_plan_lines(status.plan, names)]
        if status.flows:
            parts += [_flow_table(status.flows, names)]
        if status.links:
            parts += [_link_table(status.links, names)]
    return Group(*parts)


def names_of(peers: Sequence[PeerRow]) -> dict[str, str]:
    """What to call each peer: its name, with the end of its id where two share one."""
    called = [row.name for row in peers]
    names = {row.id: row.name if called.count(row.name) == 1 else f"{row.name} …{short_id(row.id)}" for row in peers}
    return {**names, CLIENTS: CLIENTS}


def layer_bar(spans: Sequence[tuple[int, int]], layers: int, cells: int) -> str:
    """The spans drawn over all layers, at most one cell a layer: `━━━━━─────`."""
    cells = min(cells, layers)
    marks = []
    for cell in range(cells):
        first, after = cell * layers // cells, max((cell + 1) * layers // cells, cell * layers // cells + 1)
        marks.append("━" if any(start < after and first < stop for start, stop in spans) else "·")
    return "".join(marks)


def peer_table(status: StatusReport) -> Table:
    """Who holds what."""
    names = names_of(status.peers)
    table = _table("peer", "state", f"of {status.layers} layers", "holds", "memory", "KV free", "busy", "tokens/s")
    for column in table.columns[4:]:
        column.justify = "right"
    for row in status.peers:
        spans = row.held or ([row.planned] if row.planned else [])
        state = Text(row.state, _STATE_STYLES.get(row.state, ""))
        if row.coordinator:
            state.append(" ★", "cyan")
        table.add_row(
            escape(names[row.id]),
            state,
            Text(layer_bar(spans, status.layers, BAR_CELLS), "green" if row.held else "yellow"),
            ", ".join(f"{start}-{stop - 1}" for start, stop in spans) or "-",
            size(row.memory_bytes, "B") if row.memory_bytes is not None else "-",
            percent(row.kv_free) if row.held else "-",
            str(row.sessions),
            amount(row.tokens_per_s),
        )
    return table


def _headline(status: StatusReport, names: dict[str, str]) -> Group:
    word = Text("serving", "bold green") if status.serving else Text("not serving yet", "bold yellow")
    line = Text.assemble(
        (status.model, "bold"), f" · network {status.network} · {many(len(status.peers), 'peer')} · ", word
    )
    coordinator = names.get(status.coordinator or "", "nobody yet")
    plan = f"plan {status.plan.term}.{status.plan.epoch} (term.epoch)" if status.plan else "no plan"
    if status.plan is not None and not status.plan.active:
        plan += ", being loaded"
    lines: list[RenderableType] = [line, Text(f"{plan}, coordinator {coordinator} ★ in term {status.term}", "dim")]
    if status.problem:
        lines.append(Text(status.problem, "yellow"))
    return Group(*lines)


def _plan_lines(plan: PlanRow, names: dict[str, str]) -> Group:
    bound = f" ({percent(plan.share_of_bound)} of the proven bound)" if plan.share_of_bound is not None else ""
    lines = [
        f"predicted {amount(plan.predicted_tokens_per_s)} tokens/s when busy, observed "
        f"{amount(plan.observed_tokens_per_s)} · first token {seconds(plan.predicted_ttft_s)}, then one every "
        f"{seconds(plan.predicted_tpot_s)}",
        f"flow {amount(plan.flow_tokens_per_s)} tokens/s of at most {amount(plan.bound_tokens_per_s)}{bound}",
    ]
    if plan.bottleneck:
        limit = plan.bottleneck
        for peer, name in sorted(names.items()):  # the planner knows peers by their ids, as they are or shortened
            limit = limit if peer == CLIENTS else limit.replace(peer, name).replace(short_id(peer), name)
        lines.append(f"bottleneck: {limit}")
    return Group("", *(Text(line) for line in lines))


def _rates_table(peers: Sequence[PeerRow], names: dict[str, str]) -> Table:
    """What was measured; the rates are of one layer."""
    table = _table("measured", "device", "FLOP/s", "memory", "decode", "batched", "prompts")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in peers:
        if row.device is None or row.matmul_flops is None or row.memory_bandwidth is None:
            table.add_row(escape(names[row.id]), "[yellow]not measured yet[/]")
            continue
        rates = (row.decode_tokens_per_s, row.decode_batch_tokens_per_s, row.prefill_tokens_per_s)
        table.add_row(
            escape(names[row.id]),
            escape(row.device),
            size(row.matmul_flops, "").strip(),
            size(row.memory_bandwidth, "B/s"),
            *(amount(rate) if rate is not None else "-" for rate in rates),
        )
    table.caption = "decode, batched decode, prompts: tokens/s through one layer"
    return table


def _flow_table(flows: Sequence[FlowRow], names: dict[str, str]) -> Table:
    table = _table("flow from", "to", "planned", "observed")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in flows[:FLOW_ROWS_MAX]:
        seen = row.observed_tokens_per_s
        table.add_row(
            escape(names.get(row.source, f"…{short_id(row.source)}")),
            escape(names.get(row.target, f"…{short_id(row.target)}")),
            amount(row.planned_tokens_per_s) if row.planned_tokens_per_s > 0 else "-",
            "" if seen is None else amount(seen) if seen > FLOW_MIN else "-",
        )
    table.caption = _left_out("tokens/s", len(flows), FLOW_ROWS_MAX)
    return table


def _link_table(links: Sequence[LinkRow], names: dict[str, str]) -> Table:
    table = _table("link from", "to", "round trip", "bandwidth")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in links[:LINK_ROWS_MAX]:
        table.add_row(
            escape(names.get(row.source, row.source)),
            escape(names.get(row.target, row.target)),
            seconds(row.round_trip_s),
            size(row.bandwidth, "B/s") if row.bandwidth > 0 else "-",
        )
    table.caption = _left_out("", len(links), LINK_ROWS_MAX) or None
    return table


def _left_out(caption: str, count: int, most: int) -> str:
    more = f"{count - most} more in --json" if count > most else ""
    return ", ".join(part for part in (caption, more) if part)


def _table(*headings: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim", caption_justify="left"
    )
    for heading in headings:
        # A device's name is what may be cut on a narrow terminal.
        table.add_column(
            heading, no_wrap=True, overflow="ellipsis", min_width=None if heading == "device" else len(heading)
        )
    return table

"""Reports as pictures, SVG and PNG; the same report gives the same bytes. Needs matplotlib (the extra `sim`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import msgspec
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from helixnet.sim.faults import Kind
from helixnet.sim.report import COORDINATOR_CHANGED, PERCENTS, PLAN_ACTIVE, MarkAt, Report, Spread
from helixnet.sim.tables import digits

INK, DIM, GRID, SHADE = "#1c2430", "#5d6877", "#e3e7ec", "#f3f5f8"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2f6fdb", "#c2630a", "#1a8a5a", "#8b46c9", "#d1242f"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "helixnet",  # otherwise the ids in a file are random
    "font.size": 10.0,
    "axes.edgecolor": DIM,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
}
DPI = 110
WIDTH = 10.0
"""Inches."""
LANES = (
    ("new plan", GREEN, (PLAN_ACTIVE,)),
    ("coordinator", PURPLE, (COORDINATOR_CHANGED, Kind.COORDINATOR)),
    ("joined", BLUE, (Kind.JOIN, Kind.LIE)),
    ("left or died", RED, (Kind.CRASH, Kind.VANISH, Kind.LEAVE)),
    ("disturbed", ORANGE, (Kind.SLOW, Kind.THIN, Kind.FLAP, Kind.PARTITION, Kind.SKEW)),
    ("crowd", INK, tuple("123456789")),
)
"""Rows of marks below the throughput: what, its colour, and how the marks begin (a crowd with how many it is)."""
LANE_INCHES = 0.26
THROUGH_MAX = 24
"""Up to so many marks are also drawn through the curve above them."""
TICKS_MAX, CROWD_BARS = 150, 120
"""More marks than this in a row are counted in so many bars."""
CHAR_SHARE = 0.0085
"""About how much of the axis a letter beside a mark takes."""
PREDICTED_MAX = 3.0
"""A prediction above so many times what was served is only told: drawn, it would flatten everything else."""
BARS_MAX = 40
LINES_SCALE_MIN = 20.0
"""The axis of the lines' shares ends there at least, in percent: idle lines should look idle."""
MINUTES_FROM_S, HOURS_FROM_S = 300.0, 7200.0
"""Axes over time count in minutes from here on, in hours from there on."""
LOG_FROM = 10.0
"""Times that differ by more than this factor get a logarithmic axis."""
LEFT_SHARE = 0.4
"""Points further left than this share of the axis have no room for words on their left."""
LIMIT_SHOWN = 4.0
"""A limit above so many times the longest times is not drawn."""


def draw(report: Report, folder: Path) -> list[str]:
    """Write every picture of one report into `folder`, as SVG and PNG. Returns the names of the SVG files."""
    figures = {"throughput": throughput, "latency": latency, "utilisation": utilisation}
    return [save(name, figure, report, folder) for name, figure in figures.items()]


def draw_sweep(reports: Sequence[Report], folder: Path) -> list[str]:
    """Likewise of several loads of one swarm, all offered or all kept in flight."""
    return [save("sweep", sweep, reports, folder)]


def save(name: str, figure: Callable[[Any], Figure], shown: object, folder: Path, png: bool = True) -> str:
    """Draw what is shown and write it, as SVG and, unless told otherwise, PNG. Returns the name of the SVG file."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = figure(shown)
        FigureCanvasAgg(drawn)
        if png:
            drawn.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return f"{name}.svg"


def new_figure(height: float, title: str) -> Figure:
    """An empty one, of the width that all have."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left")
    return figure


# --- over time ---------------------------------------------------------------------------------------


def throughput(report: Report) -> Figure:
    """Tokens/s over time, what happened meanwhile, and requests in flight, KV and peers below."""
    shown = [mark for mark in report.marks if 0 <= mark.at_s <= report.seconds]
    lanes = [lane for lane in LANES if any(mark.what.startswith(lane[2]) for mark in shown)]
    rows = ["prompts", "in flight", "KV reserved"]
    rows += ["peers"] if len({column.peers for column in report.over_time}) > 1 else []
    heights = [3.0, max(0.1, LANE_INCHES * len(lanes)), *[0.9] * len(rows)]
    served = f"{digits(report.tokens_per_s)} decode tokens/s"
    title = f"{report.name}: {served} under {report.offered}"
    figure = new_figure(1.3 + sum(heights), title)
    axes: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    unit_s, unit = _time_unit(report.seconds)
    _served(axes[0], report, unit_s)
    _lanes(axes[1], axes[0], msgspec.structs.replace(report, marks=tuple(shown)), lanes, unit_s)
    edges = _edges(report, unit_s)
    curves = {
        "prompts": ([column.prompt_tokens_per_s for column in report.over_time], "prompt\ntokens/s", ORANGE),
        "in flight": ([float(column.in_flight) for column in report.over_time], "requests\nin flight", BLUE),
        "KV reserved": ([100 * column.kv for column in report.over_time], "KV pages\nreserved, %", PURPLE),
        "peers": ([float(column.peers) for column in report.over_time], "peers", GREEN),
    }
    for row, axis in zip(rows, axes[2:], strict=True):
        values, label, colour = curves[row]
        axis.plot(edges[1:], values, color=colour, linewidth=1.4)
        axis.set_ylabel(label, fontsize=9)
        axis.set_ylim(0, 1.12 * max([1.0, *values]))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.yaxis.set_major_formatter(FuncFormatter(amount))
    axes[-1].set_xlabel(f"{unit} since the load began")
    axes[-1].set_xlim(0, report.seconds / unit_s)
    figure.align_ylabels(axes)
    return figure


def _served(axis: Axes, report: Report, unit_s: float) -> None:
    edges = _edges(report, unit_s)
    decoded = [column.tokens_per_s for column in report.over_time]
    axis.axvspan(0, report.warm_s / unit_s, color=SHADE, zorder=0, label="warm-up, not counted")
    axis.stairs(decoded, edges, fill=True, color=BLUE, alpha=0.18)
    axis.stairs(decoded, edges, color=BLUE, linewidth=1.8, baseline=None, label="simulated")
    most = max([1.0, *decoded])
    predicted = [column.predicted_tokens_per_s for column in report.over_time]
    if 0 < max(predicted, default=0.0) <= PREDICTED_MAX * most:
        held = [value or math.nan for value in predicted]  # while a plan gives way to the next, none is active
        words = "planned at most"
        axis.stairs(held, edges, color=DIM, linewidth=1.3, linestyle="--", baseline=None, label=words)
        most = max(most, *predicted)
    axis.set_ylim(0, 1.06 * most)
    axis.set_ylabel("decode tokens/s")
    axis.yaxis.set_major_formatter(FuncFormatter(amount))
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, borderaxespad=0.2, handlelength=1.6)


def _lanes(
    axis: Axes, above: Axes, report: Report, lanes: Sequence[tuple[str, str, tuple[str, ...]]], unit_s: float
) -> None:
    """A row of ticks for each kind of mark, with who it was where there is room."""
    few = sum(mark.what.startswith(lane[2]) for mark in report.marks for lane in lanes) <= THROUGH_MAX
    names = []
    for row, (name, colour, beginnings) in enumerate(lanes):
        marks = [mark for mark in report.marks if mark.what.startswith(beginnings)]
        at = [mark.at_s / unit_s for mark in marks]
        names.append(name if few else f"{name} {len(marks)} x")
        if len(at) > TICKS_MAX:
            _crowd(axis, at, row, (report.seconds / unit_s, colour))
            continue
        axis.vlines(at, [row - 0.38] * len(at), [row + 0.38] * len(at), color=colour, linewidth=2.0 if few else 0.8)
        if not few:
            continue
        above.vlines(at, 0, 1, color=colour, linewidth=0.9, alpha=0.55, transform=above.get_xaxis_transform())
        stops = [mark.at_s for mark in marks[1:]] + [report.seconds]
        for mark, stop_s in zip(marks, stops, strict=True):
            _mark(axis, mark, row, (colour, unit_s, report.seconds, stop_s))
    axis.set_yticks(range(len(lanes)), names, fontsize=9)
    for label, lane in zip(axis.get_yticklabels(), lanes, strict=True):
        label.set_color(lane[1])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.grid(False)
    axis.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="x", length=0)


def _crowd(axis: Axes, at: Sequence[float], row: int, scale: tuple[float, str]) -> None:
    """Bars as high as there are marks, for more of them than one could tell apart."""
    stop, colour = scale
    counts = [0] * CROWD_BARS
    for moment in at:
        counts[min(CROWD_BARS - 1, int(CROWD_BARS * moment / stop))] += 1
    heights = [0.8 * count / max(counts) for count in counts]
    width = stop / CROWD_BARS
    lefts = [number * width for number in range(CROWD_BARS)]
    axis.bar(lefts, [-height for height in heights], width=width, bottom=row + 0.4, align="edge", color=colour)


def _mark(axis: Axes, mark: MarkAt, row: int, scale: tuple[str, float, float, float]) -> None:
    """How long it lasts, and who it was if the words have room before the next mark."""
    colour, unit_s, seconds, free_until_s = scale
    lasts = re.search(r"for ([\d.e+]+) s", mark.what)
    if lasts:
        stop = min(seconds, mark.at_s + float(lasts[1]))
        axis.barh(row, (stop - mark.at_s) / unit_s, left=mark.at_s / unit_s, height=0.76, color=colour, alpha=0.25)
    words = mark.what.removeprefix(f"{COORDINATOR_CHANGED} ")
    if not mark.what.startswith(PLAN_ACTIVE) and CHAR_SHARE * len(words) < (free_until_s - mark.at_s) / seconds:
        axis.text((mark.at_s + 0.004 * seconds) / unit_s, row, words, color=colour, fontsize=8, va="center_baseline")


def _edges(report: Report, unit_s: float) -> list[float]:
    columns = report.over_time
    width_s = columns[1].at_s - columns[0].at_s if len(columns) > 1 else report.seconds
    return [column.at_s / unit_s for column in columns] + [(columns[-1].at_s + width_s) / unit_s] if columns else [0.0]


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < MINUTES_FROM_S:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < HOURS_FROM_S else (3600.0, "hours")


# --- latency -----------------------------------------------------------------------------------------


def latency(report: Report) -> Figure:
    """How many of the requests, or gaps, took no longer than so long."""
    figure = new_figure(3.9, f"{report.name}: how long answers took under {report.offered}")
    axes: list[Axes] = list(figure.subplots(1, 3, sharey=True))
    told = report.prediction
    panels = (
        ("first token (TTFT)", "requests", report.ttft, report.limits.ttft_s, told.ttft_s if told else 0.0),
        ("per further token (TPOT)", "requests", report.tpot, report.limits.tpot_s, told.tpot_s if told else 0.0),
        ("gap between two tokens (ITL)", "gaps", report.itl, 0.0, 0.0),
    )
    handles: dict[str, Any] = {}
    for axis, (title, what, spread, limit_s, alone_s) in zip(axes, panels, strict=True):
        axis.set_title(title)
        axis.set_xlabel(f"{f'{spread.count:,}'.replace(',', ' ') if spread else 'no'} {what}")
        if spread is not None:
            handles |= _curve(axis, spread, limit_s, alone_s)
    axes[0].set_ylabel("took no longer, %")
    axes[0].set_ylim(0, 101)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _curve(axis: Axes, spread: Spread, limit_s: float, alone_s: float) -> dict[str, Any]:
    low, high = spread.quantiles[1], spread.quantiles[-2]
    is_log = low > 0 and high / low > LOG_FROM
    (curve,) = axis.plot(spread.quantiles, PERCENTS, color=BLUE)
    handles: dict[str, Any] = {"simulated": curve}
    if is_log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    ends = [low, high]
    if limit_s and limit_s < LIMIT_SHOWN * high:
        handles["limit of good requests"] = axis.axvline(limit_s, color=RED, linestyle="--", linewidth=1.2)
        ends.append(limit_s)
    if alone_s and (not is_log or alone_s > low / LOG_FROM):
        words = "predicted for a request alone"
        handles[words] = axis.axvline(alone_s, color=DIM, linestyle=":", linewidth=1.6)
        ends.append(alone_s)
    axis.set_xlim(0.85 * min(ends) if is_log else 0.0, 1.12 * max(ends))
    if not is_log:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    for percent, value in ((50, spread.p50), (95, spread.p95)):
        axis.plot([value], [percent], marker="o", markersize=4.5, color=BLUE)
        # A rising curve leaves room below its right and above its left, if the axis does.
        below = (
            percent == 50 or axis.transAxes.inverted().transform(axis.transData.transform((value, 0)))[0] < LEFT_SHARE
        )
        axis.annotate(
            f"p{percent}  {_seconds(value)}",
            (value, percent),
            xytext=(7, -11) if below else (-7, 1),
            textcoords="offset points",
            ha="left" if below else "right",
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    return handles


def amount(value: float, _: object = None) -> str:
    """Thousands apart, and no digits that are none."""
    return f"{value:,.10g}".replace(",", " ")


def _seconds(value: float) -> str:
    if value <= 0:
        return "0"
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{digits(value).removesuffix('.00').removesuffix('.0')} s"


# --- utilisation -------------------------------------------------------------------------------------


def utilisation(report: Report) -> Figure:
    """How busy peers and lines were, and how full KV memory was."""
    count = len(report.peers)
    rows = max(min(count, BARS_MAX), len(report.lines[: BARS_MAX // 3])) if count <= BARS_MAX else 12
    title = f"{report.name}: who was busy under {report.offered}"
    figure = new_figure(1.6 + 0.3 * max(6, rows), title)
    axes: list[Axes] = list(figure.subplots(1, 2))
    if count <= BARS_MAX:
        _peer_bars(axes[0], report)
    else:
        _peer_curves(axes[0], report)
    lines = report.lines[: max(8, min(rows, 16))]
    axes[1].barh(
        [line.line.removeprefix("link ") for line in lines],
        [100 * min(1.0, one.busy) for one in lines],
        height=0.55,
        color=GREEN,
    )
    axes[1].invert_yaxis()
    axes[1].set_title("busiest lines")
    axes[1].set_xlabel("busy, % of the time")
    for axis in axes:
        axis.grid(visible=False, axis="y")
    axes[1].set_xlim(0, max(LINES_SCALE_MIN, min(100.0, 110 * max((line.busy for line in lines), default=0.0))))
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _peer_bars(axis: Axes, report: Report) -> None:
    peers = sorted(report.peers, key=lambda peer: (-peer.load, peer.peer))
    upper, lower = [row - 0.2 for row in range(len(peers))], [row + 0.2 for row in range(len(peers))]
    bars: tuple[tuple[str, list[float], list[float], str, float], ...] = (
        ("device busy, in batches of any size", upper, [100 * one.busy for one in peers], BLUE, 0.25),
        ("device loaded: the same work in its best batches", upper, [100 * one.load for one in peers], BLUE, 1.0),
        ("KV pages reserved at most", lower, [100 * one.kv_max for one in peers], PURPLE, 0.25),
        ("KV pages reserved on average", lower, [100 * one.kv for one in peers], PURPLE, 1.0),
    )
    for label, rows, shares, colour, alpha in bars:
        axis.barh(rows, shares, height=0.36, color=colour, alpha=alpha, linewidth=0, label=label)
    axis.set_yticks(range(len(peers)), [f"{one.peer}  {one.device}" for one in peers], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 101)
    axis.set_xlabel("% of the time, or of the pages")
    axis.set_title("peers")


def _peer_curves(axis: Axes, report: Report) -> None:
    """Too many for bars: the shares of all peers, each sorted by itself."""
    for values, colour, label in (
        ([one.busy for one in report.peers], DIM, "device busy, in batches of any size"),
        ([one.load for one in report.peers], BLUE, "device loaded: the same work in its best batches"),
        ([one.kv for one in report.peers], PURPLE, "KV pages reserved on average"),
    ):
        axis.plot([100 * value for value in sorted(values, reverse=True)], color=colour, label=label)
    axis.set_xlim(0, len(report.peers) - 1)
    axis.set_ylim(0, 101)
    axis.set_ylabel("% of the time, or of the pages")
    axis.set_xlabel("peers, each curve from its highest to its lowest")
    axis.set_title(f"{len(report.peers)} peers")


# --- load sweep --------------------------------------------------------------------------------------


def sweep(reports: Sequence[Report]) -> Figure:
    """Goodput, tokens/s and time to the first token against the load."""
    ordered = sorted(reports, key=lambda report: report.per_s or report.in_flight)
    offered = ordered[0].per_s > 0
    load = [report.per_s or float(report.in_flight) for report in ordered]
    limits = ordered[0].limits
    figure = new_figure(4.1, f"{ordered[0].name}: what more load brings")
    good, tokens, first = figure.subplots(1, 3)
    if offered:
        good.plot([0, load[-1]], [0, load[-1]], color=DIM, linestyle=":", linewidth=1.4, label="all that is asked")
    goodput = [report.goodput_per_s for report in ordered]
    good.plot(load, goodput, color=BLUE, marker="o", markersize=4.5, label="simulated")
    good.set_title(f"goodput, requests/s\n(TTFT ≤ {_seconds(limits.ttft_s)}, TPOT ≤ {_seconds(limits.tpot_s)})")
    tokens.plot(load, [report.tokens_per_s for report in ordered], color=BLUE, marker="o", markersize=4.5)
    tokens.set_title("decode tokens/s\nat clients")
    predicted = [report.prediction.tokens_per_s if report.prediction else 0.0 for report in ordered]
    if 0 < max(predicted) <= PREDICTED_MAX * max(report.tokens_per_s for report in ordered):
        tokens.plot(load, predicted, color=DIM, linestyle="--", linewidth=1.3, label="planned at most")
    for quantile, style in (("p50", "--"), ("p95", "-")):
        there = [(x, getattr(report.ttft, quantile)) for x, report in zip(load, ordered, strict=True) if report.ttft]
        label = f"TTFT {quantile}"
        first.plot(*zip(*there, strict=True), color=ORANGE, linestyle=style, marker="o", markersize=4.5, label=label)
    first.axhline(limits.ttft_s, color=RED, linestyle="--", linewidth=1.2, label="limit of good requests")
    first.set_yscale("log")
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    first.yaxis.set_minor_formatter(NullFormatter())
    first.set_title("time to the\nfirst token")
    for axis in (good, tokens, first):
        axis.set_xlabel("offered, requests/s" if offered else "requests in flight")
        axis.set_xlim(0, 1.05 * load[-1])
        if axis is not first:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(FuncFormatter(amount))
    figure.legend(loc="outside lower center", ncols=6, handlelength=2.6)
    return figure

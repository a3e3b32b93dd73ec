"""The evaluation's pictures. Needs matplotlib (the extra `sim`); the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from helixnet.sim.evaluation import ours, predictions, shares
from helixnet.sim.evaluation.calibration import MODELS, Published, PublishedRow
from helixnet.sim.evaluation.cells import Ended
from helixnet.sim.evaluation.chapters import METHOD_WORDS, ROUTER_WORDS, Grid, grids, ways_of
from helixnet.sim.evaluation.like_for_like import METHODS, ROUTERS
from helixnet.sim.evaluation.ours import WAYS
from helixnet.sim.plots import BLUE, DIM, GREEN, GRID, INK, ORANGE, PURPLE, RED, amount, new_figure, save
from helixnet.sim.side_by_side import Served
from helixnet.sim.tables import digits

ROUTER_COLOURS = {
    "iwrr": BLUE,
    "swarm": ORANGE,
    "random": GREEN,
    "shortest_queue": PURPLE,
    "min_latency": DIM,
}
Pictures = dict[str, str]
"""What they show, by the name of the file."""


def draw(section: str, ended: Sequence[Ended], folder: Path) -> Pictures:
    """Write the section's pictures into the folder, as SVG and PNG; none where there is nothing to show."""
    return {save(name, figure, ended, folder): words for name, words, figure in _pictures(section, ended)}


def _pictures(section: str, ended: Sequence[Ended]) -> list[tuple[str, str, Callable[[Sequence[Ended]], Figure]]]:
    if not any(one.row is not None for one in ended):
        return []
    if section in ("calibration", "published"):
        return [(section, "Published and simulated decode tokens/s", published)]
    if section == "like-for-like":
        settings = dict.fromkeys((instance, model) for instance, model, _ in grids(ended))
        return [
            (
                f"like-for-like-{instance}-{MODELS.get(model, model).lower()}",
                f"Decode tokens/s by method and router, {instance} {MODELS.get(model, model)}",
                partial(alike, instance=instance, model=model),
            )
            for instance, model in settings
        ]
    if section == "ours":
        return [("ours", "Decode tokens/s of each way, by instance", ablation)]
    if section == "shares":
        return [("shares", "Planned and run shares of the work, and the flow reached", shared)]
    return [("predictions", "Predicted and simulated throughput, TTFT and TPOT", predicted)]


# --- published ---------------------------------------------------------------------------------------


def published(ended: Sequence[Ended]) -> Figure:
    """Two bars for each figure, and the band that was to be met."""
    rows = [
        (one.cell.figure, one.row)
        for one in ended
        if isinstance(one.cell, Published) and isinstance(one.row, PublishedRow)
    ]
    figure = new_figure(1.3 + 0.42 * len(rows), "The paper's system: published, and simulated here")
    axis = figure.subplots()
    for number, (_, row) in enumerate(rows):
        axis.barh(number - 0.19, row.published, height=0.36, color=DIM, alpha=0.45, label="published" * (not number))
        axis.barh(number + 0.19, row.ours, height=0.36, color=BLUE, label="simulated here" * (not number))
        words = f"{digits(row.ours)}  ({row.ratio - 1:+.1%})"
        axis.text(1.01 * max(row.ours, row.published), number + 0.19, f" {words}", va="center", fontsize=8.5)
    axis.set_yticks(range(len(rows)), [title for title, _ in rows], fontsize=9)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlim(0, 1.18 * max(max(row.ours, row.published) for _, row in rows))
    axis.set_xlabel("decode tokens/s")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


# --- like for like -----------------------------------------------------------------------------------


def alike(ended: Sequence[Ended], instance: str, model: str) -> Figure:
    """Methods along the axis, a bar for each router; offline and online beside each other."""
    found = {rate: grid for (*setting, rate), grid in grids(ended).items() if setting == [instance, model]}
    figure = new_figure(4.2, f"{instance} {MODELS.get(model, model)}: every method with every router, one load for all")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (rate, grid) in zip(axes, found.items(), strict=True):
        _grid(axis, grid, label=axis is axes[0])
        axis.set_title("online: the same arrivals for all" if rate else "offline: KV memory filled by one rule")
    axes[0].set_ylabel("decode tokens/s")
    figure.legend(loc="outside lower center", ncols=6)
    return figure


def _grid(axis: Axes, grid: Grid, label: bool) -> None:
    methods = [method for method in METHODS if any(key[0] == method for key in grid)]
    width = 0.84 / len(ROUTERS)
    for place, router in enumerate(ROUTERS):
        at = [
            (number - 0.42 + (place + 0.5) * width, grid[method, router])
            for number, method in enumerate(methods)
            if (method, router) in grid
        ]
        named = ROUTER_WORDS[router] if label else ""
        colour = ROUTER_COLOURS[router]
        axis.bar([x for x, _ in at], [row.decode_tokens_per_s for _, row in at], width, color=colour, label=named)
        for x, row in at:
            if row.overloaded:
                axis.text(x, row.decode_tokens_per_s, "*", ha="center", va="bottom", color=RED, fontsize=10)
    names = [METHOD_WORDS[method].replace(" ", "\n") for method in methods]
    axis.set_xticks(range(len(methods)), names)
    axis.set_ylim(0, 1.1 * max(1.0, *(row.decode_tokens_per_s for row in grid.values())))
    axis.grid(visible=False, axis="x")
    axis.yaxis.set_major_formatter(FuncFormatter(amount))
    if any(row.overloaded for row in grid.values()):
        axis.text(
            0.99, 0.98, "* does not keep up", transform=axis.transAxes, ha="right", va="top", color=RED, fontsize=9
        )


# --- ours --------------------------------------------------------------------------------------------


def ablation(ended: Sequence[Ended]) -> Figure:
    """A panel for each instance: what each way serves, and the time between two tokens."""
    rows = {name: found for name in ours.INSTANCES if (found := ways_of(ended, name))}
    figure = new_figure(1.0 + 2.75 * len(rows), "From Helix to ours, 70B, saturated (dashed: what was to be reached)")
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(2.2, 1.0))
    for (instance, ways), (rate, pace) in zip(rows.items(), axes, strict=True):
        _ways(rate, pace, ways)
        rate.set_title(instance)
        pace.set_title("mean TPOT, s")
    axes[-1][0].set_xlabel("decode tokens/s")
    return figure


def _ways(rate: Axes, pace: Axes, ways: dict[str, Served]) -> None:
    first = ways.get(ours.THEIRS)
    for number, (way, row) in enumerate(ways.items()):
        colour = DIM if way == ours.THEIRS else BLUE if way in ours.STEPS else ORANGE
        rate.barh(number, row.decode_tokens_per_s, height=0.62, color=colour)
        times = f"  ({row.decode_tokens_per_s / first.decode_tokens_per_s:.2f} x)" if first is not None else ""
        rate.text(
            row.decode_tokens_per_s, number, f" {digits(row.decode_tokens_per_s)}{times}", va="center", fontsize=9
        )
        pace.barh(number, row.tpot_s, height=0.62, color=colour)
        _beside(pace, row.tpot_s, number, f"{row.tpot_s:.2f}")
    if first is not None:
        wanted = ours.TIMES * first.decode_tokens_per_s
        rate.axvline(wanted, color=RED, linestyle="--", linewidth=1.2)
        pace.axvline(first.tpot_s, color=RED, linestyle="--", linewidth=1.2)
    rate.set_yticks(range(len(ways)), [WAYS[way] for way in ways], fontsize=8.5)
    pace.set_yticks(range(len(ways)), [])
    for axis in (rate, pace):
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, 1.32 * axis.dataLim.x1)
        axis.xaxis.set_major_locator(MaxNLocator(5))


def _beside(axis: Axes, length: float, number: int, words: str) -> None:
    """At the end of a bar, legible over lines."""
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    at, beyond = (length, number), (4, 0)
    axis.annotate(words, at, xytext=beyond, textcoords="offset points", va="center", fontsize=9, bbox=box)


# --- random clusters ---------------------------------------------------------------------------------


def shared(ended: Sequence[Ended]) -> Figure:
    """Every peer's share run against the planned, and each cluster's flow."""
    rows = shares.rows_of(ended)
    figure = new_figure(4.4, "What IWRR makes of a plan, saturated")
    left, right = figure.subplots(1, 2)
    points = [(planned, row.run[peer]) for _, row in rows for peer, planned in row.planned.items()]
    most = 105 * max(max(pair) for pair in points)
    band = 1 + shares.WITHIN, 1 - shares.WITHIN
    left.fill_between([0, most], [0, band[0] * most], [0, band[1] * most], color=GRID, label="within 5 %", zorder=0)
    left.plot([0, most], [0, most], color=DIM, linewidth=1.0)
    near = [abs(run / planned - 1) <= shares.WITHIN for planned, run in points]
    for wanted, colour, words in ((True, BLUE, "a peer"), (False, RED, "further off")):
        mine = [point for point, is_near in zip(points, near, strict=True) if is_near == wanted]
        if mine:
            left.scatter([100 * x for x, _ in mine], [100 * y for _, y in mine], s=14, color=colour, label=words)
    left.set_xlim(0, most)
    left.set_ylim(0, most)
    left.set_xlabel("planned share of the work, %")
    left.set_ylabel("run, %")
    left.legend(loc="upper left")
    reached = [100 * row.served / row.flow for _, row in rows]
    right.bar(range(len(rows)), reached, 0.62, color=[BLUE if x >= 100 * shares.FLOW_SHARE else RED for x in reached])
    right.axhline(100 * shares.FLOW_SHARE, color=INK, linestyle="--", linewidth=1.2)
    right.set_xticks(range(len(rows)), [str(seed) for seed, _ in rows])
    right.set_xlabel("cluster")
    right.set_ylabel("served, % of the plan's max flow")
    right.grid(visible=False, axis="x")
    return figure


def predicted(ended: Sequence[Ended]) -> Figure:
    """Simulated against predicted, each kind on a panel, with the band that was to be met."""
    rows = [row for _, row in predictions.rows_of(ended)]
    figure = new_figure(4.1, "Predicted, and simulated")
    panels = (
        ("decode tokens/s, saturated", [row.tokens_per_s for row in rows]),
        ("TTFT alone, s", [row.ttft_s for row in rows]),
        ("TPOT alone, s", [row.tpot_s for row in rows]),
    )
    axes = figure.subplots(1, len(panels))
    for axis, (title, pairs) in zip(axes, panels, strict=True):
        _scatter(axis, pairs)
        axis.set_title(title)
        axis.set_xlabel("predicted")
    axes[0].set_ylabel("simulated")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _scatter(axis: Axes, pairs: Sequence[tuple[float, float]]) -> None:
    low, high = 0.8 * min(min(pair) for pair in pairs), 1.25 * max(max(pair) for pair in pairs)
    within = predictions.WITHIN
    ends = [low, high]
    axis.fill_between(
        ends,
        [(1 + within) * end for end in ends],
        [(1 - within) * end for end in ends],
        color=GRID,
        label=f"within {within:.0%}",
        zorder=0,
    )
    axis.plot(ends, ends, color=DIM, linewidth=1.0)
    for near, colour, words in ((True, BLUE, "a cluster"), (False, RED, "a cluster further off")):
        mine = [(said, seen) for said, seen in pairs if (abs(seen / said - 1) <= within) == near]
        axis.scatter([x for x, _ in mine], [y for _, y in mine], s=16, color=colour, label=words)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        each.set_minor_formatter(NullFormatter())

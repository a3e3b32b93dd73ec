"""How a swarm's cost grows with its peers, as pictures. Needs matplotlib (the extra `sim`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helixnet.sim.plots import BLUE, DIM, GREEN, GRID, ORANGE, PURPLE, RED, new_figure, save
from helixnet.sim.report import Limits
from helixnet.sim.scaling import MINUTE_S, Scaled

KINDS_SHOWN = 5
LEGEND_ROOM = 30.0
"""Times the highest value, on a logarithmic axis."""


def draw_scaling(sizes: Sequence[Scaled], folder: Path) -> list[str]:
    """`growth` and `goodput` into `folder`, as SVG. Returns the names of the files."""
    figures = {"growth": growth, "goodput": goodput}
    return [save(name, figure, sizes, folder, png=False) for name, figure in figures.items()]


def growth(sizes: Sequence[Scaled]) -> Figure:
    """Control traffic by size: of a peer, of the coordinator, and of which kinds it is."""
    figure = new_figure(4.2, "Control traffic: what running the swarm costs as it grows")
    whole, kinds = figure.subplots(1, 2)
    peers = [size.peers for size in sizes]
    for values, name, colour in (
        ([size.control_per_peer for size in sizes], "a peer sends, on average", BLUE),
        ([size.coordinator_sent for size in sizes], "the coordinator sends", ORANGE),
        ([size.coordinator_received for size in sizes], "the coordinator receives", GREEN),
    ):
        whole.plot(peers, values, marker="o", color=colour, label=name)
    _logarithmic(whole, peers)
    whole.set_title("by whom")
    largest = [use.kind for use in sizes[-1].control][:KINDS_SHOWN]
    for kind, colour in zip(largest, (BLUE, ORANGE, GREEN, PURPLE, RED), strict=False):
        of_kind = [sum(use.bytes_per_s for use in size.control if use.kind == kind) / size.peers for size in sizes]
        kinds.plot(peers, [value or float("nan") for value in of_kind], marker="o", color=colour, label=kind)
    _logarithmic(kinds, peers)
    kinds.set_title(f"of a peer, the {len(largest)} largest kinds")
    return figure


def _logarithmic(axis: Axes, peers: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(peers, [f"{count:,}".replace(",", " ") for count in peers])
    axis.minorticks_off()
    axis.set_xlabel("peers")
    axis.set_ylabel("bytes/s")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * LEGEND_ROOM)
    axis.legend(loc="upper left")


def goodput(sizes: Sequence[Scaled]) -> Figure:
    """Requests answered, and of them those within the limits, minute by minute; changes of the coordinator as lines."""
    figure = new_figure(1.4 + 1.5 * len(sizes), "Goodput over time, while peers come and go")
    limits = Limits()
    kept = f"first token within {limits.ttft_s:g} s, then {limits.tpot_s:g} s a token"
    axes = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
    for axis, size in zip(axes, sizes, strict=True):
        minutes = [minute + 0.5 for minute in range(len(size.good_per_minute))]
        axis.bar(minutes, size.ended_per_minute, width=0.9, color=GRID, label="all that were answered")
        axis.bar(minutes, size.good_per_minute, width=0.9, color=BLUE, label=kept)
        for at_s in size.failovers_at_s:
            axis.axvline(at_s / MINUTE_S, color=PURPLE, linewidth=1.0)
        axis.set_title(
            f"{size.peers} peers, {size.left} left, {size.joined} came, changes of coordinator: {size.coordinators}"
        )
        axis.set_ylabel("requests/min")
        axis.set_ylim(0, 1.1 * max(1, *size.ended_per_minute))
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    axes[-1].set_xlabel("minutes of load (lines: the coordinator changed)", color=DIM)
    return figure

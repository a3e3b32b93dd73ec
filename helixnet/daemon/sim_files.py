"""What `helixnet sim --report DIR` writes: report.md, report.json and pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helixnet.daemon.sim_picture import flow_picture
from helixnet.sim.tables import markdown, sweep_markdown

if TYPE_CHECKING:
    from helixnet.daemon.sim_command import Run

NO_PLOTS = (
    "plots need matplotlib, which is not installed; the tables were written without them. Install it with: "
    "pip install 'matplotlib>=3.10,<4' (or HelixNet with its extra `sim`)."
)


def write(run: Run, folder: Path) -> str:
    """Everything about one simulation. Returns what could not be written, in a sentence; empty if all was."""
    pictures = []
    has_plots = _has_matplotlib()
    if has_plots:
        from helixnet.sim.plots import draw

        pictures += draw(run.report, folder)
    flow = flow_picture(run.simulation, run.report, run.regions)
    if flow is not None:
        (folder / "flow.svg").write_text(flow, encoding="utf-8")
        pictures.append("flow.svg")
    (folder / "report.json").write_bytes(run.report.to_json() + b"\n")
    (folder / "report.md").write_text(markdown(run.report, run.command, pictures), encoding="utf-8")
    return "" if has_plots else NO_PLOTS


def write_sweep(runs: Sequence[Run], command: str, folder: Path) -> str:
    """Several loads: a table and a picture of all, and a folder for each. Returns what `write` does."""
    reports = [run.report for run in runs]
    pictures: list[str] = []
    for run in runs:
        each = folder / f"load-{run.report.per_s:g}rps" if run.report.per_s else folder / f"load-{run.report.in_flight}"
        each.mkdir(exist_ok=True)
        write(run, each)
    has_plots = _has_matplotlib()
    if has_plots:
        from helixnet.sim.plots import draw_sweep

        pictures += draw_sweep(reports, folder)
    sweep = b",".join(report.to_json() for report in reports)
    (folder / "report.json").write_bytes(b'{"sweep":[' + sweep + b"]}\n")
    (folder / "report.md").write_text(sweep_markdown(reports, command, pictures), encoding="utf-8")
    return "" if has_plots else NO_PLOTS


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None

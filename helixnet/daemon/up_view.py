"""What `helixnet up` shows: how far each peer is, and how to talk to the swarm when it is ready."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from helixnet.core.model import Manifest
from helixnet.daemon.status_report import PeerRow, StatusReport
from helixnet.daemon.status_view import layer_bar, peer_table
from helixnet.daemon.up_processes import BOOTSTRAP, Child
from helixnet.daemon.wording import many

DONE = "ready"
FRAMES_PER_S = 8.0
LIVE_CELLS = 30


def progress_of(row: PeerRow | None) -> str:
    """How far one peer is, in words."""
    if row is None:
        return "starting"
    if row.device is None:
        return "joined, measuring"
    if row.planned is None:
        return "measured, waiting for a plan"
    start, stop = row.planned
    if any(first <= start and stop <= after for first, after in row.held):
        return DONE
    return f"loading layers {start}-{stop - 1}"


class StartView:
    """The progress display: live on a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console, names: Sequence[str], manifest: Manifest, began: float) -> None:
        self._console = console
        self._manifest = manifest
        self._began = began
        self._steps: dict[str, str] = dict.fromkeys((BOOTSTRAP, *names), "starting")
        self._rows: dict[str, PeerRow] = {}
        self._problem = ""
        self._spinner = Spinner("dots")
        # The spinner turns by itself: rich's own thread draws what `_page` makes of these plain values.
        self._live = Live(get_renderable=self._page, console=console, refresh_per_second=FRAMES_PER_S, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def bootstrap_is_up(self) -> None:
        """The entry point can be reached."""
        self._step(BOOTSTRAP, DONE)

    def show(self, status: StatusReport) -> None:
        """Take the swarm's own word for how far it is."""
        rows = {row.name: row for row in status.peers}
        self._rows = rows
        for name in self._steps:
            if name != BOOTSTRAP:
                self._step(name, progress_of(rows.get(name)))
        if status.problem != self._problem:
            self._problem = status.problem
            if self._problem and not self._console.is_terminal:
                self._line(self._problem)

    def _step(self, name: str, step: str) -> None:
        if self._steps[name] != step:
            self._steps[name] = step
            if not self._console.is_terminal:
                self._line(f"{name}: {step}")

    def _line(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:5.1f} s  {escape(text)}", soft_wrap=True)

    def _page(self) -> Group:
        seconds = time.monotonic() - self._began
        self._spinner.update(text=f"starting a swarm for {escape(self._manifest.name)}  {seconds:.0f} s")
        table = Table.grid(padding=(0, 2))
        for name, step in list(self._steps.items()):
            row = self._rows.get(name)
            bar = self._bar(row) if name != BOOTSTRAP else ""
            style = "green" if step == DONE else "yellow"
            table.add_row(
                f"  {name}", Text(bar, style if row is not None and row.planned else "dim"), Text(step, style)
            )
        problem = Text(self._problem, "yellow") if self._problem else Text("")
        return Group(self._spinner, table, problem)

    def _bar(self, row: PeerRow | None) -> str:
        """What a peer holds, or is to hold."""
        planned = [row.planned] if row is not None and row.planned is not None else []
        held = row.held if row is not None else []
        return layer_bar(held or planned, self._manifest.layers, LIVE_CELLS)


def ready_page(status: StatusReport, folder: Path, took_s: float) -> Group:
    """Who holds what, and what to do now."""
    whole = (0, status.layers)
    parts = (
        "" if any(whole in row.held for row in status.peers) or len(status.peers) < 2 else ", each with a part of it"
    )
    headline = Text.assemble(
        ("Ready", "bold green"), f" after {took_s:.0f} s: {status.model} on {many(len(status.peers), 'peer')}{parts}."
    )
    commands = Table.grid(padding=(0, 3))
    for command, what in (
        ('helixnet generate "What is the capital of France?"', "one answer"),
        ("helixnet chat", "a conversation"),
        ("helixnet status --watch", "layers, plan and flow"),
    ):
        commands.add_row(f"  [bold]{command}[/]", f"[dim]{what}[/]")
    snippet = Text(
        "  from helixnet_client import Client\n"
        "  with Client() as client:\n"
        '      print(client.chat([{"role": "user", "content": "Hello!"}]).text)\n'
    )
    where = f" (first: export HELIXNET_HOME={folder.parent})" if os.environ.get("HELIXNET_HOME") else ""
    return Group(
        headline,
        peer_table(status),
        Text(f"In another terminal{where}:", "dim"),
        commands,
        Text("From Python:", "dim"),
        snippet,
        Text(f"Ctrl-C stops everything. Logs are in {folder}.", "dim"),
    )


def ready_json(
    status: StatusReport, join: Sequence[str], children: Sequence[Child], took_s: float
) -> dict[str, object]:
    """The one line of `helixnet up --json`."""
    pids = {child.name: child.process.pid for child in children}
    return {
        "event": "ready",
        "join": list(join),
        "network": status.network,
        "model": status.model,
        "layers": status.layers,
        "plan": [status.plan.term, status.plan.epoch] if status.plan else None,
        "bootstrap_pid": pids[BOOTSTRAP],
        "peers": [
            {
                "id": row.id,
                "name": row.name,
                "pid": pids.get(row.name),
                "span": row.planned,
                "memory_bytes": row.memory_bytes,
            }
            for row in status.peers
        ],
        "seconds": round(took_s, 2),
    }

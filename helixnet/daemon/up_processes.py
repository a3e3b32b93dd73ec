"""The processes that `helixnet up` starts, watches and ends; none of them outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helixnet.console import DEBUG
from helixnet.core.errors import DeadlineExceeded, HelixError

BOOTSTRAP = "bootstrap"
LISTEN_S = 60.0
"""For the bootstrap peer; its first start reads all of its libraries from a cold disk."""
LISTEN_CHECK_S = 0.05
PEERS_STOP_S = 12.0
BOOTSTRAP_STOP_S = 6.0
KILL_S = 5.0
LOG_TAIL_BYTES = 4_096
_KEPT_VARIABLES = ("HELIXNET_HOME", "HELIXNET_CACHE", DEBUG)


class ChildFailed(HelixError):
    """A process that `up` started ended by itself; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """One running process of the swarm; what it says is in `log`."""

    name: str
    process: Process
    log: Path
    ended: asyncio.Task[int]

    def failure(self) -> ChildFailed:
        """Why it ended, from the last line of its log."""
        code = self.process.returncode or 0
        said = last_line(self.log).removeprefix("helixnet: ").removeprefix("helixnet-bootstrap: ") or "it said nothing"
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return ChildFailed(
            f"{self.name} ended {how}: {said} (all of it: {self.log})", 128 - code if code < 0 else code or 1
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def last_line(log: Path) -> str:
    """The last line that is not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """For the children: settings come by flags alone, so HELIXNET_* ones of the person do not reach them."""
    kept = {name: value for name, value in own.items() if not name.startswith("HELIXNET_") or name in _KEPT_VARIABLES}
    return {**kept, "PYTHONUNBUFFERED": "1"}


async def start(name: str, module: str, arguments: Sequence[str], folder: Path) -> Child:
    """Start a module of ours; what it prints goes to `folder/NAME.log`, begun anew.

    Each child has a session of its own, so that Ctrl-C in the terminal reaches only us, and ends when we are gone.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments, "--exit-with-parent", str(os.getpid())),
            stdin=DEVNULL,
            stdout=file,
            stderr=STDOUT,
            env=environment(os.environ),
            start_new_session=True,
        )
    return Child(name, process, log, asyncio.create_task(process.wait()))


async def until_listening(child: Child, host: str, port: int) -> None:
    """Wait until something takes connections at this address.

    Raises:
        ChildFailed: the child that is to listen there ended instead.
        DeadlineExceeded: it did not begin to listen in time.
    """
    deadline = time.monotonic() + LISTEN_S
    while time.monotonic() < deadline:
        if child.ended.done():
            raise child.failure()
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(LISTEN_CHECK_S)
            continue
        writer.close()
        return
    raise DeadlineExceeded(f"{child.name} did not listen on port {port} within {LISTEN_S:.0f} s; see {child.log}")


async def stop_all(children: Sequence[Child], hurry: asyncio.Event) -> None:
    """SIGTERM to the peers, then to the bootstrap peer they take leave of, then SIGKILL; at once if `hurry` is set."""
    peers = [child for child in children if child.name != BOOTSTRAP]
    others = [child for child in children if child.name == BOOTSTRAP]
    for group, patience_s in ((peers, PEERS_STOP_S), (others, BOOTSTRAP_STOP_S)):
        for child in group:
            child.signal(signal.SIGTERM)
        await _wait_for(group, patience_s, hurry)
    for child in children:
        child.signal(signal.SIGKILL)
    if children:
        await asyncio.wait({child.ended for child in children}, timeout=KILL_S)


async def _wait_for(children: Sequence[Child], patience_s: float, hurry: asyncio.Event) -> None:
    """Return when all have ended, time is up, or a person asks to hurry."""
    if not children:
        return
    hurried = asyncio.create_task(hurry.wait())
    ended = asyncio.create_task(asyncio.wait({child.ended for child in children}))
    try:
        await asyncio.wait((hurried, ended), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hurried.cancel()
        ended.cancel()

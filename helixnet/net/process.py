"""One libp2p daemon as a child process, under the guardian, with its sockets in a private folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from helixnet.core.errors import AddressInUse, DeadlineExceeded, NetworkError
from helixnet.net import guardian
from helixnet.net.bindings import daemon_path

START_S = 15.0
STOP_S = guardian.TERMINATE_S + 2.0
LINES_KEPT = 20


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """How the daemon is started. Addresses are multiaddrs with a port of their own (not 0)."""

    identity: Path
    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    trusted_relays: tuple[str, ...] = ()
    public: bool = False
    """Ask the router for a port, find out our reachability, be and use relays, punch holes. Off on one's own network,
    where the daemon then sends nothing to any address it was not told."""

    def arguments(self, control_socket: str) -> list[str]:
        """The daemon's command line."""
        public = int(self.public)
        flags = {
            "listen": f"/unix{control_socket}",
            "id": self.identity,
            "hostAddrs": ",".join(self.listen),
            "announceAddrs": ",".join(self.announce),
            "trustedRelays": ",".join(self.trusted_relays) if self.public else "",
            "dhtServer": 1,
            "connManager": 1,
            "natPortMap": public,
            "autonat": public,
            "relay": public,
            # Without relays of our own the daemon would ask those of the public IPFS network.
            "autoRelay": int(self.public and bool(self.trusted_relays)),
        }
        return [f"-{name}={value}" for name, value in flags.items() if value != ""]


class DaemonProcess:
    """A running daemon. `ended` is done when it has ended for whatever reason."""

    def __init__(self, process: asyncio.subprocess.Process, scratch: str) -> None:
        self._process = process
        self._ready = asyncio.Event()
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._reading = asyncio.create_task(self._read_output())
        self.control_socket = _control_socket(scratch)
        self.stream_socket = os.path.join(scratch, "streams")
        self.ended: asyncio.Task[int] = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, options: DaemonOptions) -> DaemonProcess:
        """Start a daemon and wait until it listens.

        Raises:
            AddressInUse: a port is taken.
            NetworkError: it ended or did not get ready.
            UsageError: hivemind is not installed.
        """
        executable = daemon_path()
        scratch = tempfile.mkdtemp(prefix="helixnet-")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guardian.__file__, scratch, str(executable)),
            *options.arguments(_control_socket(scratch)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
            start_new_session=True,
        )
        started = cls(process, scratch)
        try:
            await started._wait_until_ready()
        except BaseException:
            await started.stop()
            raise
        return started

    @property
    def guardian_pid(self) -> int:
        """The process id of the guardian, whose only child is the daemon."""
        return self._process.pid

    async def stop(self) -> None:
        """End the daemon and its guardian."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        done, _ = await asyncio.wait({self.ended}, timeout=STOP_S)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.ended
        await self._reading

    async def _wait_until_ready(self) -> None:
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({ready, self.ended}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                await self._reading
                raise self._failure()
            if not ready.done():
                raise DeadlineExceeded(
                    f"the libp2p daemon did not start within {START_S:.0f} s; is the machine overloaded?"
                )
        finally:
            ready.cancel()

    def _failure(self) -> NetworkError:
        said = " ".join(self._lines)[-500:] or "it said nothing"
        if "address already in use" in said:
            return AddressInUse(f"a port to listen on is in use; stop what uses it, or listen on another port ({said})")
        return NetworkError(f"the libp2p daemon ended at once: {said}")

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        # Read in blocks: a line longer than a reader's limit must not end this.
        rest = ""
        while data := await self._process.stdout.read(4096):
            *lines, rest = (rest + data.decode(errors="replace")).split("\n")
            rest = rest[-4096:]
            self._lines.extend(line for line in lines if line)
            if any(line.startswith("Peer ID:") for line in lines):
                self._ready.set()


def _control_socket(scratch: str) -> str:
    return os.path.join(scratch, "control")

"""A real swarm on this machine, in a home of its own, for the scripts that measure one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

READY_S = 120.0


@contextlib.asynccontextmanager
async def local_swarm(peers: int, *more: str) -> AsyncIterator[dict[str, Any]]:
    """`helixnet up` with these arguments more; what it says when it is ready. Ends it afterwards."""
    with tempfile.TemporaryDirectory(prefix="helixnet-bench-") as scratch:
        os.environ["HELIXNET_HOME"] = scratch
        command = [sys.executable, "-m", "helixnet", "up", "--peers", str(peers), "--json", *more]
        with (Path(scratch) / "up.log").open("w") as log:
            up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: ASYNC220 - at once
        try:
            assert up.stdout is not None, "a pipe was asked for"
            line = await asyncio.wait_for(asyncio.to_thread(up.stdout.readline), READY_S)
            if not line.strip():
                raise SystemExit(f"helixnet up ended early:\n{(Path(scratch) / 'up.log').read_text()[-2000:]}")
            yield json.loads(line)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(timeout=60)

"""`helixnet-bootstrap` as a real process."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

START_S = 40
STOP_S = 15
PARENT = """
import os, subprocess, sys
subprocess.Popen([*sys.argv[1:], "--exit-with-parent", str(os.getpid())]).wait()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def command(tmp_path: Path, port: int, *more: str) -> list[str]:
    address = f"/ip4/127.0.0.1/tcp/{port}"
    identity = str(tmp_path / "key")
    return [sys.executable, "-m", "helixnet_bootstrap.app", "--listen", address, "--identity", identity, *more]


@contextlib.contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def daemons_at(port: int) -> list[int]:
    """Processes whose command line names the port (ours, the libp2p daemon's and its guardian's do)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"/tcp/{port}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def wait_until_gone(port: int) -> None:
    deadline = time.monotonic() + STOP_S
    while daemons_at(port):
        assert time.monotonic() < deadline, f"still there: {daemons_at(port)}"
        time.sleep(0.05)


def test_it_prints_its_address_keeps_its_identity_and_stops_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    with running(command(tmp_path, port)) as process:
        first = line_of(process)
        assert first.startswith(f"listening on /ip4/127.0.0.1/tcp/{port}/p2p/12D3KooW")
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    wait_until_gone(port)
    with running(command(tmp_path, port, "--json")) as process:
        told = json.loads(line_of(process))
        assert told == {"addresses": [first.split()[-1]], "peer": first.strip().rpartition("/")[2]}
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0
    wait_until_gone(port)


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = subprocess.run(command(tmp_path, port), capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith(f"helixnet-bootstrap: port {port} is in use on 127.0.0.1")
    assert done.stderr.count("\n") == 1


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    port = free_port()
    with running([sys.executable, "-c", PARENT, *command(tmp_path, port)]) as parent:
        assert line_of(parent).startswith("listening on")  # the child writes to the same pipe
        parent.send_signal(signal.SIGKILL)
        parent.wait(STOP_S)
        wait_until_gone(port)

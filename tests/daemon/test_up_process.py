"""`helixnet up` as a person starts it: real processes, real weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

READY_S = 200
STOP_S = 40


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for identities and logs; its path marks every process of the swarm."""
    monkeypatch.setenv("HELIXNET_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def helixnet(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "helixnet.daemon.cli", *arguments]


def processes_of(home: Path) -> list[int]:
    """Everything that has the folder in its command line: peers, libp2p daemons and their guardians."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(home).encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


def wait_until(true: Callable[[], bool], patience_s: float, what: str) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextlib.contextmanager
def up(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = helixnet("up", "--json", *arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: not processes_of(home), STOP_S, f"left behind: {processes_of(home)}")


def test_one_command_gives_a_swarm_that_answers_and_leaves_nothing_behind(home: Path) -> None:
    with up(home, "--peers", "3") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        ready = json.loads(line)
        spans = [peer["span"] for peer in ready["peers"]]
        assert len(spans) == 3
        assert all(stop - start < ready["layers"] for start, stop in spans)
        assert {layer for start, stop in spans for layer in range(start, stop)} == set(range(ready["layers"]))
        assert len({peer["memory_bytes"] for peer in ready["peers"]}) == 3

        asked = helixnet("generate", "What is the capital of France?", "--max-tokens", "20")
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
        assert ("Paris" in answer.stdout, answer.stderr, answer.returncode) == (True, "", 0), answer

        shown = subprocess.run(helixnet("status", "--json"), capture_output=True, text=True, timeout=60, check=True)
        status = json.loads(shown.stdout)
        assert (status["serving"], len(status["peers"]), status["problem"]) == (True, 3, "")

        second = subprocess.run(helixnet("up"), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert "runs on this machine already" in second.stderr

        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
        assert processes_of(home) == []
        assert not (home / "swarm.json").exists()


def test_killed_it_leaves_no_process_either(home: Path) -> None:
    with up(home, "--peers", "2") as process:
        # Two peers and the bootstrap peer, each with a guarded daemon.
        wait_until(lambda: len(processes_of(home)) >= 9, READY_S, "the peers did not start")
        process.kill()
        process.wait(STOP_S)
        wait_until(lambda: not processes_of(home), STOP_S, "processes outlive `helixnet up`")


def test_a_peer_that_cannot_start_ends_everything_with_its_own_words(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(home, "--peers", "2", "--base-port", str(port - 1)) as process:
            said = process.communicate(timeout=READY_S)[1]
        assert process.returncode == 5, said
        assert f"peer-1 ended with exit code 5: port {port} is in use" in said
        assert processes_of(home) == []

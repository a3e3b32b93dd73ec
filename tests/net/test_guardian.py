from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helixnet.net import guardian

WAIT_S = 10.0


def guarded(*command: str, scratch: str = "-") -> list[str]:
    return [sys.executable, "-I", "-S", guardian.__file__, scratch, *command]


def start(*command: str, scratch: str = "-") -> subprocess.Popen[bytes]:
    return subprocess.Popen(guarded(*command, scratch=scratch), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + CHILD


def child_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_the_guardian_forwards_output_and_exit_code() -> None:
    process = start(sys.executable, "-c", "print('hello'); raise SystemExit(7)")
    assert process.stdout is not None
    assert process.stdout.read() == b"hello\n"
    assert process.wait(WAIT_S) == 7


def test_the_child_ends_when_the_life_line_closes() -> None:
    process = start(sys.executable, "-c", CHILD)
    child = child_of(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert not is_alive(child)


def test_the_child_ends_when_the_guardian_is_told_to() -> None:
    process = start(sys.executable, "-c", CHILD)
    child = child_of(process)
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert not is_alive(child)


@pytest.mark.slow
def test_a_child_that_ignores_sigterm_is_killed() -> None:
    process = start(sys.executable, "-c", STUBBORN)
    child = child_of(process)
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGKILL
    assert not is_alive(child)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills orphans on Linux only")
def test_the_child_dies_with_a_killed_guardian() -> None:
    process = start(sys.executable, "-c", CHILD)
    child = child_of(process)
    process.kill()
    process.wait(WAIT_S)
    wait_until(lambda: not is_alive(child))


def test_a_killed_parent_leaves_no_child_behind_and_no_folder(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    parent_code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen({guarded(sys.executable, '-c', CHILD, scratch=str(scratch))!r}, stdin=subprocess.PIPE)\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    child = child_of(parent)
    parent.kill()
    parent.wait(WAIT_S)
    wait_until(lambda: not is_alive(child) and not scratch.exists())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_relative_that_holds_the_life_line_does_not_keep_the_child_alive() -> None:
    parent_code = (
        "import os, subprocess, time\n"
        f"subprocess.Popen({guarded(sys.executable, '-c', CHILD)!r}, stdin=subprocess.PIPE)\n"
        "relative = os.fork()\n"
        "if relative: print(relative, flush=True)\n"
        "time.sleep(30)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    pids = [child_of(parent), child_of(parent)]
    parent.kill()
    parent.wait(WAIT_S)
    # Which line is whose depends on who was faster; the relative lives on, the child does not.
    wait_until(lambda: sum(map(is_alive, pids)) == 1)
    for pid in filter(is_alive, pids):
        os.kill(pid, signal.SIGKILL)

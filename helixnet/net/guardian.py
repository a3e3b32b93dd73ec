"""Runs one child that must not outlive us: `python -I -S guardian.py SCRATCH COMMAND...` (standard library only).

The parent holds the other end of stdin. When it closes (the parent ended, even by SIGKILL), when the parent's id
changes, or on SIGTERM, the child is asked to end and after two seconds made to. The guardian then removes the folder
SCRATCH (`-`: none) and exits with the child's code, or 128 + signal. The child writes straight to our stdout.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

TERMINATE_S = 2.0
PARENT_CHECK_S = 1.0
"""Forked relatives of the parent may hold our stdin open after its death: so look at the parent's id, too."""
_PR_SET_PDEATHSIG = 1


def _die_with_guardian(guardian: int) -> None:
    """In the child, before exec: on Linux the kernel kills it when the guardian dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:  # the guardian died before prctl was called
            os._exit(1)


def _wait(child: subprocess.Popen[bytes], wakeup: int, parent: int) -> None:
    """Return when the child has ended or has to."""
    while child.poll() is None:
        ready, _, _ = select.select([0, wakeup], [], [], PARENT_CHECK_S)
        if 0 in ready and not os.read(0, 4096):
            return
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 4096):
            return
        if os.getppid() != parent:
            return


def _end(child: subprocess.Popen[bytes]) -> int:
    """Make sure the child has ended; its exit code."""
    if child.poll() is None:
        child.terminate()
    try:
        return child.wait(TERMINATE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def main(arguments: list[str]) -> int:
    """Guard one child until it ends."""
    scratch, command = arguments[0], arguments[1:]
    parent, guardian = os.getppid(), os.getpid()
    wakeup, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    # Our own session: Ctrl-C in a terminal is for the parent, which drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _die_with_guardian(guardian))
    try:
        _wait(child, wakeup, parent)
    finally:
        code = _end(child)
        if scratch != "-":
            shutil.rmtree(scratch, ignore_errors=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

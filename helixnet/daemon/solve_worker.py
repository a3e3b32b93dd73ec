"""The planner in a process of its own: one question on stdin, one answer on stdout, then it ends.

A process, not a thread: a solve takes whole seconds of Python, and the coordinator also serves tokens.
It ends by itself when the peer dies, because it reads its question to the end first and then only writes.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec

from helixnet.core.machine import Solve

NICENESS = 10
"""Serving tokens matters more than planning."""


def main() -> None:
    """Entry point of the worker process."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    question = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Solve)
    began = time.perf_counter()
    from helixnet.planner.solve import answer  # late: it loads numpy and HiGHS, which counts as planning

    solved = answer(question)
    seconds = time.perf_counter() - began
    sys.stdout.buffer.write(msgspec.msgpack.encode(msgspec.structs.replace(solved, seconds=seconds)))


if __name__ == "__main__":
    main()

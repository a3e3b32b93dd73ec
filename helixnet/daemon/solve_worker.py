"""The planner in a process of its own: one question on stdin, one answer on stdout, then it ends.

A process, not a thread: a solve takes whole seconds of Python, and the coordinator also serves tokens.
It ends by itself when the peer dies, because it reads its question to the end first and then only writes.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec

from helixnet.core.errors import HelixError
from helixnet.core.machine import Solved
from helixnet.core.plan.plan import Placement
from helixnet.core.plan.snapshot import Snapshot

NICENESS = 10
"""Serving tokens matters more than planning."""


class Question(msgspec.Struct, frozen=True):
    """What is asked of the planner."""

    snapshot: Snapshot
    current: Placement | None
    seed: int
    repair: bool


class Answer(msgspec.Struct, frozen=True):
    """What it says."""

    placement: Placement | None
    current: Placement | None
    problem: str
    seconds: float


def answer(question: Question) -> Answer:
    """Solve, and judge the current placement by the same numbers."""
    import helixnet.planner.solve as planner  # late: it loads numpy and HiGHS

    began = time.perf_counter()
    placement, current, problem = None, None, ""
    try:
        find = planner.mend if question.repair else planner.solve
        placement = find(question.snapshot, question.seed)
        if question.current is not None:
            current = planner.evaluate(question.snapshot, question.current.assignments)
    except HelixError as error:
        problem = str(error)
    return Answer(placement, current, problem, time.perf_counter() - began)


def to_solved(data: bytes) -> Solved:
    """The worker's answer as the outcome that the coordinator takes."""
    said = msgspec.msgpack.decode(data, type=Answer)
    return Solved(said.placement, said.current, said.problem, said.seconds)


def main() -> None:
    """Entry point of the worker process."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    question = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer(question)))


if __name__ == "__main__":
    main()

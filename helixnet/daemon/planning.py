"""Asks the planner in a worker process and never waits for it longer than allowed."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import msgspec

from helixnet.core.machine import Solve, Solved

SOLVE_S_MAX = 50.0
"""Below the coordinator's own patience, so that it learns why."""


async def solve_in_worker(effect: Solve) -> Solved:
    """The planner's answer; a problem in words if the worker failed or took too long."""
    question = msgspec.msgpack.encode(effect)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "helixnet.daemon.solve_worker", stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(SOLVE_S_MAX):
            said, complaint = await worker.communicate(question)
        if worker.returncode != 0:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            return Solved(None, None, f"The planner failed: {last[0]}")
        return msgspec.msgpack.decode(said, type=Solved)
    except TimeoutError:
        return Solved(None, None, f"The planner found no plan within {SOLVE_S_MAX:.0f} s.")
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()

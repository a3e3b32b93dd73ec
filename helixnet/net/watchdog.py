"""Keeps the libp2p daemon alive: asks it for a sign of life, and restarts it when it is dead or hung."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from helixnet.core.errors import HelixError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WatchdogTimes:
    """When to look, when to lose patience."""

    period_s: float = 3.0
    """Between two pings."""
    misses_max: int = 2
    """So many pings in a row without an answer mean that it hangs."""
    backoff_first_s: float = 0.2
    backoff_max_s: float = 10.0
    """Between two attempts to restart; doubles from the first to the last."""


async def watch(
    ping: Callable[[], Awaitable[None]],
    ended: Callable[[], asyncio.Task[int]],
    restart: Callable[[], Awaitable[None]],
    times: WatchdogTimes,
) -> None:
    """Ping every period and restart when needed, for ever. `ping` and `restart` bring their own deadlines.

    `ping` raises a HelixError if nothing came back; `ended()` is the task that is done when the daemon process ends, so
    that a crash is noticed at once and only a hang needs the misses.
    """
    misses = 0
    while True:
        await asyncio.wait({ended()}, timeout=times.period_s)
        if not ended().done():
            try:
                await ping()
                misses = 0
            except HelixError:
                misses += 1
        if ended().done() or misses >= times.misses_max:
            log.warning("the libp2p daemon %s; restarting it", "ended" if ended().done() else "hangs")
            await _restart_until_it_works(restart, times)
            misses = 0


async def _restart_until_it_works(restart: Callable[[], Awaitable[None]], times: WatchdogTimes) -> None:
    pause_s = times.backoff_first_s
    while True:
        try:
            await restart()
            return
        except (HelixError, OSError) as error:
            log.error("the libp2p daemon does not start (%s); trying again in %.1f s", error, pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, times.backoff_max_s)

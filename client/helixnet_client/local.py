"""The swarm that `helixnet up` runs on this machine, if it does."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from helixnet.core.errors import UsageError


class LocalSwarm(msgspec.Struct, frozen=True, kw_only=True):
    """What `helixnet up` leaves in swarm.json while it runs."""

    join: tuple[str, ...]
    network: str
    pid: int
    model: str


def swarm_file() -> Path:
    """Where `helixnet up` writes the address of its swarm."""
    home = os.environ.get("HELIXNET_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share" / "helixnet") / "swarm.json"


def find_local_swarm() -> LocalSwarm | None:
    """The local swarm, or None if none runs (a file left by a process that is gone does not count)."""
    try:
        swarm = msgspec.json.decode(swarm_file().read_bytes(), type=LocalSwarm)
        os.kill(swarm.pid, 0)
    except PermissionError:
        return swarm
    except (OSError, msgspec.DecodeError):
        return None
    return swarm


def addresses_to_join(join: tuple[str, ...], network: str | None) -> tuple[tuple[str, ...], str]:
    """Where to join and which network, given or found on this machine.

    Raises:
        UsageError: neither was given nor does a local swarm run.
    """
    if join:
        return join, network or "main"
    local = find_local_swarm()
    if local is None:
        raise UsageError(
            "No swarm runs on this machine and no address was given. Start one with `helixnet up`, or say where to "
            "join with --join /ip4/.../tcp/.../p2p/..."
        )
    return local.join, network or local.network

"""The one swarm that this machine runs: a lock while it does, and a file that tells clients where it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from helixnet.core.errors import UsageError
from helixnet.daemon.config import home
from helixnet_client.local import LocalSwarm, find_local_swarm, swarm_file


@contextlib.contextmanager
def only_one() -> Iterator[Path]:
    """The folder of the swarm's identities and logs, ours alone while the context lasts.

    Raises:
        UsageError: a swarm runs already.
    """
    folder = home() / "up"
    folder.mkdir(parents=True, exist_ok=True)
    # The kernel lets go of the lock when we die, however that happens: no stale lock is possible.
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            running = find_local_swarm()
            which = f" (process {running.pid}, {running.model})" if running else ""
            raise UsageError(
                f"A swarm runs on this machine already{which}: ask it with `helixnet chat`, or stop it with Ctrl-C "
                "where it was started. HELIXNET_HOME=FOLDER keeps two apart."
            ) from None
        yield folder


@contextlib.contextmanager
def announced(join: Sequence[str], network: str, model: str) -> Iterator[None]:
    """While the context lasts, clients of this machine find the swarm without being told an address."""
    path = swarm_file()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    swarm = LocalSwarm(join=tuple(join), network=network, pid=os.getpid(), model=model)
    part.write_bytes(msgspec.json.encode(swarm))
    part.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)

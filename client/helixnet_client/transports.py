"""How a client reaches the swarm. hivemind's daemon today; the light client adds py-libp2p beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helixnet.core.errors import UsageError
from helixnet.net.base import Directory, Host


@dataclass(frozen=True, slots=True)
class Connection:
    """A way to send messages and a way to look things up."""

    host: Host
    directory: Directory
    clean_up: Callable[[], None]

    async def close(self) -> None:
        """Disconnect and leave nothing behind."""
        await self.directory.close()
        await self.host.close()
        self.clean_up()


class Transport(Protocol):
    """Opens a connection to the network that the addresses belong to."""

    async def __call__(self, join: Sequence[str]) -> Connection: ...


async def libp2p(join: Sequence[str]) -> Connection:
    """Connect through hivemind's libp2p daemon, as a client that nobody can dial.

    Raises:
        UsageError: an address is malformed, or the peer extra is not installed.
        BootstrapUnreachable: none of the addresses answered.
    """
    try:
        from helixnet.net.directory import DhtDirectory
        from helixnet.net.host import HostConfig, Libp2pHost
    except ImportError as error:
        raise UsageError(f"This client needs {error.name}: install helixnet-swarm with the [peer] extra.") from None
    # A client is a stranger each time: its key is made anew and forgotten (but a restarted daemon needs it again).
    scratch = tempfile.TemporaryDirectory(prefix="helixnet-client-")
    host = await Libp2pHost.start(HostConfig(identity_path=Path(scratch.name) / "key", bootstrap=tuple(join)))
    try:
        return Connection(host, await DhtDirectory.start(host, keeps_records=False), scratch.cleanup)
    except BaseException:
        await host.close()
        raise

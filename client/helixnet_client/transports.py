"""How a client reaches the swarm. hivemind's daemon today; the light client adds py-libp2p beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from helixnet.core.errors import UsageError
from helixnet.net.base import Directory, Host


@dataclass(frozen=True, slots=True)
class Connection:
    """A way to send messages and a way to look things up."""

    host: Host
    directory: Directory


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
        from helixnet.net.host import Libp2pHost
    except ImportError as error:
        raise UsageError(f"This client needs {error.name}: install helixnet-swarm with the [peer] extra.") from None
    raise NotImplementedError((join, DhtDirectory, Libp2pHost))

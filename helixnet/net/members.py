"""Who is in a network, read from its directory."""

from __future__ import annotations

from collections.abc import Callable

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.swarm.directory import front_key
from helixnet.core.swarm.records import PeerRecord, decode_record
from helixnet.core.types import PeerId
from helixnet.net.base import Directory

Refused = Callable[[PeerId, str], None]


async def read_members(
    directory: Directory, network: str, on_refused: Refused | None = None, key: str | None = None
) -> list[PeerRecord]:
    """The records under a key of a network, by id; without one, those in its front. Of one that is malformed
    `on_refused` hears whose it is and why.

    Raises:
        NetworkError: the directory did not answer in time.
    """
    records: list[PeerRecord] = []
    for owner, value in sorted((await directory.read(key or front_key(network))).items()):
        try:
            records.append(decode_record(owner, value))
        except RemoteProtocolError as error:
            if on_refused is not None:
                on_refused(owner, str(error))
    return records

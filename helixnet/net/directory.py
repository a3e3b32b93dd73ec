"""Records in the DHT: hivemind's DHTNode in our own event loop, over the daemon of a Libp2pHost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from helixnet.core.errors import DeadlineExceeded, NetworkError
from helixnet.core.swarm.records import RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId
from helixnet.net.base import Directory, check_record
from helixnet.net.bindings import Bindings, load_bindings
from helixnet.net.envelope import SignatureValidator, payload_of, seal
from helixnet.net.host import Libp2pHost

__all__ = ["DhtDirectory", "Directory"]

START_S = 15.0
PUBLISH_S = 8.0
READ_S = 8.0
LEAVE_S = 2.0
RPC_S = 3.0
"""What one other peer may take to answer."""
KEYS_MAX = 4_096
"""Keys that this peer keeps for others; more are refused."""


class DhtDirectory:
    """A `Directory` that every peer (bootstrap peers included) keeps a part of; made by `start`."""

    def __init__(self, host: Libp2pHost, bindings: Bindings, keeps_records: bool) -> None:
        self._host = host
        self._keeps_records = keeps_records
        self._bindings = bindings
        self._validator = SignatureValidator()
        self._storage = _bounded_storage(bindings)
        self._p2p: Any = None
        self._node: Any = None
        self._node_id: Any = None

    @classmethod
    async def start(cls, host: Libp2pHost, *, keeps_records: bool = True) -> DhtDirectory:
        """Join the DHT of the host's bootstrap peers, or begin one. Restarts itself with the host's daemon.

        With `keeps_records=False` it only asks: a client that soon leaves should not be looked for later.

        Raises:
            DeadlineExceeded: the daemon does not answer.
        """
        made = cls(host, await asyncio.to_thread(load_bindings), keeps_records)
        await made._join()
        host.on_restart(made._rejoin)
        return made

    async def publish(self, key: str, value: bytes, lifetime_s: float) -> bool:
        """See `Directory`.

        Raises:
            DeadlineExceeded: too few peers answered in time.
        """
        check_record(value, lifetime_s)
        expiry = time.time() + lifetime_s
        envelope = seal(self._host.identity, key, expiry, bytes(value))
        async with _deadline(PUBLISH_S, "store the record"):
            node = await self._ready_node()
            return bool(await node.store(key.encode(), envelope, expiry, subkey=self._host.peer_id))

    async def read(self, key: str) -> dict[PeerId, bytes]:
        """See `Directory`; of more than RECORDS_PER_KEY_MAX the ones that live longest, in the order of their ids.

        Raises:
            DeadlineExceeded: no answer in time.
        """
        async with _deadline(READ_S, "find the records"):
            node = await self._ready_node()
            found = await node.get(key.encode(), latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        now = time.time()
        alive = [(-entry.expiration_time, peer, entry.value) for peer, entry in found.value.items()]
        chosen = sorted(entry for entry in alive if -entry[0] > now)[:RECORDS_PER_KEY_MAX]
        return {PeerId(peer): payload_of(envelope) for _, peer, envelope in sorted(chosen, key=lambda entry: entry[1])}

    async def close(self) -> None:
        """See `Directory`. The host stays."""
        node, self._node = self._node, None
        if node is not None:
            with contextlib.suppress(TimeoutError, Exception):  # the daemon may be dead already
                async with asyncio.timeout(LEAVE_S):
                    await node.shutdown()
        await self._detach()

    async def _join(self) -> None:
        control = self._bindings.multiaddr(f"/unix{self._host.control_socket}")
        async with _deadline(START_S, "start"):
            self._p2p = await self._bindings.p2p.replicate(control)
            node = await self._bindings.dht_node.create(
                p2p=self._p2p,
                node_id=self._node_id,
                initial_peers=[address.text for address in self._host.bootstrap],
                wait_timeout=RPC_S,
                client_mode=not self._keeps_records,
                # Records are renewed all the time and read as the latest: a cache would only return old ones.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                record_validator=self._validator,
                ensure_bootstrap_success=False,
                strict=False,
            )
        node.protocol.storage = self._storage  # bounded, and kept when the daemon restarts
        node.protocol.cache = _bounded_storage(self._bindings)
        self._node_id = node.node_id
        self._node = node

    async def _rejoin(self) -> None:
        self._node = None
        await self._detach()
        await self._join()

    async def _detach(self) -> None:
        p2p, self._p2p = self._p2p, None
        if p2p is None:
            return
        control = getattr(getattr(p2p, "_client", None), "control", None)
        tasks = [task for name in ("_read_task", "_write_task") if (task := getattr(control, name, None)) is not None]
        await p2p.shutdown()
        if tasks:  # they end now, not when the loop does; one may have failed with the daemon, which is no news
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ready_node(self) -> Any:
        """The node; if it has lost everyone (a bootstrap peer was away), introduce it again."""
        node = self._node
        if node is None:
            raise NetworkError("the directory is not running; it comes back with the libp2p daemon")
        if not node.protocol.routing_table.uid_to_peer_id and self._host.bootstrap:
            ids = [self._bindings.peer_id.from_base58(address.peer) for address in self._host.bootstrap]
            await asyncio.gather(*(node.protocol.call_ping(peer) for peer in ids))
        return node


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise DeadlineExceeded when time is up, and NetworkError for whatever hivemind raises."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"the directory did not {what} within {seconds:.0f} s") from None
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(f"the directory did not {what}: {type(error).__name__}: {error}") from error


def _bounded_storage(bindings: Bindings) -> Any:
    """A storage for hivemind with limits on keys and on records under one key."""

    class BoundedStorage(bindings.dht_storage):  # type: ignore[misc, name-defined]
        """Refuses what is new when it is full; what it has can be renewed."""

        def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
            if key not in self and len(self) >= KEYS_MAX:
                return False
            return bool(super().store(key, value, expiration_time, subkey))

        def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
            entry = self.get(key)
            if entry is None:
                if len(self) >= KEYS_MAX:
                    return False
            elif len(entry.value) >= RECORDS_PER_KEY_MAX and subkey not in entry.value:
                return False
            return bool(super().store_subkey(key, subkey, value, expiration_time))

    return BoundedStorage()

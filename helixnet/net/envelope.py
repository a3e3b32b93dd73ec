"""What the DHT stores: a value that only its peer can have written, for one key and until one moment.

```
envelope = f64 expiry (Unix time) | 64 bytes Ed25519 | payload
signed   = "helixnet record 1" | 20 bytes key | peer id | f64 expiry | payload
```
hivemind stores dictionaries: under a key (the SHA-1 of its name) one value for each subkey. Without a check anyone
could overwrite any record with a far-future expiry. So the subkey is the id of the peer that signed, and the expiry is
signed.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import OrderedDict
from typing import Protocol

import msgspec

from helixnet.core.types import PeerId
from helixnet.net.base import RECORD_LIFETIME_MAX_S
from helixnet.net.identity import Identity, verify

STORED_BYTES_MAX = 4_096
CLOCK_SKEW_S = 10.0
"""How far the clock of an honest peer may be ahead of ours; expiries are Unix times."""
VERIFIED_MAX = 8_192

_DOMAIN = b"helixnet record 1"
_EXPIRY = struct.Struct("!d")
_OVERHEAD = _EXPIRY.size + 64


class StoredRecord(Protocol):
    """hivemind's DHTRecord. Subkey and value are msgpack: here a string and bytes."""

    @property
    def key(self) -> bytes: ...
    @property
    def subkey(self) -> bytes: ...
    @property
    def value(self) -> bytes: ...
    @property
    def expiration_time(self) -> float: ...


def key_id(key: str) -> bytes:
    """The 20 bytes by which hivemind finds the bytes of `key`."""
    return hashlib.sha1(key.encode(), usedforsecurity=False).digest()


def seal(identity: Identity, key: str, expiry: float, payload: bytes) -> bytes:
    """The envelope of `payload`."""
    stamp = _EXPIRY.pack(expiry)
    return stamp + identity.sign(_signed(key_id(key), identity.peer_id, stamp, payload)) + payload


def payload_of(envelope: bytes) -> bytes:
    """What is inside an envelope that was checked when it came."""
    return envelope[_OVERHEAD:]


def _signed(key: bytes, peer: str, stamp: bytes, payload: bytes) -> bytes:
    return b"".join((_DOMAIN, key, peer.encode(), stamp, payload))


class SignatureValidator:
    """hivemind's validator interface: asked about each record that others store with us or return to us."""

    def __init__(self) -> None:
        # Each read brings the same records from several peers: check a signature once (0.1 ms, times 256 records).
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def validate(self, record: StoredRecord) -> bool:
        """Whether the record may be stored or believed."""
        if len(record.value) > STORED_BYTES_MAX or len(record.subkey) > STORED_BYTES_MAX or len(record.key) != 20:
            return False
        try:
            peer = msgspec.msgpack.decode(record.subkey, type=str)
            envelope = msgspec.msgpack.decode(record.value, type=bytes)
        except (msgspec.DecodeError, UnicodeError):
            return False
        if len(envelope) < _OVERHEAD:
            return False
        (expiry,) = _EXPIRY.unpack_from(envelope)
        # Written so that a NaN is refused, too.
        if expiry != record.expiration_time or not expiry <= time.time() + RECORD_LIFETIME_MAX_S + CLOCK_SKEW_S:
            return False
        return self._is_signed(record.key, peer, envelope)

    def sign_value(self, record: StoredRecord) -> bytes:
        """The value as it is: `seal` has signed it."""
        return record.value

    def strip_value(self, record: StoredRecord) -> bytes:
        """The value as it is: the reader takes the payload out."""
        return record.value

    def _is_signed(self, key: bytes, peer: str, envelope: bytes) -> bool:
        digest = hashlib.sha256(b"".join((key, peer.encode(), b"\0", envelope))).digest()
        if digest in self._verified:
            return True
        stamp, signature, payload = envelope[: _EXPIRY.size], envelope[_EXPIRY.size : _OVERHEAD], envelope[_OVERHEAD:]
        if not verify(PeerId(peer), _signed(key, peer, stamp, payload), signature):
            return False
        self._verified[digest] = None
        if len(self._verified) > VERIFIED_MAX:
            self._verified.popitem(last=False)
        return True

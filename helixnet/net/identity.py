"""Who a peer is: an Ed25519 key in a file. The peer id holds the public key, so anyone can check its signatures."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from helixnet.core.errors import UsageError
from helixnet.core.types import PeerId

# libp2p's key file and public key are protobufs {1: key type (1 = Ed25519), 2: bytes}; the peer id of a key this short
# is its "identity" multihash (code 0): the key itself. https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
_PRIVATE_PREFIX = b"\x08\x01\x12\x40"
_PUBLIC_PREFIX = b"\x08\x01\x12\x20"
_ID_PREFIX = b"\x00" + bytes([len(_PUBLIC_PREFIX) + 32]) + _PUBLIC_PREFIX
_FILE_BYTES = len(_PRIVATE_PREFIX) + 64
_ID_CHARS_MAX = 64


class Identity:
    """A peer's key pair. Never log it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id = peer_id_of(key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def sign(self, data: bytes) -> bytes:
        """64 bytes that `verify(peer_id, data, ...)` accepts."""
        return self._key.sign(data)

    def to_bytes(self) -> bytes:
        """The key as the libp2p daemon reads it."""
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        """A new key pair."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in the file at `path`, which is made (mode 0600) if it does not exist.

        Raises:
            UsageError: the file is damaged or cannot be read or written.
        """
        try:
            if not path.exists():
                _write_new(path, cls.generate().to_bytes())
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"cannot use the identity file {path}: {error.strerror}; check its folder's rights"
            ) from None
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path | str = "given") -> Identity:
        """The identity in `data`; `path` is for the message.

        Raises:
            UsageError: not an Ed25519 key as `to_bytes` writes it.
        """
        if len(data) == _FILE_BYTES and data.startswith(_PRIVATE_PREFIX):
            key = Ed25519PrivateKey.from_private_bytes(data[len(_PRIVATE_PREFIX) :][:32])
            if key.public_key().public_bytes_raw() == data[-32:]:
                return cls(key)
        raise UsageError(
            f"the identity file {path} is damaged: restore it from a backup, or move it away and the peer "
            "will start with a new identity (and a new peer id)"
        )


def _write_new(path: Path, data: bytes) -> None:
    """Write the file whole or not at all; if another process was faster, its file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a raw 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_ID_PREFIX + public_key).decode())


def public_key_of(peer: PeerId) -> bytes | None:
    """The raw Ed25519 public key inside a peer id; None if it is not such an id in its one canonical spelling."""
    if len(peer) > _ID_CHARS_MAX:
        return None
    try:
        data = base58.b58decode(peer)
    except (ValueError, UnicodeError):
        return None
    if len(data) != len(_ID_PREFIX) + 32 or not data.startswith(_ID_PREFIX) or base58.b58encode(data).decode() != peer:
        return None
    return data[len(_ID_PREFIX) :]


@functools.lru_cache(maxsize=1024)
def _verifier(peer: PeerId) -> Ed25519PublicKey | None:
    key = public_key_of(peer)
    return None if key is None else Ed25519PublicKey.from_public_bytes(key)


def verify(peer: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by `peer`; False for any garbage."""
    try:
        key = _verifier(peer)
        if key is None:
            return False
        key.verify(bytes(signature), bytes(data))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True

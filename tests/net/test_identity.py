from __future__ import annotations

import stat
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixnet.core.errors import UsageError
from helixnet.core.types import PeerId
from helixnet.net.base import RECORD_VALUE_BYTES_MAX
from helixnet.net.envelope import STORED_BYTES_MAX, SignatureValidator, key_id, payload_of, seal
from helixnet.net.identity import Identity, peer_id_of, public_key_of, verify

ALICE, BOB = Identity.generate(), Identity.generate()


def test_an_identity_survives_a_restart_and_its_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x08\x01\x12\x40", ALICE.to_bytes()[:-1], ALICE.to_bytes()[:-1] + b"\x00\x00"],
    ids=["empty", "only its head", "a byte short", "a byte long"],
)
def test_a_damaged_key_file_says_what_to_do(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(damage)
    with pytest.raises(UsageError, match="damaged: restore it"):
        Identity.load_or_create(path)


def test_a_key_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot use the identity file"):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


def test_the_peer_id_is_the_public_key() -> None:
    key = public_key_of(ALICE.peer_id)
    assert key is not None
    assert peer_id_of(key) == ALICE.peer_id
    assert ALICE.peer_id.startswith("12D3KooW")


def test_only_the_signers_id_verifies_a_signature() -> None:
    signature = ALICE.sign(b"data")
    assert verify(ALICE.peer_id, b"data", signature)
    assert not verify(BOB.peer_id, b"data", signature)
    assert not verify(ALICE.peer_id, b"Data", signature)


@given(st.text(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_verify_says_no_to_garbage_and_never_raises(peer: str, data: bytes, signature: bytes) -> None:
    assert not verify(PeerId(peer), data, signature)
    assert not verify(ALICE.peer_id, data, signature)


def test_a_key_is_never_shown() -> None:
    assert repr(ALICE) == f"Identity({ALICE.peer_id})"


@dataclass(frozen=True)
class Stored:
    """As hivemind hands records to a validator."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


def stored(lifetime_s: float = 60, payload: bytes = b"payload") -> Stored:
    """Alice's record under the key `k`."""
    expiry = time.time() + lifetime_s
    envelope = msgspec.msgpack.encode(seal(ALICE, "k", expiry, payload))
    return Stored(key_id("k"), msgspec.msgpack.encode(ALICE.peer_id), envelope, expiry)


def test_a_sealed_record_is_accepted_again_and_again_and_opens() -> None:
    validator, record = SignatureValidator(), stored()
    assert validator.validate(record)
    assert validator.validate(record)
    assert payload_of(msgspec.msgpack.decode(record.value)) == b"payload"


def test_the_largest_payload_fits() -> None:
    record = stored(payload=bytes(RECORD_VALUE_BYTES_MAX))
    assert len(record.value) <= STORED_BYTES_MAX
    assert SignatureValidator().validate(record)


FORGERIES: dict[str, dict[str, Any]] = {
    "another key": {"key": key_id("other")},
    "another peer's name": {"subkey": msgspec.msgpack.encode(BOB.peer_id)},
    "no subkey": {"subkey": b"\xc0"},
    "a whole dictionary": {"subkey": b""},
    "a longer life than was signed": {"expiration_time": time.time() + 100},
    "not an envelope": {"value": msgspec.msgpack.encode(b"short")},
    "not bytes": {"value": msgspec.msgpack.encode("text")},
    "not msgpack": {"value": b"\xc1"},
    "too large": {"value": msgspec.msgpack.encode(bytes(STORED_BYTES_MAX))},
    "no id at all": {"subkey": msgspec.msgpack.encode("12D3KooW")},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_record_is_refused(forgery: str) -> None:
    validator = SignatureValidator()
    assert validator.validate(stored())
    assert not validator.validate(replace(stored(), **FORGERIES[forgery]))


@pytest.mark.parametrize("lifetime_s", [140, 1e9, float("inf"), float("nan")])
def test_a_record_that_would_live_too_long_is_refused_though_it_is_signed(lifetime_s: float) -> None:
    assert not SignatureValidator().validate(stored(lifetime_s=lifetime_s))


@settings(max_examples=200)
@given(st.binary(max_size=30), st.binary(max_size=90), st.binary(max_size=200), st.floats())
def test_garbage_records_are_refused_and_never_raise(key: bytes, subkey: bytes, value: bytes, expiry: float) -> None:
    validator = SignatureValidator()
    assert not validator.validate(Stored(key, subkey, value, expiry))
    stamped = msgspec.msgpack.encode(struct.pack("!d", expiry) + value + bytes(64))
    assert not validator.validate(Stored(key_id("k"), msgspec.msgpack.encode(ALICE.peer_id), stamped, expiry))

from __future__ import annotations

import contextlib
import socket

import pytest

from helixnet.core.errors import AddressInUse, UsageError
from helixnet.net.address import parse_address, parse_bootstrap, pin_port
from helixnet.net.identity import Identity

ID = Identity.generate().peer_id

GOOD = [
    "/ip4/127.0.0.1/tcp/0",
    "/ip4/0.0.0.0/udp/31337/quic-v1",
    "/ip6/::1/tcp/31337",
    "/dns4/example.org/tcp/443",
    f"/dns/example.org/tcp/31337/p2p/{ID}",
    f"/ip4/1.2.3.4/tcp/4001/p2p/{ID}/p2p-circuit/p2p/{ID}",
]
BAD = [
    "",
    "127.0.0.1:31337",
    "/ip4/127.0.0.1",
    "/ip4/1.2.3.400/tcp/1",
    "/ip4/1.2.3.4/tcp/65536",
    "/ip4/1.2.3.4/udp/1",
    "/ip4/1.2.3.4/tcp/1/quic-v1",
    "/ip4/1.2.3.4/tcp/one",
    "/ip4/1.2.3.4/tcp/1/p2p/nobody",
    "/ip4/1.2.3.4/tcp/1/p2p/QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
    "/unix/tmp/socket",
    "/ip4/1.2.3.4/tcp/1\n",
]


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_an_address_is_taken_apart(text: str) -> None:
    address = parse_address(text)
    assert address.text == text
    assert text.startswith(address.without_peer)
    assert (address.peer == ID) == text.endswith(f"/p2p/{ID}")


@pytest.mark.parametrize("text", BAD)
def test_a_malformed_address_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not an address|does not end with the id"):
        parse_address(text)


def test_a_bootstrap_address_must_name_its_peer() -> None:
    with pytest.raises(UsageError, match="lacks the peer id"):
        parse_bootstrap(["/ip4/1.2.3.4/tcp/4001"])


@pytest.mark.parametrize("text", ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"])
def test_port_zero_becomes_a_free_port(text: str) -> None:
    address = pin_port(parse_address(text))
    assert address.port > 0
    assert address.text == text.replace(f"/{address.transport}/0", f"/{address.transport}/{address.port}")


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), reuse_port=True)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port} is in use"):
            pin_port(parse_address(f"/ip4/127.0.0.1/tcp/{port}"))


def test_another_machines_address_cannot_be_listened_on() -> None:
    with pytest.raises(AddressInUse, match="not an address of this machine"):
        pin_port(parse_address("/ip4/203.0.113.7/tcp/0"))
    with pytest.raises(UsageError, match="cannot be listened on"):
        pin_port(parse_address("/dns4/example.org/tcp/0"))

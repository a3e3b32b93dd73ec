"""Multiaddrs as people type them, checked before anything is started with them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from helixnet.core.errors import AddressInUse, UsageError
from helixnet.core.types import PeerId
from helixnet.net.identity import public_key_of

_ADDRESS = re.compile(
    r"/(?P<net>ip4|ip6|dns|dns4|dns6|dnsaddr)/(?P<host>[^/\s]{1,253})"
    r"(/(?P<transport>tcp|udp)/(?P<port>\d{1,5})(?P<quic>/quic-v1)?)?"
    r"(/p2p/(?P<relay>[1-9A-HJ-NP-Za-km-z]{20,128})/p2p-circuit)?"
    r"(/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{20,128}))?"
)
EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True)
class Address:
    """One multiaddr, taken apart: `transport_text` is the part before `/p2p/`."""

    text: str
    net: str
    host: str
    transport: str
    port: int
    peer: PeerId | None

    @property
    def without_peer(self) -> str:
        """The address without the final `/p2p/ID`."""
        return self.text.removesuffix(f"/p2p/{self.peer}") if self.peer else self.text

    def with_port(self, port: int) -> Address:
        """The same address at another port."""
        text = self.text.replace(f"/{self.transport}/{self.port}", f"/{self.transport}/{port}", 1)
        return Address(text, self.net, self.host, self.transport, port, self.peer)


def parse_address(text: str) -> Address:
    """The address in `text`.

    Raises:
        UsageError: it is not a multiaddr that HelixNet can listen on or dial.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or match["transport"] is None or (match["transport"] == "udp") != bool(match["quic"]):
        raise UsageError(f"{text!r} is not an address; write it like {EXAMPLE} (or /udp/PORT/quic-v1)")
    if match["net"] in ("ip4", "ip6"):
        try:
            ipaddress.ip_address(match["host"])
        except ValueError:
            raise UsageError(f"{text!r} is not an address: {match['host']!r} is not an IP address") from None
    port = int(match["port"])
    if port > 65535:
        raise UsageError(f"{text!r} is not an address: ports end at 65535")
    return Address(text, match["net"], match["host"], match["transport"], port, _peer(match, text))


def _peer(match: re.Match[str], text: str) -> PeerId | None:
    if match["peer"] is None:
        return None
    if public_key_of(PeerId(match["peer"])) is None:
        raise UsageError(f"{text!r} does not end with the id of a HelixNet peer (they begin with 12D3KooW)")
    return PeerId(match["peer"])


def parse_bootstrap(texts: Sequence[str]) -> tuple[Address, ...]:
    """Addresses to join by; each must say whom to expect there.

    Raises:
        UsageError: one is malformed or has no peer id.
    """
    found = tuple(parse_address(text) for text in texts)
    for address in found:
        if address.peer is None:
            raise UsageError(f"{address.text!r} lacks the peer id of the bootstrap peer; write it like {EXAMPLE}")
    return found


def pin_port(address: Address) -> Address:
    """The address with port 0 replaced by a free port; otherwise the same, after checking that nobody listens there.

    The libp2p daemon sets SO_REUSEPORT: a second one on the same port would start without an error and take half of
    the first one's connections. Hence our own check beforehand.

    Raises:
        AddressInUse: the port is taken, or the address is not this machine's.
    """
    if address.net not in ("ip4", "ip6"):
        raise UsageError(f"{address.text!r} cannot be listened on: use an IP address of this machine, or 0.0.0.0")
    family = socket.AF_INET6 if address.net == "ip6" else socket.AF_INET
    kind = socket.SOCK_STREAM if address.transport == "tcp" else socket.SOCK_DGRAM
    with contextlib.closing(socket.socket(family, kind)) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise AddressInUse(_cannot_bind(address, error)) from None
        return address.with_port(int(probe.getsockname()[1]))


def _cannot_bind(address: Address, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {address.port} is in use on {address.host}; stop what uses it, or listen on another port"
        case errno.EADDRNOTAVAIL:
            return f"{address.host} is not an address of this machine; listen on 0.0.0.0 or on one that is"
        case errno.EACCES:
            return f"port {address.port} needs administrator rights; listen on a port above 1023"
        case _:
            return f"cannot listen on {address.text}: {error.strerror}"

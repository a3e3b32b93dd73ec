"""`helixnet-bootstrap`: an entry point to the DHT, and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from helixnet import __version__
from helixnet.console import Parser, add_parent_option, end_with_parent, run_command
from helixnet.core.wire.messages import Goodbye
from helixnet.net.base import Host, Received

LISTEN = "/ip4/0.0.0.0/tcp/31337"
EXAMPLE = """example:
  helixnet-bootstrap --listen /ip4/0.0.0.0/tcp/31337 --identity identity.key

It prints the addresses to hand out; peers join with `helixnet peer --join ADDRESS`.
Ctrl-C or SIGTERM ends it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    return run_command(make_parser(), argv)


def make_parser() -> Parser:
    """The command line of `helixnet-bootstrap`."""
    parser = Parser(
        prog="helixnet-bootstrap",
        description="An entry point for peers that join: it takes part in the directory (DHT) and serves no layers.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--listen", action="append", metavar="ADDR", help=f"where to listen; may be repeated (default: {LISTEN})"
    )
    parser.add_argument(
        "--identity", type=Path, metavar="PATH", help="file of the key that gives this peer its id; made if missing"
    )
    parser.add_argument(
        "--announce", action="append", metavar="ADDR", default=[], help="address to tell others; may be repeated"
    )
    parser.add_argument(
        "--join", action="append", metavar="ADDR", default=[], help="another bootstrap peer of the same directory"
    )
    parser.add_argument(
        "--public", action="store_true", help="let the router forward a port, be a relay, help others punch holes"
    )
    parser.add_argument("--json", action="store_true", help='print {"addresses": [...], "peer": ID} instead of lines')
    parser.add_argument("--version", action="version", version=f"helixnet-bootstrap {__version__}")
    add_parent_option(parser)
    parser.set_defaults(func=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UsageError: an address is malformed, or the identity file cannot be used.
        AddressInUse: the port is taken.
        NetworkError: the libp2p daemon does not start.
    """
    end_with_parent(arguments.exit_with_parent)
    asyncio.run(_serve(arguments))
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    from helixnet.net.directory import DhtDirectory
    from helixnet.net.host import HostConfig, Libp2pHost

    stopped = _stop_signal()
    host = await Libp2pHost.start(
        HostConfig(
            identity_path=arguments.identity or identity_path(),
            listen=tuple(arguments.listen or (LISTEN,)),
            announce=tuple(arguments.announce),
            bootstrap=tuple(arguments.join),
            profile="public" if arguments.public else "local",
        )
    )
    try:
        directory = await DhtDirectory.start(host)
        try:
            _tell(host.peer_id, host.addresses(), as_json=arguments.json)
            refusing = asyncio.create_task(_refuse_requests(host))
            await stopped.wait()
            refusing.cancel()
        finally:
            await directory.close()
    finally:
        await host.close()


async def _refuse_requests(host: Host) -> None:
    """Whoever takes this for a peer that serves is told so, instead of waiting for an answer."""
    while True:
        item = await host.receive()
        if isinstance(item, Received):
            host.post(item.sender, Goodbye(reason="a bootstrap peer serves no layers; ask one of the peers"))


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once, and the daemon with it."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopped


def _tell(peer: str, addresses: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"addresses": list(addresses), "peer": peer}), flush=True)
        return
    for address in addresses:
        print(f"listening on {address}")
    if sys.stdout.isatty():
        print("Peers join with `helixnet peer --join ADDRESS`. Ctrl-C ends this bootstrap peer.")
    sys.stdout.flush()


def identity_path() -> Path:
    """Where the key is kept if no `--identity` is given."""
    home = os.environ.get("HELIXNET_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share" / "helixnet") / "bootstrap.key"


if __name__ == "__main__":
    sys.exit(main())

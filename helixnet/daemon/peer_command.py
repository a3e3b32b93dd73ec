"""`helixnet peer`: lend this machine to a swarm."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from helixnet.console import add_parent_option, end_with_parent
from helixnet.daemon.arguments import add_command, add_engine_arguments, add_join_arguments, settings_from

if TYPE_CHECKING:
    from helixnet.core.machine import Event
    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.narrate import Narrator

EXAMPLE = "helixnet peer --join /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... --memory 6GB --name kitchen"


def add_peer_parser(commands: Commands) -> None:
    """Add the `peer` command."""
    parser = add_command(commands, "peer", "lend this machine to a swarm until Ctrl-C", EXAMPLE)
    parser.add_argument("--model", metavar="M", help="folder, GGUF file, hub id or name (see `helixnet models`)")
    add_join_arguments(parser)
    parser.add_argument(
        "--memory", metavar="SIZE", help="for weights and KV, such as 6GB (default: most of what is free)"
    )
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: the number measured as fastest)"
    )
    add_engine_arguments(parser)
    parser.add_argument("--name", help="what people call this peer (default: this machine's name)")
    parser.add_argument("--listen", action="append", metavar="ADDR", help="where to listen; may be repeated")
    parser.add_argument("--announce", action="append", metavar="ADDR", help="address to tell others; may be repeated")
    parser.add_argument(
        "--identity", metavar="PATH", help="file of the key that gives this peer its id; made if missing"
    )
    parser.add_argument("--preset", metavar="P", help="timing that suits the network: lan, wan or home (default: lan)")
    parser.add_argument(
        "--public", action="store_true", help="let the router forward a port, accept relays, punch holes"
    )
    add_parent_option(parser)
    parser.set_defaults(func=run_peer)


def run_peer(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; drains first.

    Raises:
        HelixError: whatever keeps this peer from serving.
    """
    end_with_parent(arguments.exit_with_parent)
    settings = settings_from(arguments)

    from rich.console import Console

    from helixnet.daemon.app import PeerProcess, run_until_signal
    from helixnet.daemon.models_command import pull
    from helixnet.daemon.narrate import Narrator

    console = Console(highlight=False)
    model = pull(settings.model, console, dtype=settings.dtype, quantize=settings.quantize, adapter=settings.adapter)
    console.print(f"serving {model.manifest.name} to the network {settings.network!r} as {settings.peer_name}")
    narrator = Narrator(console, lambda: process.peer)

    def on_event(event: Event) -> None:
        narrator(event)
        if event.kind == "peer.joined":
            _refresh_for_ever(narrator)

    process = PeerProcess(settings, on_event)
    try:
        run_until_signal(process)
    finally:
        narrator.close()
    return 0


def _refresh_for_ever(narrator: Narrator) -> None:
    from helixnet.daemon.narrate import REFRESH_S

    narrator.refresh()
    asyncio.get_running_loop().call_later(REFRESH_S, _refresh_for_ever, narrator)

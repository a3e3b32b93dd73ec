"""`helixnet status`: what the swarm is and does now."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from helixnet.daemon.arguments import add_client_arguments, add_command, client_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.status_report import StatusReport
    from helixnet_client import AsyncClient

EXAMPLE = "helixnet status --watch"
WATCH_S = 1.0
JSON_HELP = """

keys of --json (the last line of the output):
  version, network, model, manifest_hash, layers, context_tokens, term, coordinator, serving, problem
  plan   term, epoch, active, predicted_tokens_per_s, observed_tokens_per_s, flow_tokens_per_s,
         bound_tokens_per_s, share_of_bound, predicted_ttft_s, predicted_tpot_s, bottleneck
  peers  [id, name, state, coordinator, held [[start, stop]], planned [start, stop], device, memory_bytes,
         matmul_flops, memory_bandwidth, decode_tokens_per_s, decode_batch_tokens_per_s,
         prefill_tokens_per_s, tokens_per_s, sessions, kv_free, uptime_s]
  links  [source, target, round_trip_s, bandwidth]
  flows  [source, target, planned_tokens_per_s, observed_tokens_per_s]     source or target may be "clients"
Spans are half-open, bandwidths bytes/s; measured rates are of one layer."""


def add_status_parser(commands: Commands) -> None:
    """Add the `status` command."""
    parser = add_command(
        commands, "status", "show the swarm's peers, layers, links, plan and flow", EXAMPLE + JSON_HELP
    )
    add_client_arguments(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object on one line")
    shape.add_argument("--watch", action="store_true", help="keep showing it, every second, until Ctrl-C")
    parser.set_defaults(func=run_status)


def run_status(arguments: argparse.Namespace) -> int:
    """Ask the swarm and print what it says.

    Raises:
        HelixError: no swarm was found, or nobody answered.
    """
    asyncio.run(_ask(arguments))
    return 0


async def _ask(arguments: argparse.Namespace) -> None:
    import msgspec
    from rich.console import Console

    from helixnet.daemon.status_view import render
    from helixnet_client import AsyncClient

    console = Console(highlight=False)
    async with AsyncClient(**client_arguments(arguments)) as client:
        status = await fresh_report(client)
        if arguments.json:
            print(msgspec.json.encode(status).decode(), flush=True)
        elif arguments.watch:
            await _watch(client, status, console)
        else:
            console.print(render(status))


async def _watch(client: AsyncClient, status: StatusReport, console: Console) -> None:
    from rich.live import Live

    from helixnet.daemon.status_view import render

    with Live(render(status), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            await asyncio.sleep(WATCH_S)
            live.update(render(await fresh_report(client)), refresh=True)


async def fresh_report(client: AsyncClient) -> StatusReport:
    """The swarm as its coordinator sees it now.

    Raises:
        NetworkError: nobody answered in time.
    """
    from helixnet.daemon.status_report import report

    return report(await client.status(), client.swarm.network)

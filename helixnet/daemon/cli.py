"""The `helixnet` command. Importing it and asking for help loads nothing heavy: each command imports what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helixnet import __version__
from helixnet.console import Parser, run_command
from helixnet.daemon.doctor_command import add_doctor_parser
from helixnet.daemon.generate_command import add_chat_parser, add_generate_parser
from helixnet.daemon.models_command import add_models_parser
from helixnet.daemon.peer_command import add_peer_parser
from helixnet.daemon.plan_command import add_plan_parser
from helixnet.daemon.sim_command import add_sim_parser
from helixnet.daemon.status_command import add_status_parser
from helixnet.daemon.up_command import add_up_parser

EXAMPLES = """try it on this machine:
  helixnet up                                   a swarm of three peers, until Ctrl-C
  helixnet chat                                 in another terminal: talk to it

lend this machine to a swarm:
  helixnet peer --join /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... --memory 6GB

plan a swarm before there is one:
  helixnet plan examples/office-and-home.toml --html plan.html
  helixnet sim --cluster examples/office-and-home.toml --load 2rps     what it would serve, minute by minute

Settings can also come from ~/.config/helixnet/config.toml or HELIXNET_* variables (HELIXNET_MEMORY=6GB).
HELIXNET_HOME holds identities and logs, HELIXNET_CACHE models. HELIXNET_DEBUG=1 adds tracebacks to errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `helixnet` with these arguments (None: those of the process) and return its exit code."""
    return run_command(make_parser(), argv)


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="helixnet",
        description="Serve large language models together, on the computers people own.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"helixnet {__version__}")
    made: type[argparse.ArgumentParser] = Parser
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=made)
    add_up_parser(commands)
    add_generate_parser(commands)
    add_chat_parser(commands)
    add_status_parser(commands)
    add_peer_parser(commands)
    add_models_parser(commands)
    add_plan_parser(commands)
    add_sim_parser(commands)
    add_doctor_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

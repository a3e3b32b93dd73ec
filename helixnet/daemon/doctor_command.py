"""`helixnet doctor`: can this machine take part, and if not, what to do about it."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from helixnet.daemon.arguments import add_command, add_join_arguments, settings_from

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from helixnet.daemon.arguments import Commands
    from helixnet.daemon.doctor import Finding

EXAMPLE = "helixnet doctor --join /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def add_doctor_parser(commands: Commands) -> None:
    """Add the `doctor` command."""
    parser = add_command(commands, "doctor", "check this machine, and say what to fix", EXAMPLE)
    add_join_arguments(parser)
    parser.add_argument("--model", metavar="M", help="check that the memory budget is enough for a layer of this model")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument("--memory", metavar="SIZE", help="the budget that `helixnet peer` would be given")
    parser.add_argument("--listen", action="append", metavar="ADDR", help="where `helixnet peer` would listen")
    parser.add_argument("--json", action="store_true", help='print [{"check", "outcome", "says", "fix"}]')
    parser.set_defaults(func=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if anything failed.

    Raises:
        ConfigError: a setting is unknown or bad.
    """
    import msgspec

    from helixnet.daemon.doctor import examine

    settings = settings_from(arguments)
    findings = asyncio.run(_examine_aloud(examine(settings), quiet=arguments.json))
    failed = sum(finding.outcome == "fail" for finding in findings)
    if arguments.json:
        print(msgspec.json.encode(findings).decode())
    else:
        warned = sum(finding.outcome == "warn" for finding in findings)
        word = "This machine can take part." if not failed else "This machine cannot take part until that is fixed."
        print(f"\n{word} {failed} failed, {warned} to look at, {len(findings) - failed - warned} fine.")
    return 1 if failed else 0


async def _examine_aloud(findings: AsyncIterator[Finding], *, quiet: bool) -> list[Finding]:
    """All findings; each is printed as soon as it is there."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    collected = []
    async for finding in findings:
        collected.append(finding)
        if not quiet:
            mark, style = MARKS[finding.outcome]
            console.print(f"[{style}]{mark}[/] [bold]{finding.check}[/]  {escape(finding.says)}", soft_wrap=True)
            if finding.fix:
                console.print(f"    [{style}]{escape(finding.fix)}[/]", soft_wrap=True)
    return collected

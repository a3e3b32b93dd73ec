"""Arguments that several commands share, and the settings that they become."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from helixnet.engine.weights.keeping import ADAPTER_HELP, QUANTIZE_HELP

if TYPE_CHECKING:
    from helixnet.daemon.config import Settings

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

ADDRESS_EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."


def add_command(commands: Commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A command with its one-line help and an example."""
    description = summary[0].upper() + summary[1:] + "."
    return commands.add_parser(name, help=summary, description=description, epilog=f"example:\n  {example}")


def add_join_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the swarm is; without it, the one that `helixnet up` runs on this machine."""
    parser.add_argument(
        "--join",
        action="append",
        metavar="ADDR",
        help=f"address of a bootstrap peer ({ADDRESS_EXAMPLE}); may be repeated (default: the swarm of `helixnet up`)",
    )
    parser.add_argument("--network", metavar="NAME", help="the network's name (default: main)")
    add_config_argument(parser)


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """What commands take that ask a swarm."""
    add_join_arguments(parser)
    parser.add_argument("--model", metavar="M", help="which model, if the network serves several")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Who computes, and with which numbers."""
    parser.add_argument(
        "--engine", metavar="E", help="auto, torch or vllm (default: auto, whichever is installed and faster here)"
    )
    parser.add_argument("--vllm-python", metavar="FILE", help="a Python that has vLLM, if this one has not")
    parser.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16; the same on every peer")
    parser.add_argument("--quantize", metavar="Q", help=f"{QUANTIZE_HELP}; the same on every peer")
    parser.add_argument("--adapter", metavar="DIR", help=f"{ADAPTER_HELP}; the same on every peer")


def client_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Client` and `AsyncClient` take, from a command's flags and the settings elsewhere.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    settings = settings_from(arguments)
    # "main" said nowhere means: whatever network the swarm of this machine has.
    network = arguments.network or (settings.network if settings.network != "main" else None)
    return {"join": settings.join, "network": network, "model": arguments.model}


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Another config file than the usual one."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings (~/.config/helixnet/config.toml)")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings of a command: defaults, config file, HELIXNET_* variables, flags.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    from helixnet.daemon.config import load_settings

    flags = {name.replace("-", "_"): value for name, value in vars(arguments).items() if value is not False}
    return load_settings(flags, arguments.config, os.environ)

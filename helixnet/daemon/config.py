"""Configuration, read once: defaults, then a TOML file, then HELIXNET_* variables, then flags.

```toml
# ~/.config/helixnet/config.toml (or --config FILE); every key is optional
network = "main"
join = ["/ip4/192.0.2.7/tcp/31337/p2p/12D3Koo..."]
memory = "6GB"
preset = "home"
```
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from helixnet.core.errors import ConfigError
from helixnet.core.presets import PRESETS
from helixnet.engine.kinds import WISHES

MEMORY_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ENV_PREFIX = "HELIXNET_"
ENV_OF_OTHERS = frozenset({"HOME", "CACHE", "ARTIFACT", "DEBUG"})
"""HELIXNET_* variables that are not settings of this file."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of every command, checked."""

    network: str = "main"
    join: tuple[str, ...] = ()
    model: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    adapter: str | None = None
    memory: str | None = None
    device: str = "auto"
    threads: int | None = None
    engine: str = "auto"
    vllm_python: str | None = None
    """The Python that has vLLM, if it is not the one that runs the peer."""
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    name: str = ""
    identity: str | None = None
    preset: str = "lan"
    public: bool = False
    """Let routers forward a port, accept relays and punch holes; off on a network of one's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,40}", self.network):
            raise ConfigError(f"A network's name is 1 to 40 letters, digits, dots and dashes, not {self.network!r}.")
        if self.engine not in WISHES:
            raise ConfigError(f"The engine is one of {', '.join(WISHES)}, not {self.engine!r}.")
        if self.preset not in PRESETS:
            raise ConfigError(f"The preset is one of {', '.join(PRESETS)}, not {self.preset!r}.")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"The number of threads is 1 to 1024, not {self.threads}.")
        if self.memory is not None:
            parse_memory(self.memory)

    @property
    def peer_name(self) -> str:
        """What people call this peer."""
        return (self.name or socket.gethostname())[:64]

    @property
    def listen_addresses(self) -> tuple[str, ...]:
        """Where to listen: what was asked, else loopback only for a swarm of this machine, else everywhere."""
        if self.listen:
            return self.listen
        local = all("/ip4/127." in address or "/ip6/::1/" in address for address in self.join)
        return ("/ip4/127.0.0.1/tcp/0",) if local else ("/ip4/0.0.0.0/tcp/0",)


def parse_memory(text: str) -> int:
    """Bytes of `2GB`, `1.5 GiB`, `600MB`.

    Raises:
        ConfigError: not a number with a unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    if not match or match[2].upper() not in MEMORY_UNITS:
        raise ConfigError(f"Memory is a number with a unit, such as 2GB or 600MB, not {text!r}.")
    return int(float(match[1]) * MEMORY_UNITS[match[2].upper()])


def home() -> Path:
    """Where identities and the address of a local swarm are kept."""
    return Path(os.environ.get("HELIXNET_HOME") or Path.home() / ".local" / "share" / "helixnet")


def load_settings(flags: Mapping[str, Any], config_file: str | None, env: Mapping[str, str]) -> Settings:
    """The settings of one command. `flags` that are None were not given.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is bad.
    """
    values: dict[str, Any] = {}
    values |= _from_file(config_file)
    values |= _from_env(env)
    values |= {key: value for key, value in flags.items() if value is not None and key in _fields()}
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"A setting has a bad value: {error}.") from None


def _fields() -> tuple[str, ...]:
    return Settings.__struct_fields__


def _from_file(config_file: str | None) -> dict[str, Any]:
    default = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "helixnet" / "config.toml"
    path = Path(config_file) if config_file else default
    if not config_file and not path.is_file():
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The config file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} is not valid TOML: {error}.") from None
    for key in values:
        _check_key(key, f"in {path}")
    return values


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in sorted(env.items()):
        if not name.startswith(ENV_PREFIX) or name.removeprefix(ENV_PREFIX) in ENV_OF_OTHERS:
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        _check_key(key, "in the environment", shown=name)
        values[key] = text.split(",") if key in ("join", "listen", "announce") else text
    return values


def _check_key(key: str, where: str, shown: str = "") -> None:
    if key in _fields():
        return
    near = difflib.get_close_matches(key, _fields(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(_fields())}."
    raise ConfigError(f"Unknown setting {shown or key!r} {where}.{hint}")

"""The cluster file: machines, links, model and workload as a person writes them down, to plan what is not there yet.

TOML or JSON with the same keys; docs/planning.md describes them. Two steps: `parse` gives the entries, checked one by
one (so that peers can be added and removed), `build` makes the snapshot that the planner takes.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from typing import Any, TypeVar

import msgspec

from helixnet.core.errors import UsageError
from helixnet.core.types import LAYERS_MAX

PEERS_MAX = 1024
NAME_CHARS_MAX = 40
DEFAULT_REGION = "here"
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")
CLIENTS = "clients"
"""What edges call both their ends; no peer may."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file. What is None was not said."""


class ModelEntry(_Entry, frozen=True, kw_only=True):
    """A well-known model by its name, or any other by its numbers; a number that is said counts."""

    name: str
    layers: int | None = None
    hidden_size: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    dtype: str = "bfloat16"
    context_tokens: int | None = None
    layer_mb: float | None = None
    embedding_mb: float | None = None
    head_mb: float | None = None


class WorkloadEntry(_Entry, frozen=True, kw_only=True):
    """The typical request."""

    prompt_tokens: int = 256
    output_tokens: int = 256


class PeerEntry(_Entry, frozen=True, kw_only=True):
    """One peer, or `count` alike, which are then called NAME-1, NAME-2 and so on.

    Rates come from what was measured with a layer of this model (`decode` and `prefill`: pairs of tokens and seconds),
    else from the device's own figures (`tflops`, `bandwidth_gb`), else from the catalogue's `gpu`.
    """

    name: str
    gpu: str | None = None
    region: str = DEFAULT_REGION
    count: int = 1
    memory_gb: float | None = None
    tflops: float | None = None
    bandwidth_gb: float | None = None
    decode: tuple[tuple[int, float], ...] | None = None
    prefill: tuple[tuple[int, float], ...] | None = None

    def names(self) -> list[str]:
        """What its peers are called."""
        return [self.name] if self.count == 1 else [f"{self.name}-{n}" for n in range(1, self.count + 1)]


class LinkEntry(_Entry, frozen=True, kw_only=True):
    """A link between two peers or regions, in both directions."""

    between: tuple[str, str] | None = None
    """None only for `default` and `within`, which name nobody."""
    round_trip_ms: float
    mbit: float
    """Mbit/s from the first to the second."""
    back_mbit: float | None = None
    """Mbit/s from the second to the first, if that differs."""


class LinksEntry(_Entry, frozen=True, kw_only=True):
    """What is said of links; the more particular counts: peers, regions, within, default."""

    default: LinkEntry | None = None
    within: LinkEntry | None = None
    """Between peers of one region."""
    regions: tuple[LinkEntry, ...] = ()
    peers: tuple[LinkEntry, ...] = ()


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file, each entry checked for itself."""

    model: ModelEntry
    workload: WorkloadEntry
    peers: tuple[PeerEntry, ...]
    links: LinksEntry

    def names(self) -> list[str]:
        """All peers, in the order of the file."""
        return [name for entry in self.peers for name in entry.names()]


Table = TypeVar("Table", bound=_Entry)


def parse(text: str, *, is_json: bool = False) -> ClusterFile:
    """The entries of a cluster file.

    Raises:
        UsageError: not TOML or JSON, an unknown key, a value that cannot be, two peers of one name.
    """
    try:
        raw = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"The cluster file is not valid {'JSON' if is_json else 'TOML'}: {error}.") from None
    if not isinstance(raw, dict):
        raise UsageError("The cluster file is a table with model, peers and links.")
    unknown = sorted(raw.keys() - {"model", "workload", "peers", "links"})
    if unknown:
        raise UsageError(f"The cluster file has an unknown key {unknown[0]!r}; it has model, workload, peers, links.")
    if "model" not in raw:
        raise UsageError('The cluster file says no model: add [model] with name = "llama-3.1-70b", say.')
    rows = raw.get("peers") or []
    if not isinstance(rows, list) or not rows:
        raise UsageError("The cluster file has no peers: add a [[peers]] table for each machine.")
    peers = tuple(_entry(row, PeerEntry, _called(row, n)) for n, row in enumerate(rows, 1))
    cluster = ClusterFile(
        model=_entry(raw["model"], ModelEntry, "model"),
        workload=_entry(raw.get("workload", {}), WorkloadEntry, "workload"),
        peers=peers,
        links=_entry(raw.get("links", {}), LinksEntry, "links"),
    )
    check(cluster)
    return cluster


def _called(row: object, number: int) -> str:
    name = row.get("name") if isinstance(row, dict) else None
    return f"peer {name!r}" if isinstance(name, str) else f"peer number {number}"


def _entry(raw: Any, kind: type[Table], where: str) -> Table:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        said = re.sub(r" - at `\$\.?(.*)`$", r" (\1)", str(error)).replace(" ()", "")
        raise UsageError(f"In the cluster file, {where}: {said}. It has {', '.join(kind.__struct_fields__)}.") from None


def check(cluster: ClusterFile) -> None:
    """Raise UsageError unless every number can be and every name is unique and known."""
    if cluster.workload.prompt_tokens < 1 or cluster.workload.output_tokens < 1:
        raise UsageError("The workload's prompt_tokens and output_tokens are at least 1.")
    _check_model(cluster.model)
    for entry in cluster.peers:
        _check_peer(entry)
    names = cluster.names()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Two peers are called {twice[0]!r}: every peer needs a name of its own.")
    if len(names) > PEERS_MAX:
        raise UsageError(f"The cluster has {len(names)} peers; at most {PEERS_MAX} can be planned.")
    regions = {entry.region for entry in cluster.peers}
    for link in (cluster.links.default, cluster.links.within):
        if link is not None:
            _check_link(link, None, "")
    for link in cluster.links.regions:
        _check_link(link, regions, "region")
    for link in cluster.links.peers:
        _check_link(link, set(names), "peer")


def _check_model(model: ModelEntry) -> None:
    if model.layers is not None and not 1 <= model.layers <= LAYERS_MAX:
        raise UsageError(f"A model has 1 to {LAYERS_MAX} layers, not {model.layers}.")
    for key in ("hidden_size", "kv_heads", "head_dim", "context_tokens", "layer_mb"):
        _positive(getattr(model, key), f"The model's {key}")
    for key in ("embedding_mb", "head_mb"):
        if getattr(model, key) != 0:
            _positive(getattr(model, key), f"The model's {key}")


def _check_peer(entry: PeerEntry) -> None:
    name = entry.name
    if not _NAME.fullmatch(name) or name == CLIENTS:
        raise UsageError(
            f"A peer's name is 1 to {NAME_CHARS_MAX} letters, digits, dots and dashes, and not {CLIENTS!r}: {name!r}."
        )
    if not 1 <= entry.count <= PEERS_MAX:
        raise UsageError(f"The count of peer {name!r} is 1 to {PEERS_MAX}, not {entry.count}.")
    for key in ("memory_gb", "tflops", "bandwidth_gb"):
        _positive(getattr(entry, key), f"The {key} of peer {name!r}")
    if (entry.tflops is None) != (entry.bandwidth_gb is None):
        raise UsageError(f"Peer {name!r} gives only one of tflops and bandwidth_gb: rates need both.")
    if (entry.decode is None) != (entry.prefill is None):
        raise UsageError(f"Peer {name!r} gives only one of decode and prefill: measured rates need both.")
    for key, curve in (("decode", entry.decode), ("prefill", entry.prefill)):
        for tokens, seconds in curve or ():
            _positive(tokens, f"The tokens in {key} of peer {name!r}")
            _positive(seconds, f"The seconds in {key} of peer {name!r}")
    if entry.gpu is None and entry.decode is None and entry.tflops is None:
        raise UsageError(f"Nothing says how fast peer {name!r} is: give gpu, or tflops and bandwidth_gb, or decode.")
    if entry.gpu is None and entry.memory_gb is None:
        raise UsageError(f"Nothing says how much memory peer {name!r} has: give memory_gb or gpu.")


def _check_link(entry: LinkEntry, known: set[str] | None, noun: str) -> None:
    if known is None:
        where = "The default link" if entry.between is None else "A link under default or within names nobody"
        if entry.between is not None:
            raise UsageError(f"{where}: give links between two under [[links.regions]] or [[links.peers]].")
    elif entry.between is None:
        raise UsageError(f'A link of [[links.{noun}s]] does not say which: add between = ["a", "b"].')
    else:
        a, b = entry.between
        where = f"The link between {a!r} and {b!r}"
        stranger = next((name for name in (a, b) if name not in known), None)
        if stranger is not None:
            raise UsageError(f"{where} names a {noun} that is not there: {stranger!r}. There is {_some(known)}.")
        if noun == "peer" and a == b:
            raise UsageError(f"{where} leads from a peer to itself.")
    if not (math.isfinite(entry.round_trip_ms) and entry.round_trip_ms >= 0):
        raise UsageError(f"{where} needs a round_trip_ms of 0 or more, not {entry.round_trip_ms:g}.")
    _positive(entry.mbit, f"The mbit of {where[0].lower()}{where[1:]}")
    _positive(entry.back_mbit, f"The back_mbit of {where[0].lower()}{where[1:]}")


def _positive(value: float | None, what: str) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{what} must be a number above 0, not {value:g}.")


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")


def change(cluster: ClusterFile, add: list[str], remove: list[str]) -> ClusterFile:
    """The same cluster with devices of the catalogue added (`rtx4090@region`) and peers removed by name.

    Removing the name of a group removes all of it. Added peers are called by their device, numbered if need be.

    Raises:
        UsageError: an unknown peer, device or region; nobody is left.
    """
    peers = list(cluster.peers)
    for name in remove:
        peers = _without(peers, name)
    for text in add:
        gpu, _, region = text.partition("@")
        region = region or peers[0].region if peers else region or DEFAULT_REGION
        taken = {name for entry in (*cluster.peers, *peers) for name in (entry.name, *entry.names())}
        base = re.sub(r"[^A-Za-z0-9.-]", "", gpu) or "peer"
        numbers = (base if n == 1 else f"{base}-{n}" for n in range(1, PEERS_MAX))
        name = next(name for name in numbers if name not in taken)
        peers.append(PeerEntry(name=name, gpu=gpu, region=region))
    if not peers:
        raise UsageError("--remove leaves nobody: a plan needs at least one peer.")
    left = {name for entry in peers for name in entry.names()}
    pairs = [link for link in cluster.links.peers if link.between is not None and set(link.between) <= left]
    regions = {entry.region for entry in peers}
    ways = [link for link in cluster.links.regions if link.between is not None and set(link.between) <= regions]
    links = msgspec.structs.replace(cluster.links, peers=tuple(pairs), regions=tuple(ways))
    changed = msgspec.structs.replace(cluster, peers=tuple(peers), links=links)
    check(changed)
    return changed


def _without(peers: list[PeerEntry], name: str) -> list[PeerEntry]:
    for index, entry in enumerate(peers):
        if name == entry.name:
            return peers[:index] + peers[index + 1 :]
        if name in entry.names():
            others = [msgspec.structs.replace(entry, name=other, count=1) for other in entry.names() if other != name]
            return peers[:index] + others + peers[index + 1 :]
    names = {other for entry in peers for other in entry.names()}
    raise UsageError(f"There is no peer {name!r} to remove. There is {_some(names)}.")

"""A cluster file as the planner sees it: a snapshot, the workload, and where peers stand and their rates come from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from helixnet.core.errors import UsageError
from helixnet.core.model import DTYPE_BYTES, Manifest
from helixnet.core.plan.snapshot import Link, PeerView, Snapshot
from helixnet.core.swarm.capability import BATCHES_MAX, Capability, RatePoint
from helixnet.core.types import PeerId
from helixnet.planner.catalogue import GB, MEMORY_SHARE, Gpu, find_gpu, roofline
from helixnet.planner.cluster_file import ClusterFile, LinkEntry, ModelEntry, PeerEntry
from helixnet.planner.model_shapes import SHAPES
from helixnet.planner.problem import Workload

CATALOGUE, GIVEN, MEASURED = "catalogue", "given", "measured"
"""Where rates come from: a data sheet, the file's figures of the device, the file's timings of a layer."""
MBIT = 125_000
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is planned for, and what people want to see beside it."""

    snapshot: Snapshot
    workload: Workload
    regions: dict[PeerId, str]
    rates: dict[PeerId, str]
    """CATALOGUE, GIVEN or MEASURED."""


def build(file: ClusterFile) -> Cluster:
    """The cluster of a checked file.

    Raises:
        UsageError: an unknown model or GPU, numbers missing, two peers that no link joins.
    """
    manifest = manifest_of(file.model)
    work = Workload(prompt_tokens=file.workload.prompt_tokens, output_tokens=file.workload.output_tokens)
    if work.tokens > manifest.context_tokens:
        raise UsageError(
            f"A request of {work.prompt_tokens} and {work.output_tokens} tokens does not fit the context of "
            f"{manifest.name}, which has {manifest.context_tokens}."
        )
    members = sorted((PeerId(name), entry) for entry in file.peers for name in entry.names())
    views = []
    rates = {}
    for peer, entry in members:
        capability, rates[peer] = _capability(entry, manifest)
        views.append(PeerView(peer=peer, capability=capability))
    regions = {peer: entry.region for peer, entry in members}
    snapshot = Snapshot(manifest=manifest, peers=tuple(views), links=tuple(_links(file, regions)))
    return Cluster(snapshot, work, regions, rates)


def manifest_of(model: ModelEntry) -> Manifest:
    """The model that an entry stands for; its hashes are empty, because no weights are meant.

    Raises:
        UsageError: numbers are missing that the name does not give.
    """
    if model.dtype not in DTYPE_BYTES:
        raise UsageError(f"The model's dtype is one of {', '.join(DTYPE_BYTES)}, not {model.dtype!r}.")
    shape = SHAPES.get(re.sub(r"-instruct$|-chat$", "", model.name.lower()))
    missing = [key for key in ("layers", "hidden_size", "kv_heads", "head_dim") if getattr(model, key) is None]
    missing += ["layer_mb"] if model.layer_mb is None else []
    if shape is None and missing:
        raise UsageError(
            f"The model {model.name!r} is not known by name, so {', '.join(missing)} must be given. "
            f"Known are {', '.join(SHAPES)}."
        )

    def number(key: str, otherwise: int) -> int:
        said = getattr(model, key)
        return int(said if said is not None else getattr(shape, key) if shape else otherwise)

    def size(key: str, otherwise: int) -> int:
        said = getattr(model, key)
        return otherwise if said is None else int(said * MB)

    end = shape.end_bytes(model.dtype) if shape else 0
    return Manifest(
        name=model.name,
        architecture="",
        layers=number("layers", 0),
        hidden_size=number("hidden_size", 0),
        vocab_size=shape.vocab_size if shape else 1,
        context_tokens=number("context_tokens", 1 << 20),
        kv_heads=number("kv_heads", 0),
        head_dim=number("head_dim", 0),
        dtype=model.dtype,
        layer_bytes=max(1, size("layer_mb", shape.layer_bytes(model.dtype) if shape else 0)),
        embedding_bytes=size("embedding_mb", end),
        head_bytes=size("head_mb", end),
        source_format="",
        config_sha256="",
        tokenizer_sha256="",
        weights_sha256="",
    )


def _capability(entry: PeerEntry, manifest: Manifest) -> tuple[Capability, str]:
    gpu = find_gpu(entry.gpu) if entry.gpu is not None else None
    memory = entry.memory_gb * GB if entry.memory_gb is not None else gpu.memory_gb * GB * MEMORY_SHARE if gpu else 0.0
    source = CATALOGUE
    if entry.tflops is not None and entry.bandwidth_gb is not None:
        gpu = Gpu(gpu.name if gpu else "device", entry.tflops, memory / GB, entry.bandwidth_gb)
        source = GIVEN
    if entry.decode is None or entry.prefill is None:
        assert gpu is not None, "the file was checked"
        return roofline(gpu, manifest, int(memory)), source
    decode, prefill = (_curve(entry, key) for key in ("decode", "prefill"))
    capability = Capability(
        device=gpu.name if gpu else "device",
        matmul_flops=2 * manifest.layer_bytes / DTYPE_BYTES[manifest.dtype] * prefill[-1].tokens / prefill[-1].seconds,
        memory_bandwidth=manifest.layer_bytes / decode[0].seconds,
        decode=decode,
        prefill=prefill,
        memory_bytes=int(memory),
    )
    return capability, MEASURED


def _curve(entry: PeerEntry, key: str) -> tuple[RatePoint, ...]:
    points: tuple[tuple[int, float], ...] = getattr(entry, key)
    tokens = [count for count, _ in points]
    if not 1 <= len(points) <= BATCHES_MAX or tokens != sorted(set(tokens)):
        raise UsageError(f"The {key} of peer {entry.name!r} needs 1 to {BATCHES_MAX} pairs with ascending tokens.")
    return tuple(RatePoint(count, seconds) for count, seconds in points)


def _links(file: ClusterFile, regions: dict[PeerId, str]) -> list[Link]:
    """A link for every ordered pair.

    Raises:
        UsageError: nothing is said of some pair.
    """
    by_peers = _both_ways(file.links.peers)
    by_regions = _both_ways(file.links.regions)
    links = []
    for source, here in regions.items():
        for target, there in regions.items():
            if source == target:
                continue
            entry = by_peers.get((source, target)) or by_regions.get((here, there))
            entry = entry or (file.links.within if here == there else None) or file.links.default
            if entry is None:
                raise UsageError(_no_link(source, target, here, there))
            links.append(
                Link(
                    source=source,
                    target=target,
                    round_trip_s=entry.round_trip_ms / 1000,
                    bandwidth=entry.mbit * MBIT,
                )
            )
    return links


def _both_ways(entries: tuple[LinkEntry, ...]) -> dict[tuple[str, str], LinkEntry]:
    ways: dict[tuple[str, str], LinkEntry] = {}
    for entry in entries:
        assert entry.between is not None, "the file was checked"
        a, b = entry.between
        if (a, b) in ways:
            raise UsageError(f"The link between {a!r} and {b!r} is given twice.")
        ways[b, a] = LinkEntry(between=(b, a), round_trip_ms=entry.round_trip_ms, mbit=entry.back_mbit or entry.mbit)
        ways[a, b] = entry
    return ways


def _no_link(source: str, target: str, here: str, there: str) -> str:
    if here == there:
        return (
            f"Nothing joins {source!r} and {target!r}, both in region {here!r}: add links.within or links.default "
            "with round_trip_ms and mbit."
        )
    return (
        f'Nothing joins region {here!r} with region {there!r}: add [[links.regions]] with between = ["{here}", '
        f'"{there}"], round_trip_ms and mbit, or links.default.'
    )

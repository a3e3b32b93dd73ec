"""The files that the paper's problem instances come in, read and checked: clusters, profiles, stored placements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from helixnet.core.errors import UsageError
from helixnet.core.types import LAYERS_MAX
from helixnet.planner.cluster_file import PEERS_MAX

CLUSTERS, PROFILES, PLACEMENTS, TRACE = "clusters.json", "profiles.json", "placements.json", "azure_conv.json"
FILE_BYTES_MAX = 256 * 2**20
"""A full cluster of PEERS_MAX machines has half a million links, which take about 20 MB."""
POINTS_MAX = 4096
"""Of one timing curve."""
REQUESTS_MAX = 1 << 20
"""Of one trace."""
LINKS = "links_bandwidth_Bps_latency_ms"

Positive = Annotated[float, Meta(gt=0, le=1e18)]
NotNegative = Annotated[float, Meta(ge=0, le=1e18)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
TokenCount = Annotated[int, Meta(ge=1, le=1 << 20)]
Layers = Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
Curve = Annotated[tuple[tuple[NotNegative, NotNegative], ...], Meta(min_length=1, max_length=POINTS_MAX)]
"""[tokens, ms of one layer]."""
Raws = dict[str, msgspec.Raw]
Read = TypeVar("Read")


class ClusterData(msgspec.Struct, frozen=True):
    """One instance of clusters.json."""

    node_types: Annotated[tuple[str, ...], Meta(min_length=1, max_length=PEERS_MAX)]
    links: Raws = msgspec.field(name=LINKS)
    """[bandwidth in bytes/s, latency in ms] by `tail-head`."""
    regions: tuple[int | str, ...] = ()
    num_nodes: int | None = None


class Constants(msgspec.Struct, frozen=True):
    """Of profiles.json: the typical request and the size of a KV block."""

    AVG_INPUT_LEN: Annotated[int, Meta(ge=1, le=1 << 20)] = 750
    AVG_OUTPUT_LEN: Annotated[int, Meta(ge=1, le=1 << 20)] = 240
    VLLM_BLOCK_SIZE: Annotated[int, Meta(ge=1, le=1 << 20)] = 16


class ProfilesMeta(msgspec.Struct, frozen=True):
    """Of profiles.json."""

    constants: Constants = Constants()


class TypeData(msgspec.Struct, frozen=True):
    """What a machine of one type does with one model."""

    prompt_bs2time_ms_per_layer: Curve
    decode_bs2time_ms_per_layer: Curve
    vllm_num_blocks: dict[Layers, Count | None]
    max_num_layers: Annotated[int, Meta(ge=0, le=LAYERS_MAX)] | None = None
    vram_bytes: NotNegative = 0.0
    prompt_max_requests: dict[Layers, Count] = {}
    """Of one batch, by layers held; likewise the three below."""
    prompt_max_tokens: dict[Layers, Count] = {}
    decode_max_tokens: dict[Layers, Count] = {}
    decode_max_context: dict[Layers, Count] = {}


class HardwareData(msgspec.Struct, frozen=True):
    """Network cards of one type of machine, in bytes/s; negative where the type has none in that direction."""

    inbound_nic_speed: float
    outbound_nic_speed: float


class TraceData(msgspec.Struct, frozen=True):
    """azure_conv.json: lengths of requests, and how many arrived in each three seconds."""

    input_tokens: Annotated[tuple[TokenCount, ...], Meta(min_length=1, max_length=REQUESTS_MAX)]
    output_tokens: Annotated[tuple[TokenCount, ...], Meta(min_length=1, max_length=REQUESTS_MAX)]
    arrivals_per_3s: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=REQUESTS_MAX)]


class TypeRates(msgspec.Struct, frozen=True):
    """T(k) of one type of machine in one mix."""

    T_k_tokens_per_s: dict[Layers, NotNegative | None]


class MixData(msgspec.Struct, frozen=True):
    """T(k) of the types of one mix of machines; it depends on what else is in the cluster."""

    mix: dict[str, int]
    per_type: Raws


class ModelData(msgspec.Struct, frozen=True):
    """One model of profiles.json."""

    num_layers: Layers
    activation_bytes_per_token: Positive
    types: Raws
    typical_throughput_by_mix: Raws
    token_size_bytes: Positive = 2.0
    layer_bytes_used_by_simulator: Positive = 1.0


class PlacementData(msgspec.Struct, frozen=True):
    """One stored placement: [type, start, stop, ...] by `compute_node_<machine + 2>`."""

    cluster: str
    model: str
    method: str
    intervals: dict[str, tuple[Any, ...]]
    min_kv_tokens: float | None = None
    """KV tokens that fit in the layer with the least room, in the authors' simulation."""


class PlacementsFile(msgspec.Struct, frozen=True):
    """placements.json."""

    placements: tuple[PlacementData, ...]


class ProfilesFile(msgspec.Struct, frozen=True):
    """profiles.json, its models not yet looked into."""

    models: Raws
    machine_hw: Raws = {}
    meta: ProfilesMeta = msgspec.field(default=ProfilesMeta(), name="_meta")


def read(path: Path, kind: type[Read]) -> Read:
    """A whole file.

    Raises:
        UsageError: it cannot be read or is not what it should be.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise UsageError(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB.")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}. Give the folder that holds {CLUSTERS} and {PROFILES}."
        ) from None
    return decode(data, kind, str(path))


def decode(data: bytes | msgspec.Raw, kind: type[Read], where: str) -> Read:
    """A part of a file; `where` is what to call it.

    Raises:
        UsageError: it is not what it should be.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}.") from None

"""The paper's problem instances, which are data (clusters, profiles, stored placements), as problems of ours.

Flow counts prompt tokens too there, as the authors' T(k) does. Machines are called by their number in the cluster.
Where the data has gaps, the machine is taken to be as slow and as full as with the next more layers known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from helixnet.core.errors import UsageError
from helixnet.core.swarm.capability import RatePoint
from helixnet.core.types import PeerId, Span
from helixnet.planner.artifact_file import (
    CLUSTERS,
    LINKS,
    PLACEMENTS,
    PROFILES,
    TRACE,
    ClusterData,
    Constants,
    Curve,
    HardwareData,
    MixData,
    ModelData,
    PlacementsFile,
    ProfilesFile,
    Raws,
    TraceData,
    TypeData,
    TypeRates,
    decode,
    read,
)
from helixnet.planner.artifact_links import SINK, SOURCE, ClusterLinks, read_links
from helixnet.planner.artifact_stored import stored_machines
from helixnet.planner.case import Case, Machine
from helixnet.planner.migration import Loading
from helixnet.planner.problem import Matrix, PlanPeer, Problem, Spans, Workload, seconds_at

BATCH_MAX = 512
"""Decode steps in the largest batch that rates are given for."""
SESSIONS_MAX = 1 << 20
"""The authors' machines admit whatever their KV memory holds."""
PUBLISHED = "paper"
"""Where the rates come from."""


class Artifact:
    """The folder with clusters.json, profiles.json and (only for `stored`) placements.json.

    Raises:
        UsageError: here and in every method: something is missing, malformed, or not planned for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clusters = read(folder / CLUSTERS, Raws)
        self._profiles = read(folder / PROFILES, ProfilesFile)

    def instances(self) -> tuple[str, ...]:
        """Names of the clusters."""
        return tuple(name for name in self._clusters if not name.startswith("_"))

    def models(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(name for name in self._profiles.models if not name.startswith("_"))

    def problem(self, instance: str, model: str, link_share: float = 1.0) -> Problem:
        """An instance with a model; `link_share` of each bandwidth is planned."""
        return _Reading(self, instance, model).problem(link_share)

    def case(self, instance: str, model: str, link_share: float = 1.0) -> Case:
        """The same with what people want to see beside it."""
        reading = _Reading(self, instance, model)
        return Case(
            problem=reading.problem(link_share),
            workload=Workload(prompt_tokens=self.constants.AVG_INPUT_LEN, output_tokens=self.constants.AVG_OUTPUT_LEN),
            machines=reading.machines(),
            loading=Loading(int(reading.shape.layer_bytes_used_by_simulator), reading.passed_bytes / link_share),
        )

    def stored(self, instance: str, model: str) -> dict[str, Spans]:
        """The placements of this instance and model that the authors stored, by method, in the file's order.

        Some hold more layers than the machine may in `problem`; a method that uses a part of the machines numbers
        only those: they are then the machines of that type, in order. Of two rows of one method the first counts;
        one that names more machines of a type than there are is left out.
        """
        held = self._held(instance, model)
        nodes = range(len(self.cluster(instance).node_types))
        return {name: tuple(by[n][0] if n in by else None for n in nodes) for name, by in held.items()}

    def stored_flow(self, instance: str, model: str, method: str) -> dict[int, float]:
        """Tokens/s through each machine of such a placement in the authors' own simulation of it."""
        held = self._held(instance, model)
        if method not in held:
            raise UsageError(f"No placement of {instance} with {model} is called {method!r}: {', '.join(held)}.")
        return {number: flow for number, (_, flow) in held[method].items()}

    def stored_kv_tokens(self, instance: str, model: str, method: str) -> int | None:
        """KV tokens of the layer with the least room in the authors' own simulation; None if that is not stored."""
        rows = read(self.folder / PLACEMENTS, PlacementsFile).placements
        found = [row.min_kv_tokens for row in rows if (row.cluster, row.model, row.method) == (instance, model, method)]
        return max(0, int(found[0])) if found and found[0] is not None else None

    def _held(self, instance: str, model: str) -> dict[str, dict[int, tuple[Span, float]]]:
        """Spans and flow by machine, by method."""
        nodes, layers = self.cluster(instance).node_types, self.model(model).num_layers
        path = self.folder / PLACEMENTS
        rows = [row for row in read(path, PlacementsFile).placements if (row.cluster, row.model) == (instance, model)]
        found: dict[str, dict[int, tuple[Span, float]]] = {}
        for row in rows:
            held = stored_machines(row, nodes, layers, f"{path}: {row.method} of {instance} with {model}")
            if held is not None:
                found.setdefault(row.method, held)
        return found

    def cluster(self, instance: str) -> ClusterData:
        """What clusters.json says of an instance."""
        if instance not in self.instances():
            raise UsageError(
                f"{self.folder / CLUSTERS} has no instance {instance!r}. It has {', '.join(self.instances())}."
            )
        where = f"{self.folder / CLUSTERS}: {instance}"
        cluster = decode(self._clusters[instance], ClusterData, where)
        for key, count in (("num_nodes", cluster.num_nodes), ("regions", len(cluster.regions) or None)):
            if count is not None and count != len(cluster.node_types):
                raise UsageError(f"{where}: node_types has {len(cluster.node_types)} machines, but {key} {count}.")
        return cluster

    def model(self, model: str) -> ModelData:
        """What profiles.json says of a model."""
        if model not in self.models():
            raise UsageError(f"{self.folder / PROFILES} has no model {model!r}. It has {', '.join(self.models())}.")
        return decode(self._profiles.models[model], ModelData, f"{self.folder / PROFILES}: {model}")

    def profile(self, model: str, kind: str) -> TypeData:
        """What profiles.json says of machines of a type with a model."""
        types, where = self.model(model).types, f"{self.folder / PROFILES}: {model}"
        if kind not in types:
            raise UsageError(f"{where} has no machines of type {kind!r}.")
        return decode(types[kind], TypeData, f"{where}, {kind}")

    def hardware(self, kind: str) -> HardwareData:
        """What profiles.json says of the network cards of a type of machine, or of the coordinator's ends."""
        where = f"{self.folder / PROFILES}: machine_hw"
        if kind not in self._profiles.machine_hw:
            raise UsageError(f"{where} has no machines of type {kind!r}.")
        return decode(self._profiles.machine_hw[kind], HardwareData, f"{where}, {kind}")

    def links(self, instance: str) -> ClusterLinks:
        """The links of an instance."""
        return read_links(self.cluster(instance), f"{self.folder / CLUSTERS}: {instance}, {LINKS}")

    def trace(self) -> TraceData:
        """The conversation trace of azure_conv.json."""
        path = self.folder / TRACE
        trace = read(path, TraceData)
        if len(trace.input_tokens) != len(trace.output_tokens):
            raise UsageError(f"{path} has {len(trace.input_tokens)} inputs, but {len(trace.output_tokens)} outputs.")
        return trace

    @property
    def constants(self) -> Constants:
        """The typical request, and the size of a KV block."""
        return self._profiles.meta.constants


class _Reading:
    """One instance with one model on its way to a problem."""

    def __init__(self, artifact: Artifact, instance: str, model: str) -> None:
        self.artifact, self.instance, self.model = artifact, instance, model
        self.constants = artifact.constants
        self.cluster, self.shape = artifact.cluster(instance), artifact.model(model)
        self.clusters_file, self.profiles_file = artifact.folder / CLUSTERS, artifact.folder / PROFILES

    @property
    def passed_bytes(self) -> float:
        """What passes a link for each token."""
        return self.shape.activation_bytes_per_token + self.shape.token_size_bytes

    def problem(self, link_share: float) -> Problem:
        work, shape = self.constants, self.shape
        by_type = {kind: self._peer(kind) for kind in sorted(set(self.cluster.node_types))}
        peers = [replace(by_type[kind], peer=PeerId(str(n))) for n, kind in enumerate(self.cluster.node_types)]
        links = self.artifact.links(self.instance)
        closed = self._closed_ends(links, peers)
        token_s = shape.activation_bytes_per_token * np.divide(
            1.0, links.bandwidth, out=np.zeros_like(links.bandwidth), where=links.bandwidth > 0
        )
        return Problem(
            model=self.model,
            layers=shape.num_layers,
            layer_bytes=int(shape.layer_bytes_used_by_simulator),
            first_bytes=0,
            last_bytes=0,
            session_tokens=work.AVG_INPUT_LEN + work.AVG_OUTPUT_LEN,
            peers=tuple(_closed(peer, first, last) for peer, (first, last) in zip(peers, closed, strict=True)),
            link_tokens_per_s=_frozen(links.bandwidth * (link_share / self.passed_bytes)),
            output_tokens=work.AVG_OUTPUT_LEN,
            convoys=True,
            link_s=_frozen(links.latency_s + token_s),
            prompt_link_s=_frozen(links.latency_s + work.AVG_INPUT_LEN * token_s),
            flow_per_token=(work.AVG_INPUT_LEN + work.AVG_OUTPUT_LEN) / work.AVG_OUTPUT_LEN,
            sessions_max=SESSIONS_MAX,
        )

    def machines(self) -> tuple[Machine, ...]:
        kinds = self.cluster.node_types
        memory = {kind: int(self.artifact.profile(self.model, kind).vram_bytes) for kind in set(kinds)}
        regions = self.cluster.regions or (0,) * len(kinds)
        return tuple(
            Machine(str(region), kind, memory[kind], PUBLISHED) for region, kind in zip(regions, kinds, strict=True)
        )

    def _peer(self, kind: str) -> PlanPeer:
        """A machine of one type, without a name yet."""
        where = f"{self.profiles_file}: {self.model}, {kind}"
        machine = self.artifact.profile(self.model, kind)
        layers, work = self.shape.num_layers, self.constants
        rates = _known({k: rate for k, rate in self._rates(kind).items() if rate})
        blocks = _known(
            {k: float(count * work.VLLM_BLOCK_SIZE * k) for k, count in machine.vllm_num_blocks.items() if count}
        )
        held_max = min(layers, len(rates), len(blocks))
        if machine.max_num_layers is not None:
            held_max = min(held_max, machine.max_num_layers)
        if not rates:
            raise UsageError(f"{where} has no throughput for any number of layers.")
        prompt = _curve(machine.prompt_bs2time_ms_per_layer, f"{where}, prompt_bs2time_ms_per_layer")
        decoding = _curve(machine.decode_bs2time_ms_per_layer, f"{where}, decode_bs2time_ms_per_layer")
        prefill_s = seconds_at(prompt, work.AVG_INPUT_LEN)
        return PlanPeer(
            peer=PeerId(kind),
            layers_max=(held_max, held_max, held_max, layers if held_max == layers else 0),
            capacity=_capacity(rates, layers),
            kv_token_layers=_kv(blocks, layers),
            kv_first=0,
            kv_last=0,
            batch_rate=_batch_rate(decoding, prefill_s / work.AVG_OUTPUT_LEN),
            decode_s=seconds_at(decoding, 1),
            prefill_s=prefill_s,
            piece_s=prefill_s,
            held=None,
        )

    def _rates(self, kind: str) -> Mapping[int, float | None]:
        """T(k) of a type in this very mix of machines, or else in the one that has most in common with it."""
        counts = Counter(self.cluster.node_types)
        where = f"{self.profiles_file}: {self.model}, typical_throughput_by_mix"
        mixes = [
            (name, decode(raw, MixData, f"{where}, {name!r}"))
            for name, raw in self.shape.typical_throughput_by_mix.items()
        ]
        fitting = [(name, mix) for name, mix in mixes if kind in mix.per_type]
        if not fitting:
            raise UsageError(f"{where} has no mix with machines of type {kind!r}, so their throughput is not known.")

        def distance(pair: tuple[str, MixData]) -> tuple[bool, int, int]:
            mix = pair[1].mix
            others = sum(abs(counts[each] - mix.get(each, 0)) for each in counts.keys() | mix.keys())
            return mix != counts, -len(counts.keys() & mix.keys()), others

        name, mix = min(fitting, key=distance)
        return decode(mix.per_type[kind], TypeRates, f"{where}, {name!r}, {kind}").T_k_tokens_per_s

    def _closed_ends(self, links: ClusterLinks, peers: list[PlanPeer]) -> list[tuple[bool, bool]]:
        """Which machines cannot be an entry, an exit: those whose link there is absent or could limit them.

        Only token ids pass there, so that hardly ever happens; the planner takes the clients' links for unlimited.
        """
        closed = []
        for end, carried in ((SOURCE, links.entry), (SINK, links.exit)):
            need = [max(rate / k for k, rate in enumerate(peer.capacity) if k) for peer in peers]
            closed.append([rate / self.shape.token_size_bytes < most for rate, most in zip(carried, need, strict=True)])
            if all(closed[-1]):
                where = f"{self.clusters_file}: {self.instance}, {LINKS}"
                raise UsageError(f"{where}: no link of the {end} is fast enough for the machine at it.")
        return list(zip(*closed, strict=True))


def _known(values: Mapping[int, float]) -> list[float]:
    """The value for 1, 2, ... as far as any is known; one that is missing is that of the next larger number."""
    filled: list[float] = []
    for k in range(max(values, default=0), 0, -1):
        filled.append(values.get(k, filled[-1] if filled else 0.0))
    return filled[::-1]


def _capacity(rates: list[float], layers: int) -> tuple[float, ...]:
    """Capacity k * T(k) from k = 0 to all layers. The authors count T of the most layers known for any more."""
    by_held = [rates[min(k, len(rates)) - 1] * k for k in range(1, layers + 1)]
    return by_held[0], *by_held


def _kv(room: list[float], layers: int) -> tuple[int, ...]:
    """KV token-layers from k = 0 to all layers; beyond the most layers known in a straight line, as the authors do."""
    if not room:
        return (0,) * (layers + 1)
    step = min(0.0, room[-1] - room[-2]) if len(room) > 1 else -room[-1]
    beyond = [max(0.0, room[-1] + step * more) for more in range(1, layers + 1)]
    return tuple(int(tokens) for tokens in [room[0], *room, *beyond][: layers + 1])


def _batch_rate(decoding: list[RatePoint], extra_s: float) -> tuple[float, ...]:
    """Token-layers/s in batches of 1, 2, ...; each decode step comes with `extra_s` of prefill."""
    rates: list[float] = []
    for batch in range(1, min(BATCH_MAX, max(1, decoding[-1].tokens)) + 1):
        rate = batch / (seconds_at(decoding, batch) + batch * extra_s)
        rates.append(max(rate, rates[-1]) if rates else rate)
    return tuple(rates)


def _curve(points: Curve, where: str) -> list[RatePoint]:
    """By tokens, in seconds, without the empty batch: a smaller one than measured takes as long as the smallest."""
    by_tokens = {int(tokens): milliseconds for tokens, milliseconds in sorted(points) if tokens >= 1}
    if not by_tokens or min(by_tokens.values()) <= 0:
        raise UsageError(f"{where} needs a positive time for some number of tokens, and for each that it names.")
    return [RatePoint(tokens, milliseconds / 1000) for tokens, milliseconds in by_tokens.items()]


def _closed(peer: PlanPeer, first: bool, last: bool) -> PlanPeer:
    inner, at_first, at_last, both = peer.layers_max
    return replace(
        peer,
        layers_max=(inner, 0 if first else at_first, 0 if last else at_last, 0 if first or last else both),
    )


def _frozen(matrix: Matrix) -> Matrix:
    matrix.setflags(write=False)
    return matrix

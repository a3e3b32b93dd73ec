"""Small swarms for tests of the planner, drawn from a seed, and every way to place layers in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from helixnet.core.model import Manifest
from helixnet.core.plan.snapshot import Link, PeerView, Snapshot
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId, Span
from helixnet.planner.problem import Problem, Spans, from_snapshot

MB = 1_000_000


def manifest(layers: int = 30, layer_mb: float = 14.2, end_mb: float = 113.0, hidden_size: int = 576) -> Manifest:
    """By default like SmolLM2-135M in float32."""
    return Manifest(
        name="SmolLM2-135M-Instruct",
        architecture="LlamaForCausalLM",
        layers=layers,
        hidden_size=hidden_size,
        vocab_size=49152,
        context_tokens=8192,
        kv_heads=3,
        head_dim=64,
        dtype="float32",
        layer_bytes=int(layer_mb * MB),
        embedding_bytes=int(end_mb * MB),
        head_bytes=int(end_mb * MB),
        source_format="gguf",
        config_sha256="",
        tokenizer_sha256="",
        weights_sha256="",
    )


def capability(memory_mb: float, speed: float = 1.0) -> Capability:
    """One thread of a server CPU at speed 1: what was measured with a layer of SmolLM2."""
    decode = ((1, 0.0026), (4, 0.0044), (16, 0.0057), (64, 0.0170))
    prefill = ((32, 0.0057), (128, 0.0158), (512, 0.0646))
    return Capability(
        device="AMD EPYC, 1 thread",
        matmul_flops=9e10,
        memory_bandwidth=1.8e10,
        decode=tuple(RatePoint(tokens, seconds / speed) for tokens, seconds in decode),
        prefill=tuple(RatePoint(tokens, seconds / speed) for tokens, seconds in prefill),
        memory_bytes=int(memory_mb * MB),
    )


def loopback_swarm(*memory_mb: float, held: dict[int, Span] | None = None) -> Snapshot:
    """Equally fast peers on one machine."""
    ids = [PeerId(f"peer-{n:02d}") for n in range(len(memory_mb))]
    return Snapshot(
        manifest=manifest(),
        peers=tuple(
            PeerView(peer=ids[n], capability=capability(memory), held=(held or {}).get(n))
            for n, memory in enumerate(memory_mb)
        ),
        links=tuple(
            Link(source=a, target=b, round_trip_s=0.0005, bandwidth=4e8) for a, b in itertools.permutations(ids, 2)
        ),
    )


def random_swarm(seed: int, peers: int, layers: int, *, wide_links: bool = False) -> Snapshot:
    """Uneven memories and speeds, some links missing; narrow links bind. It may be too small for its model."""
    rng = random.Random(seed)
    model = manifest(layers, layer_mb=10.0, end_mb=rng.choice((0.0, 5.0, 15.0)))
    ids = [PeerId(f"peer-{n:02d}") for n in range(peers)]
    views = []
    for peer in ids:
        memory = rng.uniform(12.0, 11.0 * layers + 20.0)
        views.append(PeerView(peer=peer, capability=capability(memory, rng.uniform(0.3, 3.0))))
    links = [
        Link(
            source=a,
            target=b,
            round_trip_s=rng.uniform(0.0, 0.2),
            bandwidth=1e9 if wide_links else rng.uniform(0.02e6, 4e6),
        )
        for a, b in itertools.permutations(ids, 2)
        if rng.random() < 0.8
    ]
    default = 1e9 if wide_links else 1e6
    return Snapshot(manifest=model, peers=tuple(views), links=tuple(links), default_bandwidth=default)


def large_swarm(seed: int, peers: int, layers: int) -> Problem:
    """All peers different, links that never bind."""
    rng = random.Random(seed)
    views = tuple(
        PeerView(peer=PeerId(f"p{n:03d}"), capability=capability(rng.uniform(30, 250), rng.uniform(0.3, 3)))
        for n in range(peers)
    )
    model = manifest(layers, layer_mb=10.0, end_mb=15.0)
    return from_snapshot(Snapshot(manifest=model, peers=views, default_bandwidth=1e12, default_round_trip_s=0.0))


def spread_links(problem: Problem, rng: random.Random, decades: float) -> Problem:
    """Links from so many powers of ten below a peer's compute to about as much, some without any capacity."""
    count = len(problem.peers)
    rates = [
        10 ** rng.uniform(1 - decades, 1.5) * problem.peers[0].tokens_per_s(1) / problem.layers
        if rng.random() < 0.9
        else 0.0
        for _ in range(count * count)
    ]
    return replace(problem, link_tokens_per_s=np.array(rates).reshape(count, count))


def every_placement(problem: Problem) -> Iterator[Spans]:
    """All ways to give each peer that has room a span."""
    choices: list[list[Span | None]] = []
    for index in range(len(problem.peers)):
        held = [
            Span(start, stop)
            for start in range(problem.layers)
            for stop in range(start + 1, problem.layers + 1)
            if problem.fits(index, start, stop)
        ]
        choices.append([*held] or [None])
    yield from itertools.product(*choices)

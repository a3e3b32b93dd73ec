"""A made-up instance for paper mode: four equal machines in two stages of three layers, numbers to check by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helixnet.core.types import Span
from helixnet.planner.artifact import Artifact
from helixnet.planner.flow import OUTSIDE, Edge
from helixnet.sim.paper.admission import Admission
from helixnet.sim.paper.feeder import Arrival, Feed, Lengths, Trace
from helixnet.sim.paper.instance import Instance, read_instance
from helixnet.sim.paper.run import Setup, Windows
from tests.planner.small_artifact import big_type, curve_of_big, mix, small_artifact, write

STAGES = (Span(0, 3), Span(0, 3), Span(3, 6), Span(3, 6))
KV_TOKENS = 320
"""Of each layer of a machine that holds three."""
CHAIN: dict[Edge, float] = {(OUTSIDE, 0): 30.0, (0, 2): 30.0, (2, OUTSIDE): 30.0}
SQUARE: dict[Edge, float] = {
    (OUTSIDE, 0): 30.0,
    (OUTSIDE, 1): 10.0,
    (0, 2): 20.0,
    (0, 3): 10.0,
    (1, 2): 5.0,
    (1, 3): 5.0,
    (2, OUTSIDE): 25.0,
    (3, OUTSIDE): 15.0,
}
MINUTE = Windows(0.0, 60.0)
LENGTHS: Lengths = ((20, 5), (30, 8), (10, 12))


def files() -> dict[str, dict[str, Any]]:
    """The artifact's files by name."""
    made = small_artifact()
    links = {f"{tail}-{head}": [1_000_000, 2.0] for tail in (0, 1) for head in (2, 3)} | {"0-1": [1_000_000, 2.0]}
    links |= {f"source-{n}": [100_000, 1.0] for n in range(4)} | {f"{n}-sink": [100_000, 1.0] for n in range(4)}
    made["clusters.json"]["square"] = {"node_types": ["BIG"] * 4, "links_bandwidth_Bps_latency_ms": links}
    profiles, card = made["profiles.json"], {"inbound_nic_speed": 10_000_000, "outbound_nic_speed": 10_000_000}
    profiles["machine_hw"] = {kind: dict(card) for kind in ("BIG", "SMALL", "SourceNode", "SinkNode")}
    profiles["machine_hw"]["_units"] = "bytes/s"
    tiny = profiles["models"]["tiny"]
    held = [str(layers) for layers in range(1, 5)]
    tiny["types"]["BIG"] = big_type() | {
        "prompt_max_requests": dict.fromkeys(held, 2),
        "prompt_max_tokens": dict.fromkeys(held, 40),
        "decode_max_tokens": dict.fromkeys(held, 4),
        "decode_max_context": dict.fromkeys(held, 150),
    }
    tiny["typical_throughput_by_mix"]["square"] = mix({"BIG": 4}, {"BIG": curve_of_big()})
    made["azure_conv.json"] = {
        "input_tokens": [each for each, _ in LENGTHS],
        "output_tokens": [each for _, each in LENGTHS],
        "arrivals_per_3s": [1, 2, 3],
    }
    return made


def artifact(folder: Path) -> Artifact:
    """The same, written."""
    return Artifact(write(folder, files()))


def instance(folder: Path) -> Instance:
    """The square."""
    return read_instance(artifact(folder), "square", "tiny")


def setup(
    folder: Path,
    feed: Feed,
    router: str = "iwrr",
    flows: dict[Edge, float] | None = None,
    admission: Admission | None = None,
    windows: Windows = MINUTE,
) -> Setup:
    """Of the square, everything connected unless `flows` says otherwise."""
    return Setup(
        instance=instance(folder),
        spans=STAGES,
        flows=SQUARE if flows is None else flows,
        router=router,
        feed=feed,
        admission=admission,
        windows=windows,
    )


def requests(count: int, apart_s: float = 0.0) -> Trace:
    """So many, one after the other."""
    return Trace(tuple(Arrival(n * apart_s, *LENGTHS[n % len(LENGTHS)]) for n in range(count)))

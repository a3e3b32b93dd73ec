"""A made-up artifact: three machines, six layers, all numbers small enough to check by hand; and where the real is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("HELIXNET_ARTIFACT") or Path(__file__).parents[3] / "shared" / "helix")
needs_data = pytest.mark.skipif(
    not (FOLDER / "clusters.json").is_file(),
    reason=f"the paper's instances are not in {FOLDER}: set HELIXNET_ARTIFACT to the folder with clusters.json",
)
Data = dict[str, Any]


def small_artifact() -> dict[str, Data]:
    """The three files by name. Machines 0 and 2 are big, 1 is small and far from 2; 0 is the only entry."""
    return {
        "clusters.json": {
            "_meta": {"source_repo": "nowhere"},
            "three": {
                "num_nodes": 3,
                "node_types": ["BIG", "SMALL", "BIG"],
                "regions": [0, 0, 1],
                "links_bandwidth_Bps_latency_ms": {
                    "source-0": [100000, 1.0],
                    "1-sink": [100000, 1.0],
                    "2-sink": [100000, 1.0],
                    "0-1": [10200, 2.0],
                    "1-2": [5100.0, 30.0],
                },
            },
        },
        "profiles.json": {
            "_meta": {"constants": {"AVG_INPUT_LEN": 30, "AVG_OUTPUT_LEN": 10, "VLLM_BLOCK_SIZE": 16}},
            "models": {
                "tiny": {
                    "num_layers": 6,
                    "token_size_bytes": 2,
                    "activation_bytes_per_token": 100,
                    "layer_bytes_used_by_simulator": 1000000,
                    "types": {"BIG": big_type(), "SMALL": small_type()},
                    "typical_throughput_by_mix": {
                        "other": mix({"BIG": 9}, {"BIG": {"1": 7.0, "2": 7.0, "3": 7.0, "4": 7.0}}),
                        "this": mix({"BIG": 2, "SMALL": 1}, {"BIG": curve_of_big(), "SMALL": {"1": 60.0, "2": 20.0}}),
                    },
                }
            },
        },
        "placements.json": {
            "placements": [
                stored("chain", {2: ["BIG", 0, 3, 0.0], 3: ["SMALL", 3, 4], 4: ["BIG", 4, 6]}),
                stored("separate/big", {2: ["BIG", 0, 3], 3: ["BIG", 3, 6]}),
                stored("too many", {n: ["SMALL", 0, 3] for n in range(2, 5)}),
            ]
        },
    }


def big_type() -> Data:
    return {
        "max_num_layers": 4,
        "vram_bytes": 8e9,
        "prompt_bs2time_ms_per_layer": [[0, 0.0], [20, 2.0], [40, 4.0]],
        "decode_bs2time_ms_per_layer": [[0, 0.0], [2, 4.0], [4, 6.0]],
        "vllm_num_blocks": {"1": 100, "2": 40, "3": 20, "4": 10},
    }


def small_type() -> Data:
    return big_type() | {"max_num_layers": 2, "vram_bytes": 2e9, "vllm_num_blocks": {"1": 10, "2": 1}}


def curve_of_big() -> Data:
    return {"1": 100.0, "2": 50.0, "3": 30.0, "4": 20.0}


def mix(counts: Data, rates: Data) -> Data:
    return {"mix": counts, "per_type": {kind: {"T_k_tokens_per_s": curve} for kind, curve in rates.items()}}


def stored(method: str, intervals: dict[int, list[Any]]) -> Data:
    named = {f"compute_node_{number}": interval for number, interval in intervals.items()}
    return {"cluster": "three", "model": "tiny", "method": method, "section": "6.3", "intervals": named}


def write(folder: Path, files: dict[str, Data]) -> Path:
    """Write the files; returns the folder."""
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return folder

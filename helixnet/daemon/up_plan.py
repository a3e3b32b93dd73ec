"""How `helixnet up` divides a model's memory among its peers."""

from __future__ import annotations

from collections.abc import Sequence

from helixnet.core.errors import UsageError
from helixnet.core.model import Manifest
from helixnet.daemon.config import parse_memory

PEERS_MAX = 16
PEERS_DEFAULT = 3
SPARE = 1.4
"""All peers together hold this much of the model: some layers twice, so that spans overlap."""
UNEVEN = 0.2
"""The first peer gets this much more than the average, the last this much less: 40, 33 and 27 % of three."""
KV_TOKENS = 4_096
"""KV room in each layer: a few conversations at once."""


def budgets(manifest: Manifest, peers: int) -> list[int]:
    """Bytes for each peer, falling; two or more never get enough for all of the model each.

    Every peer may be given the first or the last layers, so each has room for the larger of embedding and head.
    """
    layer = manifest.layer_bytes + KV_TOKENS * manifest.kv_bytes
    whole = manifest.span_bytes(0, manifest.layers)
    if peers == 1:
        return [whole + manifest.layers * KV_TOKENS * manifest.kv_bytes]
    end = max(manifest.embedding_bytes, manifest.head_bytes)
    average = SPARE * manifest.layers * layer / peers
    shares = [1 + UNEVEN - 2 * UNEVEN * index / (peers - 1) for index in range(peers)]
    # A peer with room for one layer and its KV is the least that can be planned.
    return [min(end + max(layer, int(average * share)), whole - manifest.layer_bytes) for share in shares]


def budgets_from(text: str, peers: int | None) -> list[int]:
    """The budgets a person wrote: `400MB,350MB,300MB`.

    Raises:
        UsageError: not as many as peers, or too many.
        ConfigError: one is not a number with a unit.
    """
    sizes = [parse_memory(part) for part in text.split(",")]
    if peers is not None and peers != len(sizes):
        raise UsageError(
            f"--memory gives {len(sizes)} budgets for {peers} peers: give one for each, or leave --peers out."
        )
    check_peers(len(sizes))
    return sizes


def check_peers(peers: int) -> None:
    """Raise UsageError if a swarm of one machine should not have so many peers."""
    if not 1 <= peers <= PEERS_MAX:
        raise UsageError(f"A swarm of one machine has 1 to {PEERS_MAX} peers, not {peers}.")


def threads_each(cores: int, peers: Sequence[object]) -> int:
    """CPU threads of each peer, so that they do not spin against each other."""
    return max(1, cores // len(peers))

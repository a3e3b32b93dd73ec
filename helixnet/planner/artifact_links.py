"""The links of one of the paper's instances: `tail-head` with a bandwidth in bytes/s and a one-way latency in ms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from helixnet.core.errors import UsageError
from helixnet.planner.artifact_file import ClusterData, NotNegative, decode
from helixnet.planner.problem import Matrix

SOURCE, SINK = "source", "sink"
"""The coordinator, as links from it and to it call it."""


@dataclass(frozen=True, slots=True, eq=False)
class ClusterLinks:
    """Between machines as matrices, [tail, head]; to and from the coordinator by machine."""

    bandwidth: Matrix
    """Bytes/s; 0 where there is no link."""
    latency_s: Matrix
    """Without a link, that of the slowest: it counts only on the way back from an exit to an entry."""
    entry: list[float]
    """Bytes/s from the coordinator; no limit if no such link is given at all."""
    exit: list[float]
    """Likewise to it."""
    entry_s: list[float]
    """Latency from the coordinator; 0 if no such link is given."""
    exit_s: list[float]
    """Likewise to it."""


def read_links(cluster: ClusterData, where: str) -> ClusterLinks:
    """The links of a cluster. A pair stands for both directions unless the other is given too.

    Raises:
        UsageError: a link is malformed, or its machine is not there.
    """
    count = len(cluster.node_types)
    given: dict[tuple[int, int], tuple[float, float]] = {}
    ends: dict[str, dict[int, tuple[float, float]]] = {SOURCE: {}, SINK: {}}
    for name, raw in cluster.links.items():
        link = f"{where}, {name!r}"
        rate, delay_ms = decode(raw, tuple[NotNegative, NotNegative], link)
        tail, _, head = name.partition("-")
        if tail == SOURCE:
            ends[SOURCE][_machine(head, count, link)] = rate, delay_ms / 1000
        elif head == SINK:
            ends[SINK][_machine(tail, count, link)] = rate, delay_ms / 1000
        else:
            given[_machine(tail, count, link), _machine(head, count, link)] = rate, delay_ms / 1000
    bandwidth, latency_s = np.zeros((count, count)), np.zeros((count, count))
    for (tail_n, head_n), told in given.items():
        bandwidth[tail_n, head_n], latency_s[tail_n, head_n] = told
        if (head_n, tail_n) not in given:
            bandwidth[head_n, tail_n], latency_s[head_n, tail_n] = told
    latency_s[bandwidth == 0] = latency_s.max()
    np.fill_diagonal(bandwidth, np.inf)
    np.fill_diagonal(latency_s, 0.0)
    absent = {end: (0.0 if known else np.inf, 0.0) for end, known in ends.items()}
    entry, exit_ = ([ends[end].get(n, absent[end]) for n in range(count)] for end in (SOURCE, SINK))
    return ClusterLinks(
        bandwidth,
        latency_s,
        entry=[rate for rate, _ in entry],
        exit=[rate for rate, _ in exit_],
        entry_s=[delay_s for _, delay_s in entry],
        exit_s=[delay_s for _, delay_s in exit_],
    )


def _machine(text: str, count: int, where: str) -> int:
    """A machine's number."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) < count):
        raise UsageError(f"{where}: {text!r} is no machine from 0 to {count - 1}.")
    return int(text)

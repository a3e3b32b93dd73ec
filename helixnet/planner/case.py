"""What `helixnet plan` plans for, whatever file it came from: a problem, and what people want to see beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from helixnet.core.errors import UsageError
from helixnet.core.types import PeerId
from helixnet.planner.cluster import Cluster
from helixnet.planner.migration import Loading
from helixnet.planner.problem import Problem, Spans, Workload, from_snapshot


@dataclass(frozen=True, slots=True)
class Machine:
    """What people know a peer by."""

    region: str
    device: str
    memory_bytes: int
    rates: str
    """Where its rates come from."""


@dataclass(frozen=True, slots=True)
class Case:
    """A problem with its machines, in the order of its peers."""

    problem: Problem
    workload: Workload
    machines: tuple[Machine, ...]
    loading: Loading
    """What moving a layer takes."""

    def spans_of(self, case: Case, spans: Spans) -> Spans:
        """What the peers of this case hold in a placement of another; None for those that are not in that."""
        placed = {peer.peer: span for peer, span in zip(case.problem.peers, spans, strict=True)}
        return tuple(placed.get(peer.peer) for peer in self.problem.peers)

    def holding(self, spans: Spans) -> Case:
        """The case when its peers hold these spans, so that moving them away counts."""
        peers = tuple(replace(peer, held=span) for peer, span in zip(self.problem.peers, spans, strict=True))
        return replace(self, problem=replace(self.problem, peers=peers))

    def without(self, names: Sequence[str]) -> Case:
        """The case without some peers.

        Raises:
            UsageError: one of them is not in it; nobody is left.
        """
        here = [peer.peer for peer in self.problem.peers]
        for name in names:
            if name not in here:
                raise UsageError(f"There is no peer {name!r} to remove. The peers are {here[0]} to {here[-1]}.")
        kept = [n for n, peer in enumerate(here) if peer not in names]
        if not kept:
            raise UsageError("--remove leaves nobody: a plan needs at least one peer.")
        both = np.ix_(kept, kept)
        problem = replace(
            self.problem,
            peers=tuple(self.problem.peers[n] for n in kept),
            link_tokens_per_s=self.problem.link_tokens_per_s[both],
            link_s=self.problem.link_s[both],
            prompt_link_s=self.problem.prompt_link_s[both],
        )
        return replace(self, problem=problem, machines=tuple(self.machines[n] for n in kept))


def of_cluster(cluster: Cluster) -> Case:
    """The case of a cluster file."""
    problem = from_snapshot(cluster.snapshot, cluster.workload)
    capabilities = {view.peer: view.capability for view in cluster.snapshot.peers}

    def machine(peer: PeerId) -> Machine:
        capability = capabilities[peer]
        return Machine(cluster.regions[peer], capability.device, capability.memory_bytes, cluster.rates[peer])

    machines = tuple(machine(peer.peer) for peer in problem.peers)
    return Case(problem, cluster.workload, machines, Loading.of(cluster.snapshot.manifest, cluster.workload))

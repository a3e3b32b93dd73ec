"""Placements laid from the first layer to the last, many side by side (a beam search).

The coverage form of the problem: where links do not bind, the max flow of a placement is the least supply of any
layer, the summed T(k) of its holders. To reach a flow F, whoever is placed next may as well begin at the first layer
that lacks supply (or, if too long for that, end with the model): a span that begins earlier can be moved there without
uncovering anything. So a placement is a sequence of choices (kind of peer, number of layers), and what makes it good is
that little of what the peers could carry is wasted. A state's rank is its waste, at prices for the kinds: what is dear
is kept for later. A beam that never dropped a state has tried everything; if it fails, no placement reaches F.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixnet.core.types import Span
from helixnet.planner.problem import Matrix, Problem, SpanOrNone, Spans

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
KINDS_TRIED = 32
"""Kinds of peers compared for a place, drawn anew each time, where there are more."""
CHILDREN = 4
"""Times the width: states kept of all that come out of one step."""
STEP_CELLS = 10_000
"""What a step costs besides, in cells."""
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """Peers that are the same to a placement: equal curves, equal room, and equal group where groups are given."""

    members: tuple[tuple[int, ...], ...]
    rates: Matrix
    """T(k), [kind, k]; k from 0; 0 where there is no room."""
    rooms: Counts
    """Most layers of a span that touches neither end, the first, the last, both; [kind, 4]."""

    def counts(self) -> Counts:
        """Peers of each kind."""
        return np.array([len(peers) for peers in self.members])


def kinds_of(problem: Problem, groups: Sequence[int] | None = None) -> Kinds:
    """The peers with room, by kind; `groups` (one number per peer) keeps peers of different groups apart."""
    longest = max(max(peer.layers_max) for peer in problem.peers)
    found: dict[tuple[object, ...], list[int]] = {}
    for index, peer in enumerate(problem.peers):
        if any(peer.layers_max):
            group = groups[index] if groups is not None else 0
            curve = tuple(peer.capacity[: max(peer.layers_max) + 1])
            found.setdefault((group, peer.layers_max, curve), []).append(index)
    rates = np.zeros((len(found), longest + 1))
    for row, members in enumerate(found.values()):
        peer = problem.peers[members[0]]
        for k in range(1, max(peer.layers_max) + 1):
            rates[row, k] = peer.tokens_per_s(k)
    return Kinds(
        tuple(tuple(members) for members in found.values()),
        rates,
        np.array([problem.peers[members[0]].layers_max for members in found.values()]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What is asked of one laying."""

    flow: float
    prices: Matrix
    """For each kind; 1 is neutral."""
    width: int
    """States kept side by side at each layer."""
    share_min: float
    """Lengths that carry less than this share of the best length's token-layers are not tried."""
    rate_max: float = math.inf
    """Shorter spans than this rate allows are not tried: who passes much more than a link carries needs many links."""
    windows: Counts | None = None
    """Layers that each kind may hold, [kind, 2] as [start, stop); None for all."""


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """What came of it."""

    spans: Spans
    """Peers that were not needed, or are left over, have none."""
    reached: int
    """Layers from the first on that have the flow asked for; all of them if it succeeded."""
    left: Counts
    """Peers of each kind without a span."""
    exhaustive: bool
    """No state was dropped and no length left out: a failure proves that no spans with these rates have the flow."""
    work: int
    """Array cells filled."""


class _States:
    """States whose first layer in want is the same. Supply is counted from that layer on."""

    def __init__(self) -> None:
        self.left: list[Counts] = []
        self.supply: list[Matrix] = []
        self.waste: list[Matrix] = []
        self.rank: list[Matrix] = []
        self.node: list[Counts] = []

    def add(self, left: Counts, supply: Matrix, waste: Matrix, rank: Matrix, node: Counts) -> None:
        """More of them."""
        for mine, more in zip(self.columns(), (left, supply, waste, rank, node), strict=True):
            mine.append(more)  # type: ignore[arg-type]

    def columns(self) -> tuple[list[Counts] | list[Matrix], ...]:
        """The five lists, in the order of `add`."""
        return self.left, self.supply, self.waste, self.rank, self.node

    def take(self) -> list[NDArray[Any]]:
        """All states as five arrays; none are left."""
        arrays: list[NDArray[Any]] = [np.concatenate(column) for column in self.columns()]
        for column in self.columns():
            column.clear()
        return arrays


class _Laying:
    def __init__(self, problem: Problem, kinds: Kinds, order: Order, rng: random.Random) -> None:
        self.layers, self.count, self.kinds, self.order = problem.layers, len(problem.peers), kinds, order
        self.rng = np.random.default_rng(rng.getrandbits(63))
        lengths = np.arange(1, kinds.rates.shape[1])
        rates = kinds.rates[:, 1:]
        slow = rates <= np.maximum(order.rate_max, np.where(rates > 0, rates, np.inf).min(axis=1, keepdims=True))
        rates = np.where(slow, rates, 0.0)
        useful = np.minimum(rates, order.flow) * lengths
        potential = useful.max(axis=1)
        self.option_kind, column = np.nonzero(rates > 0)
        self.option_length = lengths[column]
        self.option_rate = rates[self.option_kind, column]
        self.option_good = useful[self.option_kind, column] >= order.share_min * potential[self.option_kind]
        self.option_potential = potential[self.option_kind]
        self.option_price = (potential * order.prices)[self.option_kind]
        self.potential = potential
        self.slack = float((kinds.counts() * potential).sum()) - self.layers * order.flow
        self.reach = int(self.option_length[self.option_good].max())
        self.exhaustive, self.work = order.share_min <= 0 and math.isinf(order.rate_max), 0
        self.pending = [_States() for _ in range(self.layers + 1)]
        self.last = 0
        """No state's first layer in want comes after it."""
        self.parents: list[Counts] = [np.array([-1])]
        self.choices: list[Counts] = [np.array([-1])]
        self.starts: list[int] = [0]
        self.nodes = 1
        self.allowed = np.zeros(0, dtype=bool)
        """Which options may be placed at the layer under way, if their kind is left."""
        self.weights = self.rng.random(self.reach + len(kinds.members))

    def run(self) -> Laid:
        """Lay until every layer has its flow or no state is left."""
        none = np.zeros(1)
        self.pending[0].add(self.kinds.counts()[None], np.zeros((1, self.reach)), none, none, np.zeros(1, dtype=int))
        reached, furthest = 0, 0
        for layer in range(self.layers if self.slack >= 0 else 0):
            if layer > self.last:
                break
            self.allowed = self._allowed_at(layer)
            while self.pending[layer].left:
                left, supply, waste, rank, node = self._best(layer)
                reached, furthest = layer, int(node[0])
                self._step(layer, left, supply, waste, rank, node)
        if self.pending[self.layers].left:
            _, _, waste, _, node = self.pending[self.layers].take()
            reached, furthest = self.layers, int(node[np.argmin(waste)])
        spans, left_over = self._spans(furthest)
        # Also who fails at once has taken time: tries end that are counted by their work alone.
        return Laid(spans, reached, left_over, self.exhaustive, max(self.work, STEP_CELLS))

    def _best(self, layer: int) -> tuple[Counts, Matrix, Matrix, Matrix, Counts]:
        """The best states at a layer, best first, each once."""
        left, supply, waste, rank, node = self.pending[layer].take()
        key = np.round(left @ self.weights[self.reach :] * 1e6 + supply @ self.weights[: self.reach], 3)
        _, unique = np.unique(key, return_index=True)
        unique = unique[np.argsort(rank[unique], kind="stable")]
        if len(unique) > self.order.width:
            unique = unique[: self.order.width]
            self.exhaustive = False
        return left[unique], supply[unique], waste[unique], rank[unique], node[unique]

    def _allowed_at(self, layer: int) -> Flags:
        """An option too long for what is left ends with the model's last layer."""
        start = np.minimum(layer, self.layers - self.option_length)
        stop = start + self.option_length
        rooms = self.kinds.rooms[self.option_kind, (start == 0) + 2 * (stop == self.layers).astype(int)]
        allowed = (start >= 0) & (self.option_length <= rooms) & (self.option_length <= self.reach)
        if self.order.windows is None:
            allowed &= self.option_good | (layer + self.option_length == self.layers)
        else:
            windows = self.order.windows[self.option_kind]
            allowed &= (start >= windows[:, 0]) & (stop <= windows[:, 1])
            allowed &= self.option_good | (stop == windows[:, 1])
        return np.asarray(allowed, dtype=np.bool_)

    def _options(self, left: Counts) -> Counts:
        """Which options are tried at the layer under way."""
        present = np.any(left, axis=0)
        if np.count_nonzero(present) > KINDS_TRIED:
            self.exhaustive = False
            has_option = np.zeros_like(present)
            has_option[self.option_kind[self.allowed]] = True
            usable = np.flatnonzero(present & has_option)
            if len(usable) > KINDS_TRIED:
                usable = self.rng.choice(usable, KINDS_TRIED, replace=False)
            present = np.zeros_like(present)
            present[usable] = True
        return np.flatnonzero(self.allowed & present[self.option_kind])

    def _step(self, layer: int, left: Counts, supply: Matrix, waste: Matrix, rank: Matrix, node: Counts) -> None:
        """Place one more peer in each state, in every way that does not waste more than there is to spare."""
        options = self._options(left)
        if not len(options):
            return
        kind, length, rate = self.option_kind[options], self.option_length[options], self.option_rate[options]
        longest = int(length.max())
        self.work += STEP_CELLS + len(left) * len(options) * longest
        want = self.order.flow - np.minimum(supply[:, :longest], self.order.flow)
        want[:, self.layers - layer :] = 0.0
        given = np.where(np.arange(longest) < length[:, None], rate[:, None], 0.0)
        gain = np.minimum(want[:, None, :], given[None]).sum(axis=2)
        wasted = waste[:, None] + self.option_potential[options] - gain
        ranked = rank[:, None] + self.option_price[options] - gain
        state, option = np.nonzero((left[:, kind] > 0) & (wasted <= self.slack + ROUNDING * self.potential.max()))
        most = CHILDREN * self.order.width
        if len(state) > most:
            kept = np.sort(np.argsort(ranked[state, option], kind="stable")[:most])
            state, option = state[kept], option[kept]
            self.exhaustive = False
        if len(state):
            self._branch(
                layer,
                options[option],
                (left[state], supply[state], node[state]),
                wasted[state, option],
                ranked[state, option],
            )

    def _branch(
        self, layer: int, options: Counts, states: tuple[Counts, Matrix, Counts], waste: Matrix, rank: Matrix
    ) -> None:
        left, supply, parents = states
        rows = np.arange(len(options))
        left = left.copy()
        left[rows, self.option_kind[options]] -= 1
        given = np.arange(self.reach) < self.option_length[options][:, None]
        supply = supply + given * self.option_rate[options][:, None]
        wants = supply < self.order.flow * (1 - ROUNDING)
        ahead = np.where(wants.any(axis=1), wants.argmax(axis=1), self.reach)
        ahead = np.minimum(ahead, self.layers - layer)
        node = self.nodes + rows
        self.nodes += len(rows)
        self.parents.append(parents)
        self.choices.append(options)
        self.starts.append(layer)
        self.last = max(self.last, layer + int(ahead.max()))
        for step in np.unique(ahead):
            here = ahead == step
            moved = np.zeros((int(here.sum()), self.reach))
            moved[:, : self.reach - step] = supply[here, step:]
            self.pending[layer + int(step)].add(left[here], moved, waste[here], rank[here], node[here])

    def _spans(self, node: int) -> tuple[Spans, Counts]:
        """The placement that led to a node, and the peers left over."""
        sizes = [len(parents) for parents in self.parents]
        parents, choices = np.concatenate(self.parents), np.concatenate(self.choices)
        starts = np.repeat(self.starts, sizes)
        free = [list(members) for members in self.kinds.members]
        spans: list[SpanOrNone] = [None] * self.count
        while node > 0:
            option, start = int(choices[node]), int(starts[node])
            length = int(self.option_length[option])
            start = min(start, self.layers - length)
            spans[free[self.option_kind[option]].pop()] = Span(start, start + length)
            node = int(parents[node])
        return tuple(spans), np.array([len(peers) for peers in free])


def lay(problem: Problem, kinds: Kinds, order: Order, rng: random.Random) -> Laid:
    """Spans with the flow of `order` through every layer, or as far as they get."""
    return _Laying(problem, kinds, order, rng).run()

"""The linear program behind `bounds.link_bound`: flows between all pairs of peers, wherever their spans may lie."""

from __future__ import annotations

from collections.abc import Sequence

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import minimum_spanning_tree

from helixnet.planner.bounds import Floats, envelope
from helixnet.planner.problem import Problem

PASSES_MAX = 6
"""In each the program is solved again with envelopes cut off at the last bound and with more regions."""
REGIONS_MORE = 16
"""Regions taken in at once, those most overdrawn first."""
GAIN_MIN = 1e-3
"""What a pass must gain for another one without more regions."""
SLACK = 1e-6
"""Added to a program's optimum, as a share: the solver's own tolerance."""
NARROWEST, WIDEST = 1e-12, 1e12
"""Tokens/s between which links are compared."""
Rows = list[tuple[list[int], list[float], float, float]]
Sides = NDArray[np.bool_]


def program_bound(problem: Problem, members: Sequence[int], bound: float) -> float:
    """The largest flow that these peers could carry, at most `bound`, in tokens/s.

    Each flow keeps to its link and each peer keeps its flow. A token passes a peer at most once and runs at least one
    layer there, so a peer that passes x tokens/s runs at least x token-layers/s, and at most what its envelope says;
    each unit of flow needs every layer run once. Peers that together lack the room for all layers cannot serve
    a request among themselves: what enters there must leave them over a link.
    """
    regions = _narrow_regions(problem, members)
    chosen: list[Sides] = []
    for _ in range(PASSES_MAX):
        program = _Program(problem, members, bound, chosen)
        found, overdrawn = program.solve(regions)
        found *= 1 + SLACK
        gained, bound = found < bound * (1 - GAIN_MIN), min(bound, found)
        if bound <= 0 or not (gained or overdrawn):
            break
        chosen += overdrawn
    return bound


def _narrow_regions(problem: Problem, members: Sequence[int]) -> list[Sides]:
    """Sets of peers that are linked better within than to the rest and lack the room for all layers.

    Single peers, and what merges when links are taken in from the widest on (a spanning tree): at most twice as many
    sets as peers.
    """
    count = len(members)
    links = problem.link_tokens_per_s[np.ix_(members, members)]
    wide = np.clip(np.maximum(links, links.T), NARROWEST, WIDEST)
    tree = minimum_spanning_tree(csr_array(np.triu(1 / wide, 1))).tocoo()
    label = np.arange(count)
    regions = [label == i for i in range(count)]
    for n in np.argsort(tree.data, kind="stable"):
        label[label == label[tree.row[n]]] = label[tree.col[n]]
        regions.append(label == label[tree.col[n]])
    room = np.array([max(problem.peers[index].layers_max) for index in members])
    return [region for region in regions if room[region].sum() < problem.layers]


class _Program:
    """Columns: the whole flow, entries, exits, what each peer passes, token-layers that it runs, pairs.

    Scaled so that no flow exceeds 1.
    """

    def __init__(self, problem: Problem, members: Sequence[int], most: float, regions: Sequence[Sides]) -> None:
        count = self.count = len(members)
        self.most = most
        self.tails, self.heads = np.nonzero(~np.eye(count, dtype=bool))
        indices = np.array(members)
        links = problem.link_tokens_per_s[indices[self.tails], indices[self.heads]]
        first = [1.0 if max(problem.room(i, True, False), problem.room(i, True, True)) else 0.0 for i in members]
        last = [1.0 if max(problem.room(i, False, True), problem.room(i, True, True)) else 0.0 for i in members]
        ones, free = np.ones(count + 1), np.full(count, np.inf)
        self.upper = np.concatenate([ones[:1], first, last, ones[1:], free, np.minimum(links / most, 1.0)])
        self.entry, self.exit, self.passed, self.run, self.pair = (1 + n * count for n in range(5))
        self.rows: Rows = []
        self._whole(problem.layers)
        for i, member in enumerate(members):
            self._peer(i)
            for slope, intercept in envelope(problem.peers[member], most):
                self._put([self.run + i, self.passed + i], [1.0, -slope], -np.inf, intercept / most)
        for region in regions:
            inside = np.flatnonzero(region)
            leaving = self.pair + np.flatnonzero(region[self.tails] & ~region[self.heads])
            signs = np.repeat([1.0, -1.0], [len(inside), len(leaving)])
            self._put([*(self.entry + inside), *leaving], signs.tolist(), -np.inf, 0.0)

    def solve(self, regions: Sequence[Sides]) -> tuple[float, list[Sides]]:
        """The optimum in tokens/s, and the regions most overdrawn by it."""
        values = _maximum(self.upper, self.rows)
        entering = values[self.entry : self.entry + self.count]
        pairs = values[self.pair :]
        over = [
            float(entering[region].sum() - pairs[region[self.tails] & ~region[self.heads]].sum()) for region in regions
        ]
        worst = sorted(range(len(regions)), key=lambda n: (-over[n], n))[:REGIONS_MORE]
        return float(values[0]) * self.most, [regions[n] for n in worst if over[n] > SLACK]

    def _whole(self, layers: int) -> None:
        """The flow enters, and all layers are run for it."""
        count = self.count
        self._put([0, *range(self.entry, self.entry + count)], [-1.0] + [1.0] * count, 0.0, 0.0)
        self._put([0, *range(self.run, self.run + count)], [-float(layers)] + [1.0] * count, 0.0, 0.0)

    def _peer(self, i: int) -> None:
        """What comes in is passed and goes out, at most the whole flow and at most the token-layers run."""
        inward = self.pair + np.flatnonzero(self.heads == i)
        outward = self.pair + np.flatnonzero(self.tails == i)
        passed = self.passed + i
        self._put([passed, self.entry + i, *inward], [-1.0] + [1.0] * (1 + len(inward)), 0.0, 0.0)
        self._put([passed, self.exit + i, *outward], [-1.0] + [1.0] * (1 + len(outward)), 0.0, 0.0)
        self._put([passed, 0], [1.0, -1.0], -np.inf, 0.0)
        self._put([passed, self.run + i], [1.0, -1.0], -np.inf, 0.0)

    def _put(self, columns: list[int], values: list[float], low: float, high: float) -> None:
        self.rows.append((columns, values, low, high))


def _maximum(upper: Floats, rows: Rows) -> Floats:
    """The columns, all at least 0, that make the first one largest."""
    number = np.repeat(np.arange(len(rows)), [len(row[0]) for row in rows])
    columns = np.concatenate([row[0] for row in rows]).astype(np.int64)
    values = np.concatenate([row[1] for row in rows])
    matrix = coo_array((values, (number, columns)), shape=(len(rows), len(upper))).tocsr()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(upper), len(rows)
    lp.col_cost_ = np.eye(1, len(upper))[0]
    lp.col_lower_, lp.col_upper_ = np.zeros(len(upper)), upper
    lp.row_lower_, lp.row_upper_ = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    lp.sense_ = highspy.ObjSense.kMaximize
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (("output_flag", False), ("threads", 1)):
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS could not solve a bound: {solver.modelStatusToString(solver.getModelStatus())}")
    return np.asarray(solver.getSolution().col_value)

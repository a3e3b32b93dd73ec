"""Groups of peers with quick links among themselves, and placements that keep each group's layers together.

A token crosses from group to group once for each group then, not once for each layer. Groups are found in the links
themselves: nobody has to say where a peer is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from helixnet.planner.lay import Counts, Kinds
from helixnet.planner.problem import Problem

APART = 3.0
"""Groups are told apart where hops between them take at least so many times as long as hops within."""
UNEVEN = 0.15
"""Standard deviation of the logarithm of a group's share of the layers, around its share of the compute."""
HOP_S_MAX = 1e3
"""Seconds that stand for no link at all."""
LINK_MAX = 1e12
"""Tokens/s that stand for a link without limits."""


def groups_of(problem: Problem) -> tuple[int, ...]:
    """A group's number for each peer, from 0; all 0 where links do not tell any apart.

    Average linkage on the logarithm of the seconds of a hop, cut at the widest gap.
    """
    count = len(problem.peers)
    if count < 3:
        return (0,) * count
    seconds = np.clip((problem.link_s + problem.link_s.T) / 2, 1e-6, HOP_S_MAX)
    distance = np.log(seconds / seconds.min())
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average")
    heights = tree[:, 2]
    gaps = np.diff(heights)
    if not len(gaps) or gaps.max() < np.log(APART):
        return (0,) * count
    cut = int(gaps.argmax())
    labels = fcluster(tree, (heights[cut] + heights[cut + 1]) / 2, "distance")
    _, numbered = np.unique(labels, return_inverse=True)
    return tuple(int(label) for label in numbered)


def teams_of(problem: Problem, groups: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of peers, by index, each with room for the whole model: those without join the nearest.

    One team of all peers where they cannot be parted.
    """
    by_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, []).append(index)
    teams = sorted(by_group.values())
    able = [problem.only(team).has_room() for team in teams]
    while len(teams) > 1 and not all(able):
        weak = able.index(False)
        others = [n for n in range(len(teams)) if n != weak]
        near = min(others, key=lambda n: float(problem.link_s[np.ix_(teams[weak], teams[n])].mean()))
        merged = sorted(teams[weak] + teams[near])
        teams = [team for n, team in enumerate(teams) if n not in (weak, near)] + [merged]
        able = [problem.only(team).has_room() for team in teams]
    return [tuple(team) for team in sorted(teams)]


def windows(problem: Problem, kinds: Kinds, groups: Sequence[int], flow: float, rng: random.Random) -> Counts:
    """Layers for each kind, [kind, 2]: the groups one after the other in some order, by what they can carry."""
    potential = (np.minimum(kinds.rates, flow) * np.arange(kinds.rates.shape[1])).max(axis=1) * kinds.counts()
    group_of = np.array([groups[members[0]] for members in kinds.members])
    order = sorted(set(group_of.tolist()))
    rng.shuffle(order)
    shares = np.array([potential[group_of == group].sum() * np.exp(rng.gauss(0.0, UNEVEN)) for group in order])
    ends = np.round(np.concatenate([[0.0], np.cumsum(shares)]) / shares.sum() * problem.layers).astype(np.int64)
    placed = {group: (ends[n], ends[n + 1]) for n, group in enumerate(order)}
    return np.array([placed[int(group)] for group in group_of])


def throttled(problem: Problem, kinds: Kinds, scale: float) -> Kinds:
    """The kinds with rates that their links can feed: a span of k layers takes tokens from those who stop within it.

    On average k / layers of all peers do, each over a link of average width; `scale` times as many are counted.
    """
    count = len(problem.peers)
    others = np.where(np.eye(count, dtype=bool), 0.0, np.minimum(problem.link_tokens_per_s, LINK_MAX))
    width = others.sum(axis=0) / max(1, count - 1)
    fed = np.array([width[list(members)].mean() for members in kinds.members]) * scale * count / problem.layers
    return replace(kinds, rates=np.minimum(kinds.rates, fed[:, None] * np.arange(kinds.rates.shape[1])))


def roomy(problem: Problem, kinds: Kinds, scale: float) -> Kinds:
    """The kinds with rates no higher than their KV room is worth, so that layers with supply have room as well.

    At `scale` 1 a request's room is worth as many tokens/s as all peers together offer for each.
    """
    lengths = np.arange(kinds.rates.shape[1])
    room = np.zeros_like(kinds.rates)
    for row, members in enumerate(kinds.members):
        held = problem.peers[members[0]].kv_token_layers[: len(lengths)]
        room[row, : len(held)] = held
        room[row, len(held) :] = held[-1]
    requests = room / (np.maximum(lengths, 1) * problem.session_tokens)
    offered = ((kinds.rates * lengths).max(axis=1) * kinds.counts()).sum()
    held_at_most = ((np.where(kinds.rates > 0, requests, 0.0) * lengths).max(axis=1) * kinds.counts()).sum()
    if held_at_most <= 0:
        return kinds
    return replace(kinds, rates=np.minimum(kinds.rates, requests * (scale * offered / held_at_most)))

from __future__ import annotations

import numpy as np
import pytest

from helixnet.core.errors import UsageError
from helixnet.core.plan.snapshot import Link, Snapshot
from helixnet.planner.cluster import MBIT
from helixnet.planner.problem import from_snapshot, require_room
from helixnet.planner.random_swarm import INSIDE, geo_swarm
from tests.planner.small_swarms import loopback_swarm


def links_of(swarm: Snapshot) -> dict[tuple[str, str], Link]:
    return {(link.source, link.target): link for link in swarm.links}


def test_the_same_seed_draws_the_same_swarm_and_another_seed_another() -> None:
    assert geo_swarm(3, 20, 4) == geo_swarm(3, 20, 4)
    assert geo_swarm(3, 20, 4) != geo_swarm(4, 20, 4)


def test_there_is_one_link_from_every_peer_to_every_other() -> None:
    swarm = geo_swarm(0, 12, 3)
    assert len(swarm.links) == len(links_of(swarm)) == 12 * 11
    assert all(link.source != link.target for link in swarm.links)


@pytest.mark.parametrize(("peers", "regions"), [(30, 1), (40, 8), (120, 20)])
def test_a_swarm_of_some_size_can_hold_the_model(peers: int, regions: int) -> None:
    problem = from_snapshot(geo_swarm(1, peers, regions))
    assert problem.layers == 80
    require_room(problem)


def test_bandwidths_lie_between_what_homes_and_data_centres_rent() -> None:
    rates = [link.bandwidth / MBIT for link in geo_swarm(0, 60, 6).links]
    assert 40 < min(rates) < 200
    assert 1_000 < max(rates) < 10_000 * INSIDE


def test_the_two_directions_of_a_pair_differ_in_bandwidth_but_not_in_round_trip() -> None:
    links = links_of(geo_swarm(0, 10, 3))
    for (source, target), link in links.items():
        assert link.round_trip_s == pytest.approx(links[target, source].round_trip_s)
    assert any(link.bandwidth != links[target, source].bandwidth for (source, target), link in links.items())


def test_one_region_is_near_and_several_are_as_far_apart_as_the_earth_allows() -> None:
    near = [link.round_trip_s for link in geo_swarm(0, 20, 1).links]
    far = [link.round_trip_s for link in geo_swarm(0, 60, 8).links]
    assert max(near) < 0.021
    assert 0.1 < max(far) < 0.222


def test_a_model_by_another_name_gives_another_problem() -> None:
    assert geo_swarm(0, 5, 1, model="llama-3.1-8b").manifest.layers == 32
    with pytest.raises(UsageError, match="not known by name"):
        geo_swarm(0, 5, 1, model="llama-9")


def test_links_of_a_snapshot_count_in_their_direction_and_stand_in_for_the_other_if_that_was_not_measured() -> None:
    plain = loopback_swarm(900, 900, 900)
    one, two, three = (view.peer for view in plain.peers)
    both = Link(source=one, target=two, round_trip_s=0.1, bandwidth=1e6)
    back = Link(source=two, target=one, round_trip_s=0.2, bandwidth=2e6)
    single = Link(source=three, target=one, round_trip_s=0.3, bandwidth=4e6)
    swarm = Snapshot(manifest=plain.manifest, peers=plain.peers, links=(both, back, single), default_bandwidth=8e6)
    rates = from_snapshot(swarm).link_tokens_per_s
    assert np.isinf(rates.diagonal()).all()
    assert (rates / rates[0, 1]).tolist()[0][1:] == pytest.approx([1, 4])
    assert (rates / rates[0, 1]).tolist()[1][::2] == pytest.approx([2, 8])
    assert (rates / rates[0, 1]).tolist()[2][:2] == pytest.approx([4, 8])


@pytest.mark.slow
def test_a_thousand_peers_are_drawn_and_read_in_seconds() -> None:
    problem = from_snapshot(geo_swarm(0, 1000, 20))
    assert problem.link_tokens_per_s.shape == (1000, 1000)

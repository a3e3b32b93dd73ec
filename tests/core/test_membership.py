"""Members come by record or by word, fall silent, die, and do not rise again from an old record."""

from __future__ import annotations

import msgspec

from helixnet.core.swarm.membership import Membership, MembershipConfig
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import Beat

CONFIG = MembershipConfig(suspect_s=4.0, dead_s=8.0, forget_s=100.0)
ME, A = PeerId("me"), PeerId("a")


def record(peer: PeerId = A, uptime_s: float = 1.0, **changes: object) -> PeerRecord:
    plain = PeerRecord(
        peer=peer, name="n", addresses=(), model="m", manifest_hash="h", state="active", uptime_s=uptime_s
    )
    return msgspec.structs.replace(plain, **changes)


def states(membership: Membership) -> dict[PeerId, str]:
    return {member.record.peer: member.state for member in membership.members()}


def members() -> Membership:
    return Membership(ME, "h", CONFIG)


def test_a_record_in_the_directory_makes_a_member_and_ours_does_not() -> None:
    membership = members()
    membership.listed([record(), record(ME)], 0.0)
    assert states(membership) == {A: "active"}


def test_peers_with_other_weights_are_no_members() -> None:
    membership = members()
    membership.listed([record(manifest_hash="other")], 0.0)
    assert membership.members() == []


def test_silence_makes_suspect_then_dead_where_heartbeats_are_owed() -> None:
    membership = members()
    assert membership.announced(record(), 0.0)
    assert not membership.announced(record(uptime_s=2.0), 1.0), "a heartbeat without news is no news"
    membership.expire(5.5, owed_heartbeats=True)
    assert states(membership) == {A: "suspect"}
    membership.expire(9.6, owed_heartbeats=True)
    assert states(membership) == {A: "dead"}


def test_without_heartbeats_owed_silence_means_nothing() -> None:
    membership = members()
    membership.announced(record(), 0.0)
    assert not membership.expire(60.0, owed_heartbeats=False)
    assert states(membership) == {A: "active"}


def test_a_broken_channel_makes_suspect_and_a_word_makes_well_again() -> None:
    membership = members()
    membership.announced(record(), 0.0)
    assert membership.gone(A, 1.0) and not membership.gone(A, 1.1)
    membership.heard(A, 2.0)
    assert states(membership) == {A: "active"}


def test_the_dead_do_not_rise_from_an_old_record_but_from_their_own_word() -> None:
    membership = members()
    membership.announced(record(), 0.0)
    membership.expire(5.0, owed_heartbeats=True)
    membership.expire(10.0, owed_heartbeats=True)
    membership.listed([record(uptime_s=3.0)], 11.0)
    assert states(membership) == {A: "dead"}
    assert membership.announced(record(uptime_s=20.0), 12.0)
    assert states(membership) == {A: "active"}


def test_a_member_whose_record_vanished_from_the_directory_dies() -> None:
    membership = members()
    membership.listed([record()], 0.0)
    membership.listed([], 9.0)
    assert states(membership) == {A: "dead"}


def test_one_that_leaves_drains() -> None:
    membership = members()
    membership.announced(record(), 0.0)
    assert membership.left(A) and states(membership) == {A: "draining"}


def test_the_dead_are_forgotten_however_often_the_directory_is_read() -> None:
    membership = members()
    membership.listed([record()], 0.0)
    for now in (9.0, 60.0, 108.0):
        membership.listed([], now)
        membership.expire(now, owed_heartbeats=False)
    assert states(membership) == {A: "dead"}
    membership.expire(9.0 + CONFIG.forget_s, owed_heartbeats=False)
    assert membership.members() == []


def test_reading_the_directory_tells_whether_somebody_came_or_went() -> None:
    membership = members()
    assert membership.listed([record()], 0.0)
    assert not membership.listed([record(uptime_s=5.0)], 4.0), "a newer record of the same peer"
    membership.gone(A, 5.0)
    assert membership.listed([record(uptime_s=1.0)], 6.0), "it was started again"
    assert not membership.listed([], 7.0), "not silent for long enough"
    assert membership.listed([], 20.0) and not membership.listed([], 21.0)
    assert membership.live() == []


def test_nothing_is_due_before_the_deadline() -> None:
    membership = members()
    membership.announced(record(), 0.0)
    assert membership.deadline(owed_heartbeats=False) == float("inf")
    assert not membership.expire(3.9, owed_heartbeats=True)
    assert membership.deadline(owed_heartbeats=True) == CONFIG.suspect_s
    assert membership.expire(CONFIG.suspect_s, owed_heartbeats=True)
    assert membership.deadline(owed_heartbeats=False) == CONFIG.dead_s
    assert membership.expire(CONFIG.dead_s, owed_heartbeats=False)
    assert membership.deadline(owed_heartbeats=False) == CONFIG.dead_s + CONFIG.forget_s


def beat(**changes: object) -> Beat:
    return msgspec.structs.replace(Beat(state="active", term=2, uptime_s=5.0, sessions=3), **changes)


def test_a_heartbeat_renews_what_changes_and_keeps_the_rest() -> None:
    membership = members()
    assert membership.beat(A, beat(), 0.0) is None, "it has to announce itself first"
    membership.announced(record(addresses=("here",)), 0.0)
    known = membership.beat(A, beat(), 1.0)
    assert known is not None
    told, news = known
    assert (told.sessions, told.term, told.addresses, news) == (3, 2, ("here",), False)
    known = membership.beat(A, beat(state="draining"), 2.0)
    assert known is not None and known[1], "this matters to planning"


def test_a_heartbeat_of_one_known_only_from_the_directory_or_dead_is_not_enough() -> None:
    membership = members()
    membership.listed([record()], 0.0)
    assert membership.beat(A, beat(), 0.0) is None
    membership.announced(record(), 0.0)
    membership.expire(5.0, owed_heartbeats=True)
    membership.expire(10.0, owed_heartbeats=True)
    assert membership.beat(A, beat(), 11.0) is None


def test_the_directory_does_not_overwrite_what_a_member_said_lately() -> None:
    membership = members()
    membership.announced(record(sessions=3), 0.0)
    membership.listed([record(uptime_s=9.0)], 10.0)
    assert membership.members()[0].record.sessions == 3
    membership.listed([record(uptime_s=99.0)], 100.0)
    assert membership.members()[0].record.sessions == 0


def test_a_key_says_nothing_of_members_under_another() -> None:
    membership = members()
    membership.listed([record()], 0.0, "shard")
    membership.listed([], 9.0, "front")
    assert states(membership) == {A: "active"}
    membership.listed([], 9.0, "shard")
    assert states(membership) == {A: "dead"}

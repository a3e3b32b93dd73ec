"""Who reads and who is in which part of the directory: little is read by many, and somebody is always found."""

from __future__ import annotations

from collections import Counter

from helixnet.core.swarm.directory import (
    FOLLOWER_PAUSES,
    LOOK_PATIENCE_S,
    RESIDENT_PAUSES,
    SHARD_PAUSES,
    SHARDS,
    Reading,
    front_key,
    shard_key,
    shard_of,
)
from helixnet.core.swarm.election import CHALLENGE, Candidate
from helixnet.core.swarm.records import LINKS_MAX, RECORDS_PER_KEY_MAX
from helixnet.core.types import PeerId

ME, READ_S, HOUR_S = PeerId("me"), 2.0, 3_600.0
FRONT = front_key("n")


def looks(reading: Reading, seconds: float, follows: bool, in_front: bool = False, neighbours: int = 0) -> Counter[str]:
    """How often which key is read."""
    said: Counter[str] = Counter()
    for step in range(int(seconds / READ_S)):
        said.update(reading.due(READ_S, follows, in_front, neighbours, step * READ_S))
    return said


def others(count: int, uptime_s: float) -> list[Candidate]:
    return [Candidate(PeerId(f"p{n:03d}"), uptime_s) for n in range(count)]


def test_every_member_has_a_shard_and_a_thousand_fit() -> None:
    sizes = Counter(shard_of(PeerId(f"peer-{n}")) for n in range(1_000))
    assert set(sizes) == set(range(SHARDS)) and max(sizes.values()) < RECORDS_PER_KEY_MAX


def test_who_knows_no_coordinator_reads_the_front_at_every_look() -> None:
    assert looks(Reading(ME, "n"), 60.0, follows=False)[FRONT] == 30


def test_followers_read_the_front_seldom_and_those_in_it_more_often() -> None:
    seconds = READ_S * FOLLOWER_PAUSES * RESIDENT_PAUSES * 4
    assert looks(Reading(ME, "n"), seconds, follows=True)[FRONT] == RESIDENT_PAUSES * 4
    assert looks(Reading(ME, "n"), seconds, follows=True, in_front=True)[FRONT] == FOLLOWER_PAUSES * 4


def test_followers_read_shards_only_until_they_know_enough_neighbours() -> None:
    few = looks(Reading(ME, "n"), READ_S * SHARD_PAUSES * SHARDS, follows=True)
    assert all(few[shard_key("n", shard)] == 1 for shard in range(SHARDS)), "each once in a round"
    enough = looks(Reading(ME, "n"), HOUR_S, follows=True, neighbours=LINKS_MAX)
    assert set(enough) == {FRONT}


def test_the_first_shard_is_ones_own() -> None:
    assert Reading(ME, "n").due(READ_S, True, False, 0, 0.0) == [FRONT, shard_key("n", shard_of(ME))]


def test_a_coordinator_walks_all_shards_however_many_it_knows() -> None:
    walked = looks(Reading(ME, "n"), READ_S * SHARD_PAUSES * SHARDS, follows=False, neighbours=1_000)
    assert len(set(walked) - {FRONT}) == SHARDS


def test_who_finds_nobody_in_the_front_reads_a_shard_at_every_look() -> None:
    reading = Reading(ME, "n")
    reading.front_was([], Candidate(ME, 1.0), 16, 0.0)
    assert len(looks(reading, READ_S * SHARDS, follows=False)) == SHARDS + 1
    found = Reading(ME, "n")
    found.front_was(others(1, 1.0), Candidate(ME, 1.0), 16, 0.0)
    assert looks(found, READ_S * SHARD_PAUSES * 4, follows=False)[FRONT] == SHARD_PAUSES * 4
    assert looks(found, READ_S * SHARD_PAUSES * 4, follows=False).total() < SHARD_PAUSES * 6


def test_a_follower_that_loses_its_coordinator_looks_at_once() -> None:
    reading = Reading(ME, "n")
    reading.due(READ_S, True, False, LINKS_MAX, 0.0)
    assert reading.due(READ_S, True, False, LINKS_MAX, READ_S) == []
    assert FRONT in reading.due(READ_S, False, False, LINKS_MAX, 2 * READ_S)


def test_a_front_with_room_takes_everybody_and_a_full_one_only_the_clearly_steadier() -> None:
    def joins(present: list[Candidate], uptime_s: float) -> bool:
        return Reading(ME, "n").front_was(present, Candidate(ME, uptime_s), 16, 0.0)

    assert joins(others(15, HOUR_S), 1.0)
    assert not joins(others(16, HOUR_S), 1.9 * HOUR_S)
    assert joins(others(16, HOUR_S), 2 * CHALLENGE * HOUR_S)


def test_who_is_in_the_front_stays_until_others_are_better() -> None:
    reading = Reading(ME, "n")
    mine = Candidate(ME, 1.0)
    assert reading.front_was([], mine, 16, 0.0)
    reading.front_was([mine, *others(15, HOUR_S)], mine, 16, 0.0)
    assert (reading.belongs, reading.resides) == (True, True)
    reading.front_was([mine, *others(16, HOUR_S)], mine, 16, 0.0)
    assert (reading.belongs, reading.resides) == (False, False)


def test_who_found_the_front_empty_resides_there_only_once_it_has_found_itself_among_the_best() -> None:
    reading, mine = Reading(ME, "n"), Candidate(ME, 1.0)
    assert reading.front_was([], mine, 16, 0.0)
    assert not reading.has_looked(1.0, 2.0), "hundreds may have found it empty"
    assert not reading.front_was(others(3, 1.0), mine, 16, 2.0)
    assert (reading.belongs, reading.resides) == (True, False), "our record is on its way"
    reading.front_was([mine, *others(3, 1.0)], mine, 16, 4.0)
    assert (reading.belongs, reading.resides) == (True, True)
    assert reading.has_looked(5.0, 6.0)


def test_nobody_outside_the_front_claims_before_it_has_looked_there() -> None:
    reading = Reading(ME, "n")
    assert not reading.has_looked(0.0, 1.0)
    reading.front_was(others(16, HOUR_S), Candidate(ME, 1.0), 16, 5.0)
    assert reading.has_looked(4.0, 5.0) and not reading.has_looked(6.0, 7.0)
    assert reading.has_looked(6.0, 6.1 + LOOK_PATIENCE_S), "the directory may be gone"
    resident = Reading(ME, "n")
    resident.front_was([Candidate(ME, 1.0)], Candidate(ME, 1.0), 16, 5.0)
    assert resident.has_looked(6.0, 7.0)

"""Elections told as transcripts: who says what when, and who follows whom afterwards."""

from __future__ import annotations

from helixnet.core.machine import Effect, Send
from helixnet.core.swarm.election import STAGGER_SPREAD, Candidate, Election, LeaseConfig, place, stability, steadiest
from helixnet.core.types import PeerId
from helixnet.core.wire.messages import Lease, Resign

CONFIG = LeaseConfig(settle_s=1.0, duration_s=4.0, renew_s=1.0, drift_margin_s=0.5, claim_stagger_s=1.0)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


class Transcript:
    """Three elections with equal uptime, so that c ranks before b before a; messages arrive at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.all = {peer: Election(peer, CONFIG, 0.0) for peer in (A, B, C)}
        self.groups = [{A, B, C}]
        self.said: list[str] = []

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for peer in sorted(self.all):
                self.tick(peer)

    def tick(self, peer: PeerId) -> None:
        live = [Candidate(other, 10.0) for other in self.group(peer) - {peer}]
        self.carry(peer, self.all[peer].tick(self.now, Candidate(peer, 10.0), lambda: live, ()))

    def group(self, peer: PeerId) -> set[PeerId]:
        return next(group for group in self.groups if peer in group) & set(self.all)

    def carry(self, sender: PeerId, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and effect.to in self.group(sender):
                message = effect.message
                assert isinstance(message, Lease | Resign)
                self.said.append(f"{sender}->{effect.to} {type(message).__name__} {message.term}")
                target = self.all[effect.to]
                if isinstance(message, Lease):
                    self.carry(effect.to, target.lease(sender, message, self.now))
                else:
                    target.see_term(message.term)
                    target.vacate(sender, self.now)

    def holders(self) -> dict[PeerId, tuple[PeerId | None, int]]:
        return {peer: (election.holder, election.term) for peer, election in self.all.items()}


def test_the_best_ranked_claims_after_settling_and_everyone_follows() -> None:
    story = Transcript()
    story.run(0.9)
    assert set(story.holders().values()) == {(None, 0)}
    story.run(0.3)
    assert set(story.holders().values()) == {(C, 1)}
    story.run(20)
    assert set(story.holders().values()) == {(C, 1)}, "a lease that is renewed does not change hands"


def test_when_the_holder_dies_the_next_in_rank_takes_a_higher_term() -> None:
    story = Transcript()
    story.run(3)
    del story.all[C]
    story.run(CONFIG.duration_s + 2 * CONFIG.claim_stagger_s + 0.5)
    assert set(story.holders().values()) == {(B, 2)}


def test_a_holder_that_resigns_is_followed_at_once() -> None:
    story = Transcript()
    story.run(3)
    live = [Candidate(A, 10.0), Candidate(B, 10.0)]
    leaver = story.all.pop(C)
    for effect in leaver.resign(live):
        assert isinstance(effect, Send) and isinstance(effect.message, Resign)
        story.all[effect.to].see_term(effect.message.term)
        story.all[effect.to].vacate(C, story.now)
    story.run(0.3)
    assert set(story.holders().values()) == {(B, 2)}


def test_each_side_of_a_partition_elects_and_the_healed_swarm_keeps_the_higher_term() -> None:
    story = Transcript()
    story.run(3)
    story.groups = [{A, B}, {C}]
    story.run(10)
    assert story.holders()[C] == (C, 1), "the holder goes on on its own side"
    assert story.holders()[A] == story.holders()[B] == (B, 2)
    story.groups = [{A, B, C}]
    story.run(3)
    assert set(story.holders().values()) == {(B, 2)}


def test_two_claims_of_one_term_are_settled_by_stability_then_id() -> None:
    election = Election(A, CONFIG, 0.0)
    election.lease(B, Lease(term=5, coordinator=B, stability=1, duration_s=4), 0.0)
    election.lease(C, Lease(term=5, coordinator=C, stability=0, duration_s=4), 0.1)
    assert election.holder == B
    election.lease(C, Lease(term=5, coordinator=C, stability=1, duration_s=4), 0.2)
    assert election.holder == C


def test_two_that_claimed_one_term_at_once_end_with_one_holder_of_a_higher_term() -> None:
    story = Transcript()
    story.groups = [{A, B}, {C}]
    story.run(2)
    assert story.holders()[B] == (B, 1) and story.holders()[C] == (C, 1)
    story.groups = [{A, B, C}]
    story.run(3)
    ((holder, term),) = set(story.holders().values())
    assert holder == C and term > 1, "plans of the two tenures must not bear the same numbers"


def test_a_lease_in_anothers_name_or_without_end_is_ignored() -> None:
    election = Election(A, CONFIG, 0.0)
    election.lease(B, Lease(term=5, coordinator=C, stability=1, duration_s=4), 0.0)
    election.lease(B, Lease(term=9, coordinator=B, stability=1, duration_s=1e9), 0.0)
    assert election.holder is None


def test_the_holders_own_view_ends_before_everyone_elses() -> None:
    election = Election(A, CONFIG, 0.0)
    election.tick(1.5, Candidate(A, 5.0), list, ())
    assert election.i_hold(1.6)
    assert not election.i_hold(1.5 + CONFIG.duration_s - CONFIG.drift_margin_s)


def test_a_holder_that_hears_of_a_higher_term_claims_above_it() -> None:
    election = Election(A, CONFIG, 0.0)
    election.tick(1.5, Candidate(A, 5.0), list, ())
    election.see_term(7)
    election.tick(1.6, Candidate(A, 5.0), list, ())
    assert election.i_hold(1.7) and election.term == 8


def test_rank_prefers_uptime_in_doublings_then_the_larger_id() -> None:
    everyone = [Candidate(A, 500.0), Candidate(B, 20.0), Candidate(C, 25.0)]
    assert [place(one, everyone, most=8) for one in everyone] == [0, 2, 1]
    assert place(everyone[1], everyone, most=1) == 1
    assert steadiest(everyone, 2) == [A, C]
    assert [stability(s) for s in (0, 59, 61, 121, 3600)] == [0, 0, 1, 2, 6]


def test_a_newcomer_told_of_a_coordinator_reports_to_it_and_gives_its_lease_time() -> None:
    config = LeaseConfig()
    election = Election(A, config, 0.0)
    assert election.told_of(B, 3, 1.0), "nobody was heard yet: report to B"
    assert not election.told_of(B, 3, 1.1), "once for each term"
    assert election.tick(1.0 + config.duration_s - 0.1, Candidate(A, 5.0), list, ()) == []
    election.tick(1.0 + config.duration_s, Candidate(A, 5.0), list, ())
    assert election.holder == A and election.term == 4, "B's lease never came; its term is not used again"


def test_records_that_name_a_dead_coordinator_do_not_delay_those_who_heard_it() -> None:
    config = LeaseConfig()
    election = Election(A, config, 0.0)
    election.lease(B, Lease(term=3, coordinator=B, stability=0, duration_s=config.duration_s), 1.0)
    election.vacate(B, 2.0)
    assert not election.told_of(B, 3, 2.1)
    election.tick(2.2, Candidate(A, 5.0), list, ())
    assert election.holder == A and election.term == 4


def test_a_holder_outranked_in_its_own_term_says_so() -> None:
    election = Election(A, LeaseConfig(), 0.0)
    election.tick(10.0, Candidate(A, 5.0), list, ())
    stronger = Lease(term=election.term, coordinator=B, stability=9, duration_s=4.0)
    told = [e.message for e in election.lease(B, stronger, 10.1) if isinstance(e, Send)]
    assert election.holder == B
    assert [(m.coordinator, m.term) for m in told if isinstance(m, Lease)] == [(A, stronger.term)]


def test_those_who_know_only_the_front_do_not_all_claim_at_once_when_it_is_gone() -> None:
    front = [Candidate(PeerId(f"z{n:02d}"), 3_600.0) for n in range(CONFIG.stagger_ranks_max)]
    claimed: dict[float, int] = {}
    for number in range(200):
        me = PeerId(f"p{number}")
        election, now = Election(me, CONFIG, 0.0), 0.0
        while election.holder is None:
            now += CONFIG.claim_stagger_s
            election.tick(now, Candidate(me, 10.0), lambda: front, ())
        claimed[now] = claimed.get(now, 0) + 1
    assert min(claimed) > CONFIG.stagger_ranks_max * CONFIG.claim_stagger_s, "the front claims first"
    assert len(claimed) > STAGGER_SPREAD / 2 and max(claimed.values()) < 200 / 8

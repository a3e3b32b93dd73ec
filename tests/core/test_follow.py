"""A client's picture of the swarm: whose word it takes, and that turns are kept while peers come and go."""

from __future__ import annotations

import random
from collections import Counter

from helixnet.core.plan.plan import Assignment, Flow, Placement, Plan, Prediction
from helixnet.core.route.follow import KV_HIGH_WATER, VIEW_STALE_S, SwarmView, best_informed
from helixnet.core.swarm.records import PeerRecord
from helixnet.core.types import PeerId, Span
from helixnet.core.wire import messages as wire
from tests.virtual_swarm import LAYERS, MANIFEST

A, B, C, BOSS = PeerId("a"), PeerId("b"), PeerId("c"), PeerId("boss")
WHOLE = Span(0, LAYERS)


def record(peer: PeerId, kv_free: float = 1.0, **changes: object) -> PeerRecord:
    values = {"peer": peer, "name": peer, "addresses": (), "model": "toy", "manifest_hash": MANIFEST.hash}
    return PeerRecord(**{**values, "state": "active", "held": (WHOLE,), "kv_free": kv_free, **changes})  # type: ignore[arg-type]


def a_plan(epoch: int, **flows: float) -> Plan:
    placement = Placement(
        assignments=tuple(Assignment(PeerId(peer), WHOLE) for peer in sorted(flows)),
        flows=tuple(Flow(None, PeerId(peer), rate) for peer, rate in sorted(flows.items())),
        prediction=Prediction(tokens_per_s=1.0, bound_tokens_per_s=1.0, ttft_s=1.0, tpot_s=1.0),
    )
    return Plan(term=1, epoch=epoch, coordinator=BOSS, manifest_hash=MANIFEST.hash, layers=LAYERS, placement=placement)


def a_view(plan: Plan | None, *records: PeerRecord, manifest_hash: str = MANIFEST.hash) -> wire.View:
    return wire.View(
        manifest_hash=manifest_hash,
        model="toy",
        layers=LAYERS,
        context_tokens=100,
        term=1,
        coordinator=BOSS,
        plan=plan,
        active=True,
        members=tuple(wire.MemberView(record=one, state=one.state) for one in records),
    )


def picked(followed: SwarmView, masked: frozenset[PeerId] = frozenset()) -> PeerId:
    pipeline = followed.pick(masked)
    assert not isinstance(pipeline, str), pipeline
    return pipeline[0].peer


def test_an_older_plan_never_replaces_a_newer_one() -> None:
    followed = SwarmView(random.Random(0))
    followed.take(a_view(a_plan(2, a=1.0), record(A), record(B)), 0.0)
    followed.take(a_view(a_plan(1, b=1.0), record(A), record(B)), 1.0)
    assert picked(followed) == A


def test_a_prompt_goes_where_one_went_that_began_alike_unless_that_peer_is_full() -> None:
    followed, chain = SwarmView(random.Random(0)), (b"1", b"2")
    followed.take(a_view(a_plan(1, a=1.0, b=1.0), record(A), record(B)), 0.0)
    turns = [followed.pick(frozenset(), chain) for _ in range(4)]
    assert len(set(turns)) == 2, "nobody ran it yet"
    way = turns[0]
    assert not isinstance(way, str)
    followed.ran(way, chain)
    assert [followed.pick(frozenset(), (*chain, b"3")) for _ in range(3)] == [way] * 3
    other = B if way[0].peer == A else A
    full = record(way[0].peer, kv_free=KV_HIGH_WATER / 2)
    followed.take(a_view(a_plan(1, a=1.0, b=1.0), full, record(other)), 1.0)
    after = [followed.pick(frozenset(), chain) for _ in range(3)]
    assert after != [way] * 3


def test_views_of_another_model_are_ignored() -> None:
    followed = SwarmView(random.Random(0))
    followed.take(a_view(a_plan(1, a=1.0), record(A)), 0.0)
    other = a_view(a_plan(9, b=1.0), record(B), manifest_hash="other")
    assert not followed.is_ours(other) and not followed.take(other, 1.0)
    assert picked(followed) == A


def test_turns_go_on_while_peers_come_and_go() -> None:
    """Shares follow the flows although a bystander's record changes with every view."""
    followed = SwarmView(random.Random(0))
    counts: Counter[PeerId] = Counter()
    for number in range(100):
        bystander = [record(C, held=())] if number % 2 else []
        followed.take(a_view(a_plan(1, a=3.0, b=1.0), record(A), record(B), *bystander), float(number))
        counts[picked(followed)] += 1
    assert abs(counts[A] - 75) <= 1


def test_news_is_only_what_changes_routes() -> None:
    followed = SwarmView(random.Random(0))
    assert followed.take(a_view(a_plan(1, a=1.0, b=1.0), record(A), record(B)), 0.0)
    assert not followed.take(a_view(a_plan(1, a=1.0, b=1.0), record(A, kv_free=0.5), record(B)), 1.0)
    assert followed.take(a_view(a_plan(1, a=1.0, b=1.0), record(A)), 2.0), "b is gone"


def test_the_full_have_their_turns_until_somebody_is_routed_around() -> None:
    followed = SwarmView(random.Random(0))
    plan = a_plan(1, a=1.0, b=1.0, c=1.0)
    followed.take(a_view(plan, record(A, kv_free=KV_HIGH_WATER / 2), record(B), record(C)), 0.0)
    assert {picked(followed) for _ in range(3)} == {A, B, C}
    assert {picked(followed, frozenset({B})) for _ in range(4)} == {C}
    assert picked(followed, frozenset({B, C})) == A


def test_somebody_else_is_asked_when_the_one_asked_falls_silent_or_is_gone() -> None:
    followed = SwarmView(random.Random(0))
    assert followed.is_stale(0.0)
    followed.asked = A
    followed.take(a_view(None, record(A)), 10.0)
    assert not followed.is_stale(10.0 + VIEW_STALE_S) and followed.better_informed() == BOSS
    followed.gone(B)
    assert not followed.is_stale(11.0)
    followed.gone(A)
    assert followed.is_stale(11.0)


def test_who_is_named_is_asked_first_then_who_has_seen_most() -> None:
    records = [record(A, term=1), record(B, term=3), record(C, term=2)]
    assert best_informed(records, C) == [C, B]
    assert best_informed(records, None) == [B] and best_informed([], A) == []

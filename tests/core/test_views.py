"""Views: everybody once, then what changed, so that whoever follows has the whole picture at every moment."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.route import views as views_module
from helixnet.core.route.follow import KV_HIGH_WATER, VIEW_RENEW_S, SwarmView
from helixnet.core.route.views import Views, ViewsConfig, outline
from helixnet.core.swarm.records import LinkMeasure, PeerRecord
from helixnet.core.types import PeerId, Span
from helixnet.core.wire import messages as wire
from tests.core.test_follow import BOSS, A, B, a_plan, a_view, record

CLIENT, OTHER = PeerId("client"), PeerId("other")


class Following:
    """A peer that shows its members, and a client that follows it."""

    def __init__(self, config: ViewsConfig | None = None) -> None:
        self.views = Views(config or ViewsConfig())
        self.followed = SwarmView(random.Random(0))
        self.members: dict[PeerId, PeerRecord] = {}
        self.head = a_view(None)
        self.now = 0.0

    def ask(self) -> wire.View:
        self.refresh()
        view = self.views.look(CLIENT, self.followed.ask(BOSS, self.now), self.head, self.now)
        self.followed.take(view, self.now, BOSS)
        return view

    def refresh(self) -> None:
        self.views.refresh((one, one.state) for _, one in sorted(self.members.items()))

    def push(self, arrives: bool = True) -> wire.View:
        self.refresh()
        ((_, view),) = self.views.news(self.head)
        if arrives:
            self.followed.take(view, self.now, BOSS)
        return view

    def seen(self) -> dict[PeerId, tuple[Span, ...]]:
        assert self.followed.view is not None
        return {row.record.peer: row.record.held for row in self.followed.view.members}

    def true(self) -> dict[PeerId, tuple[Span, ...]]:
        return {peer: one.held for peer, one in self.members.items()}


def test_a_push_says_only_what_changed() -> None:
    story = Following()
    story.members = {A: record(A), B: record(B)}
    assert len(story.ask().members) == 2
    assert story.push().members == (), "nothing changed"
    story.members[A] = record(A, uptime_s=99.0, sessions=3)
    assert story.push().members == (), "nothing that routing takes"
    story.members[A] = record(A, kv_free=KV_HIGH_WATER / 2)
    assert [row.record.peer for row in story.push().members] == [A]
    del story.members[A]
    assert story.push().gone == (A,)
    assert story.seen() == {B: record(B).held}


def test_a_plan_is_shown_once() -> None:
    story = Following()
    story.head = msgspec.structs.replace(a_view(a_plan(1, a=1.0)), number=(1, 1))
    assert story.ask().plan is not None
    assert story.push().plan is None and story.followed.view is not None and story.followed.view.plan is not None
    story.head = msgspec.structs.replace(a_view(a_plan(2, a=1.0)), number=(1, 2))
    assert story.push().plan == story.head.plan == story.followed.view.plan


def test_whoever_missed_a_view_asks_for_everything() -> None:
    story = Following()
    story.members = {A: record(A)}
    story.ask()
    story.members[B] = record(B)
    story.push(arrives=False)
    story.members[B] = record(B, held=())
    story.push()
    assert story.seen() == {A: record(A).held}, "it cannot be applied"
    assert story.followed.renewal(story.now) is not None
    assert story.ask().since == 0 and story.seen() == story.true()


def test_what_changed_meanwhile_is_all_that_a_renewal_brings() -> None:
    story = Following()
    story.members = {A: record(A)}
    story.ask()
    story.members[B] = record(B)
    assert story.followed.renewal(story.now + VIEW_RENEW_S / 2) is None
    story.now += VIEW_RENEW_S
    assert story.followed.renewal(story.now) is not None
    view = story.ask()
    assert view.since and [row.record.peer for row in view.members] == [B] and story.seen() == story.true()


def test_differences_of_others_than_the_one_asked_are_not_taken() -> None:
    story = Following()
    story.members = {A: record(A)}
    story.ask()
    story.members = {B: record(B)}
    view = story.push(arrives=False)
    story.followed.take(view, 0.0, OTHER)
    assert story.seen() == {A: record(A).held}


def test_a_view_for_people_does_not_disturb_the_order_of_differences() -> None:
    story = Following()
    story.members = {A: record(A)}
    story.ask()
    story.followed.take(a_view(None, record(A), record(B, state="active")), 0.0, BOSS)
    story.members[A] = record(A, held=())
    story.push()
    assert story.seen()[A] == ()


def test_nobody_is_sent_views_who_does_not_ask_again() -> None:
    story = Following(ViewsConfig(subscribed_s=30.0))
    story.ask()
    assert story.views.has_subscribers(29.0) and not story.views.has_subscribers(30.0)


def test_only_so_many_follow_at_once_but_everybody_is_answered() -> None:
    story = Following(ViewsConfig(subscribers_max=1))
    story.members = {A: record(A)}
    story.ask()
    view = story.views.look(OTHER, wire.GetView(subscribe=True), story.head, 0.0)
    assert len(view.members) == 1 and [peer for peer, _ in story.views.news(story.head)] == [CLIENT]
    story.views.forget(CLIENT)
    assert not story.views.has_subscribers(0.0)


def test_the_dead_are_not_shown() -> None:
    views = Views(ViewsConfig())
    views.refresh([(record(A), "dead"), (record(B), "suspect")])
    assert [row.record.peer for row in views.since(0)[1]] == [B]


def test_who_looks_after_goings_were_forgotten_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "GONE_MAX", 2)
    story = Following()
    peers = [PeerId(f"p{n}") for n in range(5)]
    story.members = {peer: record(peer) for peer in peers}
    story.ask()
    for peer in peers[:4]:
        del story.members[peer]
        story.refresh()
    assert story.push().since == 0 and story.seen() == story.true()


def test_an_outline_has_what_routing_takes_and_nothing_else() -> None:
    whole = record(A, links=(LinkMeasure(B, 0.1, 1e6),), sessions=7, addresses=("/ip4/1.2.3.4",))
    shown = outline(whole)
    assert (shown.peer, shown.held, shown.addresses, shown.state) == (A, whole.held, whole.addresses, "active")
    assert not shown.links and not shown.sessions and not shown.model


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3), st.booleans()), max_size=40))
def test_whatever_happens_the_follower_has_the_whole_picture(steps: list[tuple[str, int, bool]]) -> None:
    story = Following()
    story.ask()
    for name, layers, lost in steps:
        peer = PeerId(name)
        if layers:
            story.members[peer] = record(peer, held=(Span(0, layers),))
        else:
            story.members.pop(peer, None)
        story.push(arrives=not lost)
        if not lost and story.followed.renewal(story.now) is not None:
            story.ask()
        if not lost:
            assert story.seen() == story.true()

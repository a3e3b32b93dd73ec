"""A request as its client sees it, message by message."""

from __future__ import annotations

import itertools

from helixnet.core.errors import CapacityError
from helixnet.core.machine import Send
from helixnet.core.prefix import Chain, chain_of
from helixnet.core.route.pipeline import Pipeline, Stage
from helixnet.core.route.request import Request, RequestConfig, RequestSpec
from helixnet.core.types import PeerId, SessionId, Span
from helixnet.core.wire import messages as wire

ENTRY = PeerId("entry")
PIPELINE: Pipeline = (Stage(ENTRY, Span(0, 6)),)
CONFIG = RequestConfig(patience_s=60.0, attempts_max=8)


class OneWay:
    """There is one pipeline, as long as its entry is not avoided."""

    def __init__(self) -> None:
        self.given_back = self.avoided = 0
        self.asked: list[Chain] = []
        self.remembered: list[Chain] = []

    def pick(self, masked: frozenset[PeerId], chain: Chain = ()) -> Pipeline | str:
        self.asked.append(chain)
        self.avoided += ENTRY in masked
        return "all are full" if ENTRY in masked else PIPELINE

    def takes(self, peer: PeerId) -> tuple[str, ...]:
        return ("",)

    def ran(self, pipeline: Pipeline, chain: Chain) -> None:
        self.remembered.append(chain)

    def give_back(self, pipeline: Pipeline) -> None:
        assert pipeline == PIPELINE
        self.given_back += 1


def a_request(
    routes: OneWay | None = None, tokens_max: int = 1, prompt: tuple[int, ...] = (1, 2), salt: str | None = ""
) -> Request:
    names = (SessionId(f"s{number}") for number in itertools.count())
    spec = RequestSpec(manifest_hash="m", context_tokens=1000, prompt=prompt, tokens_max=tokens_max, cache_salt=salt)
    request = Request(spec, routes or OneWay(), lambda: next(names), CONFIG, 0.0)
    request.tick(0.0)
    return request


def refuse(request: Request, now: float, code: str = "busy") -> None:
    assert request.session is not None
    request.receive(ENTRY, wire.Refused(session=request.session, peer=ENTRY, code=code), now)


def test_full_peers_are_asked_again_and_again_while_patience_lasts() -> None:
    request = a_request()
    now = 0.0
    for _ in range(3 * CONFIG.attempts_max):
        refuse(request, now)
        while request.session is None:
            now = request.deadline()
            request.tick(now)
        assert not request.over and len(request.pipelines) == 1
    assert request.session is not None
    request.receive(ENTRY, wire.Token(session=request.session, index=0, token_id=7, finish="length"), now)
    assert (request.tokens, request.finish) == ([7], "length")


def test_who_is_refused_gives_its_turn_back_and_waits_before_it_goes_around_the_full() -> None:
    routes = OneWay()
    request = a_request(routes)
    refuse(request, 0.0)
    assert (routes.given_back, routes.avoided) == (1, 0)
    now = request.deadline()
    assert now > 0.0, "there is a pause"
    request.tick(now)
    refuse(request, CONFIG.turn_s)
    assert (routes.given_back, routes.avoided) == (1, 1), "its entry is avoided now, and there is no other way"


def test_patience_ends_and_says_what_the_matter_was() -> None:
    request = a_request()
    now = 0.0
    while not request.over:
        if request.session is not None:
            refuse(request, now)
        now = request.deadline()
        request.tick(now)
    assert "giving up" in str(request.error) and now >= CONFIG.patience_s


def test_pipelines_that_break_are_counted() -> None:
    request = a_request()
    for _ in range(CONFIG.attempts_max):
        assert request.session is not None
        request.receive(ENTRY, wire.Broken(session=request.session, reason="it broke"), 0.0)
    assert request.over and "it broke" in str(request.error)


def test_a_request_longer_than_any_way_has_room_for_soon_ends_with_a_sentence() -> None:
    request = a_request()
    refuse(request, 1.0, "too_long")
    request.plan_changed(2.0)
    request.tick(2.0)
    refuse(request, 2.1, "too_long")
    while not request.over:
        now = request.deadline()
        request.tick(now)
    assert now == 1.0 + CONFIG.too_long_s
    assert isinstance(request.error, CapacityError)
    assert "2 prompt and 1 new tokens" in str(request.error) and "fewer" in str(request.error)


def test_a_stream_that_finds_only_small_stages_waits_for_other_layers() -> None:
    request = a_request(tokens_max=2)
    assert request.session is not None
    request.receive(ENTRY, wire.Token(session=request.session, index=0, token_id=7), 1.0)
    request.receive(ENTRY, wire.Broken(session=request.session, reason="it broke"), 1.0)
    refuse(request, 1.0, "too_long")
    assert not request.over
    request.plan_changed(2.0)
    (opened,) = (e.message for e in request.tick(2.0) if isinstance(e, Send) and isinstance(e.message, wire.Open))
    assert (opened.prompt, opened.made) == ((1, 2, 7), 1)
    assert len(request.pipelines) == 2, "whoever was too small may have more room now"


def test_what_was_run_is_remembered_and_asked_for_but_not_insisted_on() -> None:
    prompt = tuple(range(100))
    for salt, chain in (("", chain_of("", prompt)), ("ours", chain_of("ours", prompt)), (None, ())):
        routes = OneWay()
        request = a_request(routes, tokens_max=2, prompt=prompt, salt=salt)
        refuse(request, 0.0)
        request.tick(request.deadline())
        assert routes.asked == [chain, ()], "whoever was refused there goes where there is room"
        assert request.session is not None
        request.receive(ENTRY, wire.Opened(session=request.session, cached=64), 1.0)
        for index, finish in enumerate(("", "length")):
            token = wire.Token(session=request.session, index=index, token_id=7, finish=finish)
            request.receive(ENTRY, token, 1.0)
        assert routes.remembered == [chain, chain] and request.cached == 64

"""What the terminal of a peer says about what happens to it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace
from rich.console import Console

from helixnet.core.machine import Event
from helixnet.core.model import Manifest
from helixnet.core.peer import Peer, PeerConfig, PeerFacts
from helixnet.core.swarm.capability import Capability, RatePoint
from helixnet.core.types import PeerId, Span
from helixnet.daemon.narrate import REPEAT_S, SERVED_LINE_S, Narrator

ME = PeerId("12D3KooWThisPeerAbCdEf")
OTHER = PeerId("12D3KooWOtherPeerUvWxYz")
MANIFEST = Manifest(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=30,
    hidden_size=64,
    vocab_size=100,
    context_tokens=512,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    layer_bytes=1_000_000,
    embedding_bytes=1_000,
    head_bytes=1_000,
    source_format="safetensors",
    config_sha256="a",
    tokenizer_sha256="b",
    weights_sha256="c",
)
CAPABILITY = Capability(
    device="AMD EPYC, 1 thread",
    matmul_flops=94.8e9,
    memory_bandwidth=18.7e9,
    decode=(RatePoint(1, 0.0025), RatePoint(64, 0.016)),
    prefill=(RatePoint(512, 0.0625),),
    memory_bytes=400_000_000,
)


@dataclass
class Stage:
    """A narrator with a terminal to read and a clock to turn."""

    terminal: bool = False
    now: float = 100.0
    peer: Peer | None = None
    out: io.StringIO = field(default_factory=io.StringIO)

    def __post_init__(self) -> None:
        console = Console(file=self.out, force_terminal=self.terminal, width=100, highlight=False)
        self.narrator = Narrator(console, lambda: self.peer, lambda: self.now)

    def hear(self, kind: str, **data: object) -> None:
        self.narrator(Event(kind, data))

    def lines(self) -> list[str]:
        """What was said, without the time of day."""
        return [line.split("  ", 1)[1] for line in self.out.getvalue().splitlines()]


def a_peer() -> Peer:
    facts = PeerFacts(peer=ME, name="kitchen", network="main", manifest=MANIFEST, memory_bytes=40_000_000)
    return Peer(facts, PeerConfig(), 0.0)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        pytest.param(
            "peer.joined",
            {"peer": ME, "addresses": ["/ip4/127.0.0.1/tcp/1"], "model": "tiny"},
            ["joined as …AbCdEf, tiny", "  reachable at /ip4/127.0.0.1/tcp/1"],
            id="joined",
        ),
        pytest.param(
            "peer.measured",
            {"capability": CAPABILITY},
            [
                "measured AMD EPYC, 1 thread: 94.8 GFLOP/s, reads memory at 18.7 GB/s; lends 400 MB",
                "  one layer: 400 tokens/s decoding alone, 4 000 tokens/s 64 at a time, 8 192 tokens/s reading prompts",
            ],
            id="measured",
        ),
        pytest.param(
            "peer.measured",
            {"capability": replace(CAPABILITY, engine="torch 9"), "instead_of": "vllm 8 takes 1.4 times as long"},
            [
                "measured AMD EPYC, 1 thread: 94.8 GFLOP/s, reads memory at 18.7 GB/s; lends 400 MB",
                "  one layer: 400 tokens/s decoding alone, 4 000 tokens/s 64 at a time, 8 192 tokens/s reading prompts",
                "  served by torch 9; vllm 8 takes 1.4 times as long",
            ],
            id="chosen",
        ),
        pytest.param(
            "coordinator.changed",
            {"coordinator": OTHER, "term": 3},
            ["…UvWxYz is the coordinator (term 3)"],
            id="other",
        ),
        pytest.param(
            "coordinator.changed",
            {"coordinator": ME, "term": 3},
            ["this peer coordinates the swarm now (term 3)"],
            id="me",
        ),
        pytest.param(
            "plan.followed",
            {"term": 1, "epoch": 2, "span": "[0, 10)"},
            ["plan 1.2: this peer is to hold layers 0-9"],
            id="a-span",
        ),
        pytest.param(
            "plan.followed",
            {"term": 1, "epoch": 2, "span": "none"},
            ["plan 1.2: nothing for this peer to hold"],
            id="no-span",
        ),
        pytest.param("plan.weighed", {"adopt": False, "why": "it does not pay", "seconds": 0.1}, [], id="not-adopted"),
        pytest.param(
            "plan.weighed",
            {"adopt": True, "why": "the first", "seconds": 0.12},
            ["planned after 0.1 s: the first"],
            id="new",
        ),
        pytest.param(
            "plan.active", {"term": 1, "epoch": 2, "peers": 3}, ["plan 1.2 is active, served by 3 peers"], id="active"
        ),
        pytest.param("span.loading", {"span": "[0, 10)", "bytes": 5, "of_bytes": 10}, [], id="loading"),
        pytest.param(
            "span.loaded", {"span": "[0, 1)", "seconds": 0.82, "problem": ""}, ["loaded layers 0 in 0.8 s"], id="loaded"
        ),
        pytest.param(
            "span.loaded",
            {"span": "[0, 2)", "seconds": 0.8, "problem": "no room"},
            ["layers 0-1 could not be loaded: no room"],
            id="not-loaded",
        ),
        pytest.param("peer.leaving", {"sessions": 0}, ["leaving the swarm (Ctrl-C again: at once)"], id="leaving"),
        pytest.param("peer.left", {"tokens": 1234}, ["left; served 1 234 tokens in all. Thank you!"], id="left"),
        pytest.param("engine.failed", {"why": "it broke"}, ["the engine failed: it broke"], id="engine"),
        pytest.param("something.new", {"x": 1}, [], id="unknown-kind"),
    ],
)
def test_an_event_is_told_in_words(kind: str, data: dict[str, object], said: list[str]) -> None:
    stage = Stage(peer=a_peer())
    stage.hear(kind, **data)
    assert stage.lines() == said


def test_a_plan_that_is_seen_again_is_told_once() -> None:
    stage = Stage()
    for _ in range(3):
        stage.hear("plan.followed", term=1, epoch=1, span="[0, 3)")
    assert len(stage.lines()) == 1


def test_a_stranger_cannot_flood_the_terminal() -> None:
    stage = Stage()
    for _ in range(1000):
        stage.hear("peer.broke_protocol", peer=OTHER, why="garbage")
    assert stage.lines() == ["…UvWxYz broke the protocol: garbage"]
    stage.now += REPEAT_S
    stage.hear("peer.broke_protocol", peer=OTHER, why="garbage")
    assert stage.lines()[1:] == ["…UvWxYz broke the protocol: garbage (999 times more since)"]


def test_a_stranger_cannot_steer_the_terminal() -> None:
    stage = Stage()
    stage.hear("record.refused", peer=OTHER, why="\x1b[2Jgone [bold]x[/]")
    assert stage.lines() == ["a peer's record was refused: [2Jgone [bold]x[/]"]


def test_without_a_terminal_only_what_was_served_is_told_now_and_then() -> None:
    stage = Stage(peer=a_peer())
    stage.now += SERVED_LINE_S
    stage.narrator.refresh()
    assert stage.lines() == []
    assert stage.peer is not None
    stage.peer.stage.meter.count(None, 250, stage.now)
    stage.now += SERVED_LINE_S / 2
    stage.narrator.refresh()
    assert stage.lines() == []
    stage.now += SERVED_LINE_S / 2
    stage.narrator.refresh()
    assert stage.lines() == ["served 250 tokens in 10 s, 0 sessions open"]


def test_the_last_line_of_a_terminal_shows_what_is_held_and_served() -> None:
    stage = Stage(terminal=True, peer=a_peer())
    assert stage.peer is not None
    stage.peer.stage.set_held((Span(0, 10),), (Span(0, 10),))
    stage.peer.stage.meter.count(None, 250, stage.now)
    stage.narrator.refresh()
    stage.narrator.close()
    assert "layers 0-9 of 30 · 25 tokens/s · 0 sessions · KV 100 % free" in stage.out.getvalue()


def test_the_last_line_shows_how_far_loading_is() -> None:
    stage = Stage(terminal=True, peer=a_peer())
    stage.hear("span.loading", span="[0, 10)", bytes=2_500_000, of_bytes=10_000_000)
    assert stage.peer is not None
    assert str(stage.narrator.last_line(stage.peer, stage.now)).startswith("● loading layers 0-9: 25 % of 10 MB")

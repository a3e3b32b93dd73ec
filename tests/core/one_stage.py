"""One stage, and what is said to it."""

from __future__ import annotations

from typing import Any

from helixnet.core.machine import Effect, Send
from helixnet.core.route.pipeline import Stage
from helixnet.core.sampling import Sampling
from helixnet.core.stage.pages import PAGE_TOKENS
from helixnet.core.stage.stage import StageConfig, StageMachine
from helixnet.core.stage.work import Work
from helixnet.core.types import PeerId, SessionId, Span
from helixnet.core.wire import messages as wire
from tests.virtual_swarm import LAYERS, MANIFEST

AHEAD_TOKENS = StageConfig().ahead_tokens
ME, NEXT, CLIENT, STRANGER = PeerId("me"), PeerId("next"), PeerId("client"), PeerId("stranger")
ROW = 32  # 8 float32
PIPELINE = (Stage(ME, Span(0, 3)), Stage(NEXT, Span(3, LAYERS)))


FIRST_HALF = Span(0, 3)


def a_stage(held: Span = FIRST_HALF, pages: int = 1_000) -> StageMachine:
    weights = MANIFEST.span_bytes(held.start, held.stop)
    stage = StageMachine(ME, MANIFEST, weights + pages * PAGE_TOKENS * MANIFEST.kv_bytes, StageConfig())
    stage.set_held((held,), (held,))
    return stage


def reserve(session: str = "s", stage: int = 0, **changes: Any) -> wire.Reserve:
    values: dict[str, Any] = {
        "session": SessionId(session),
        "pipeline": PIPELINE,
        "stage": stage,
        "manifest_hash": MANIFEST.hash,
        "tokens_max": 40,
        "prompt_tokens": 1,
        "sampling": Sampling(),
    }
    return wire.Reserve(**{**values, **changes})


def sent(effects: list[Effect]) -> list[wire.Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def refusal(effects: list[Effect]) -> str:
    (message,) = sent(effects)
    assert isinstance(message, wire.Refused)
    return message.code


WHOLE = Span(0, 3)


def work(session: str, position: int, tokens: int, decode: bool = False, layers: Span = WHOLE) -> Work:
    ids = (1,) * tokens
    return Work(session=SessionId(session), layers=layers, position=position, token_ids=ids, decode=decode)

"""Messages to bytes and back, checked against the protocol's bounds."""

from __future__ import annotations

import msgspec

from helixnet.core.errors import RemoteProtocolError
from helixnet.core.plan.plan import PEERS_MAX
from helixnet.core.prefix import BLOCK_TOKENS, HASH_BYTES, SALT_CHARS_MAX, Chain
from helixnet.core.route.pipeline import STAGES_MAX
from helixnet.core.sampling import LOGPROBS_MAX, STOP_IDS_MAX, Logprobs
from helixnet.core.swarm.records import ADDRESSES_MAX
from helixnet.core.types import SESSION_ID_CHARS_MAX
from helixnet.core.wire.messages import (
    CHAIN_MAX,
    DRAFTS_MAX,
    PROMPT_TOKENS_MAX,
    STEPS_MAX,
    TEXT_CHARS_MAX,
    Broken,
    Goodbye,
    Lease,
    Message,
    Open,
    Opened,
    Refused,
    Release,
    Reserve,
    Reserved,
    Sampled,
    Steps,
    Token,
    View,
    Yielded,
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """The message as bytes."""
    return _encoder.encode(message)


def decode_message(data: bytes | memoryview) -> Message:
    """The message in `data`, checked against the protocol's bounds.

    Raises:
        RemoteProtocolError: malformed, of an unknown kind, or out of bounds.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"malformed message: {error}") from None
    problem = _out_of_bounds(message)
    if problem:
        raise RemoteProtocolError(problem)
    return message


def _out_of_bounds(message: Message) -> str:
    """What is too large or impossible in the message; empty if nothing."""
    session = getattr(message, "session", "")
    if len(session) > SESSION_ID_CHARS_MAX:
        return "a session id is too long"
    match message:
        case Open():
            return _wrong_open(message)
        case Reserve():
            return _wrong_reserve(message)
        case Reserved() | Opened():
            if not 0 <= message.cached <= PROMPT_TOKENS_MAX:
                return "more is cached than a prompt can have"
        case Release():
            return _wrong_chain(message.chain)
        case Steps() | Sampled():
            if len(message.items) > STEPS_MAX:
                return "too many steps in one frame"
            if isinstance(message, Sampled) and any(_has_too_many(item.logprobs) for item in message.items):
                return "too many log probabilities"
        case Token():
            if _has_too_many(message.logprobs):
                return "too many log probabilities"
        case Yielded() | Lease():
            if len(message.addresses) > ADDRESSES_MAX:
                return "too many addresses of a coordinator"
        case View():
            if max(len(message.members), len(message.gone)) > PEERS_MAX + 1:
                return "too many members in one view"
        case Goodbye() | Broken() | Refused():
            if len(message.reason) > TEXT_CHARS_MAX:
                return "a reason is too long"
    return ""


def _wrong_open(message: Open) -> str:
    if not 1 <= len(message.prompt) <= PROMPT_TOKENS_MAX or not 1 <= message.tokens_max <= PROMPT_TOKENS_MAX:
        return "a prompt or token limit is out of bounds"
    if len(message.stop_ids) > STOP_IDS_MAX or len(message.pipeline) > STAGES_MAX:
        return "too many stop ids or stages"
    if min(message.prompt) < 0:
        return "a token id is negative"
    if not 0 <= message.drafts <= DRAFTS_MAX:
        return "too many drafts in a step"
    if not 0 <= message.made < len(message.prompt):
        return "a prompt has no token that was not made"
    if len(message.cache_salt or "") > SALT_CHARS_MAX:
        return "a salt is too long"
    return ""


def _wrong_reserve(message: Reserve) -> str:
    if not 0 <= message.stage < len(message.pipeline) <= STAGES_MAX:
        return "a reservation names a stage its pipeline does not have"
    if not 1 <= message.prompt_tokens <= message.tokens_max <= 2 * PROMPT_TOKENS_MAX:
        return "a reservation is out of bounds"
    if not 0 <= message.made < message.prompt_tokens or len(message.prompt) not in (0, message.prompt_tokens):
        return "a reservation's history is out of bounds"
    if len(message.stop_ids) > STOP_IDS_MAX:
        return "too many stop ids"
    if len(message.owner) > SESSION_ID_CHARS_MAX:
        return "an owner's word is too long"
    if len(message.chain) > message.prompt_tokens // BLOCK_TOKENS:
        return "a reservation has more blocks than its prompt"
    return _wrong_chain(message.chain)


def _wrong_chain(chain: Chain) -> str:
    wrong = len(chain) > CHAIN_MAX or any(len(one) != HASH_BYTES for one in chain)
    return "a chain is too long or not of hashes" if wrong else ""


def _has_too_many(logprobs: Logprobs | None) -> bool:
    return logprobs is not None and len(logprobs) > LOGPROBS_MAX + 1

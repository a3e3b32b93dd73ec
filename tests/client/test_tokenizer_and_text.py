"""Text to tokens and back: templates run in a sandbox, characters come whole, stop texts end an answer exactly."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from helixnet.core.errors import RemoteProtocolError, UsageError
from helixnet.core.model import ChatFormat
from helixnet_client.tokenizer import Detokenizer, Tokenizer
from helixnet_client.types import options_from

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def a_tokenizer(template: str | None = TEMPLATE, add_bos: bool = False) -> Tokenizer:
    """One token for each byte: the hardest case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    chat = ChatFormat(
        template=template, add_bos=add_bos, bos_id=7, eos_ids=(0,), stop_ids=(0,), special_tokens={"bos_token": "^"}
    )
    return Tokenizer(rust.to_str().encode(), msgspec.json.encode(chat))


BYTES = a_tokenizer()


def shown(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    """The pieces that come out while the tokens of `text` go in."""
    detokenizer = Detokenizer(BYTES, stop)
    pieces = [detokenizer.push(token) for token in BYTES.prompt(text)]
    return [*pieces, detokenizer.finish()], detokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_pieces_together_are_the_text_and_never_half_a_character(text: str) -> None:
    pieces, detokenizer = shown(text)
    assert "".join(pieces) == detokenizer.text == BYTES.decode(BYTES.prompt(text))
    assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one. two", (". ",), "one", True),
        ("one.two", (". ",), "one.two", False),
        ("a##b###c", ("###",), "a##b", True),
        ("ends with #", ("##",), "ends with #", False),
        ("both END and STOP", ("STOP", "END"), "both ", True),
        ("caf\u00e9 noir", ("\u00e9 ",), "caf", True),
    ],
)
def test_a_stop_text_ends_the_answer_just_before_it(
    text: str, stop: tuple[str, ...], expected: str, stopped: bool
) -> None:
    pieces, detokenizer = shown(text, stop)
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped is stopped


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_clear() -> None:
    detokenizer = Detokenizer(BYTES, ("END",))
    pieces = [detokenizer.push(token) for token in BYTES.prompt("xENx")]
    assert pieces == ["x", "", "", "ENx"]


def test_a_conversation_becomes_a_prompt_by_the_models_own_template() -> None:
    ids = BYTES.conversation([{"role": "user", "content": "hi"}])
    assert BYTES.decode(ids) == "<user>hi\n<bot>"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
    ],
    ids=["base model", "template's own rule", "escape from the sandbox"],
)
def test_a_conversation_that_cannot_be_is_refused(template: str | None, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        a_tokenizer(template).conversation([{"role": "user", "content": "hi"}])


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(UsageError, match="non-empty list"):
        BYTES.conversation([])


def test_a_bare_prompt_begins_with_the_models_first_token_where_it_has_one() -> None:
    assert a_tokenizer(add_bos=True).prompt("a")[0] == 7
    assert len(BYTES.prompt("a")) == 1


def test_a_tokenizer_that_is_none_is_the_senders_fault() -> None:
    with pytest.raises(RemoteProtocolError, match="tokenizer cannot be used"):
        Tokenizer(b"garbage", json.dumps({}).encode())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"stop": "text"}, "stop"),
        ({"temprature": 1.0}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
    ids=["no tokens", "stop as a text", "misspelt", "not a number"],
)
def test_a_bad_option_is_refused_with_the_names_of_the_good_ones(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        options_from(options)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"seed": -1}, {"temperature": float("nan")}]
)
def test_sampling_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        options_from(options).sampling(1)


def test_a_seed_is_made_only_where_chance_plays() -> None:
    assert options_from({}).sampling(99).seed == 0
    assert options_from({"temperature": 1.0}).sampling(99).seed == 99
    assert options_from({"temperature": 1.0, "seed": 5}).sampling(99).seed == 5

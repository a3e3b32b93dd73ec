"""Text to tokens and back, from the files that the swarm's peers hand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RustTokenizer

from helixnet.core.errors import RemoteProtocolError, UsageError
from helixnet.core.model import ChatFormat
from helixnet_client.types import Message

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
UNFINISHED_TOKENS_MAX = 8
"""A character never takes more tokens than this; longer garbage is shown as it is."""


class Tokenizer:
    """The model's tokenizer and chat template. The template comes from strangers: it runs in a sandbox."""

    def __init__(self, tokenizer_json: bytes, chat_json: bytes) -> None:
        try:
            self._tokenizer = RustTokenizer.from_buffer(tokenizer_json)
            self._chat = msgspec.json.decode(chat_json, type=ChatFormat)
        except Exception as error:  # the Rust tokenizer raises bare Exception
            raise RemoteProtocolError(f"The swarm's tokenizer cannot be used: {error}") from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        self._template = environment.from_string(self._chat.template) if self._chat.template else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._chat.stop_ids

    def prompt(self, text: str) -> tuple[int, ...]:
        """The ids of a bare prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._chat.add_bos and self._chat.bos_id is not None:
            ids = [self._chat.bos_id, *ids]
        return tuple(ids)

    def conversation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation that the assistant is to continue.

        Raises:
            UsageError: the conversation is empty or malformed, or the model has no chat template.
        """
        if not messages or any(not isinstance(m.get("role"), str) or "content" not in m for m in messages):
            raise UsageError("A conversation is a non-empty list of {'role': ..., 'content': ...}.")
        if self._template is None:
            raise UsageError("This model has no chat template: use generate (or --raw) with a bare prompt.")
        values: dict[str, Any] = {**self._chat.special_tokens, "messages": messages, "add_generation_prompt": True}
        try:
            text = self._template.render(values)
        except TemplateError as error:
            raise UsageError(f"The model's chat template refuses this conversation: {error}.") from None
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def words(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The ids of words where they begin a text, and where a space comes before them."""
        forms = [form for text in texts for form in (text, f" {text}")]
        found = (tuple(self._tokenizer.encode(form, add_special_tokens=False).ids) for form in forms)
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


class Detokenizer:
    """Turns tokens into text as they come: never half a character, never text that a stop text may begin."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0
        self._raw = ""

    def push(self, token_id: int) -> str:
        """Take one token in; returns the text that may be shown now."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        # Decoding needs the token before for its space; older ones do not change the text any more.
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        unfinished = after.endswith(REPLACEMENT) and len(self._ids) - self._shown < UNFINISHED_TOKENS_MAX
        if unfinished or len(after) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        self._raw += after[len(before) :]
        return self._release(final=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if not self.stopped:
            before = self._tokenizer.decode(self._ids[self._start : self._shown])
            self._raw += self._tokenizer.decode(self._ids[self._start :])[len(before) :]
            self._shown = len(self._ids)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._raw.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            safe = min(found)
        else:
            safe = len(self._raw) if final else len(self._raw) - self._held_back()
        piece = self._raw[len(self.text) : safe]
        self.text += piece
        return piece

    def _held_back(self) -> int:
        """How much of the end could be the beginning of a stop text."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._raw)), longest, -1):
                if self._raw.endswith(stop[:size]):
                    longest = size
                    break
        return longest

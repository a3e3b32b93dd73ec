"""What the client gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import msgspec

from helixnet.core.errors import UsageError
from helixnet.core.sampling import SEED_MAX, STOP_IDS_MAX, Logprobs, Sampling

TOKENS_DEFAULT = 256
STOP_TEXTS_MAX = 16
BAD_WORDS_MAX = 32


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


class Usage(msgspec.Struct, frozen=True):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt: computed for an earlier one, not for this request."""


class Timings(msgspec.Struct, frozen=True):
    """Measured at the client, in seconds."""

    ttft_s: float
    """From asking to the first token."""
    tpot_s: float
    """(End to end - TTFT) / (tokens - 1); 0 for a single token."""
    total_s: float


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    """If asked for, of each token: (token id, log probability) of its own, then of the likeliest, best first."""
    finish: str
    """stop (the model ended, or a stop text came), length, or cancelled."""
    usage: Usage
    timings: Timings
    seed: int
    """Asking again with this seed gives the same answer."""
    retries: int
    """Pipelines that broke on the way; the text is not affected."""
    stages: tuple[tuple[str, int, int], ...]
    """The last pipeline: (peer id, first layer, layer after the last) of each stage."""


class Piece(msgspec.Struct, frozen=True):
    """A part of a streamed answer: new text, and the ids of the tokens it came from."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    """As in Completion."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to answer; the keyword arguments of every asking method.

    Raises:
        UsageError: a value is out of range.
    """

    max_tokens: int = TOKENS_DEFAULT
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that prompt or answer have become less likely."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Above 0: tokens that the answer has become less likely; by how often it has them."""
    logit_bias: Mapping[int, float] = {}
    """By token id, -100 to 100."""
    bad_words: Sequence[str] = ()
    """Texts that the answer must not contain as whole words."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Log probabilities of the tokens chosen, and of so many likeliest."""
    seed: int | None = None
    """None: a random one if the temperature is above 0."""
    stop: Sequence[str] = ()
    """Texts that end the answer; they are not part of it."""
    stop_ids: Sequence[int] = ()
    """Token ids that end the answer, besides the model's own."""
    cache_salt: str | None = ""
    """What peers computed of prompt and answer stays with them for a while, and saves time where a later prompt begins
    alike: one of this client's, or of anybody's who gives the same salt. None: nothing stays."""
    background: bool = False
    """It can wait: where peers are busy or short of memory, all other requests come first."""

    packing: str = "raw"
    """How hidden states travel between peers: raw; int8, which halves what slow links carry and changes a few answers;
    exact, as vLLM keeps them, where its peers follow one another."""
    drafts: int = 0
    """So many tokens, 15 at most, are guessed ahead where the text repeats itself, and checked on the way: fewer rounds
    through the peers. The answer stays the same, but for what 16-bit numbers round otherwise where several tokens run
    at once. None where `logprobs` are asked for."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {self.max_tokens}.")
        for name, texts, most in (("stop", self.stop, STOP_TEXTS_MAX), ("bad_words", self.bad_words, BAD_WORDS_MAX)):
            if isinstance(texts, str) or len(texts) > most or not all(texts):
                raise UsageError(f"{name} is a list of up to {most} texts, none of them empty.")
        if len(self.stop_ids) > STOP_IDS_MAX // 2:
            raise UsageError(f"stop_ids has at most {STOP_IDS_MAX // 2} token ids, not {len(self.stop_ids)}.")
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens must be at most max_tokens, {self.max_tokens}, not {self.min_tokens}.")

    def sampling(self, fresh_seed: int, bad_words: tuple[tuple[int, ...], ...] = ()) -> Sampling:
        """These options as the swarm takes them.

        `fresh_seed` is used if no seed was given; `bad_words` are the ids of those here, which take a tokenizer.
        """
        seed = self.seed if self.seed is not None else (fresh_seed % (SEED_MAX + 1) if self.temperature > 0 else 0)
        try:
            return Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=tuple(sorted(self.logit_bias.items())),
                bad_words=bad_words,
                min_tokens=self.min_tokens,
                logprobs=self.logprobs,
                seed=seed,
            )
        except ValueError as error:
            raise UsageError(f"{error}.") from None


def options_from(values: dict[str, object]) -> Options:
    """Options from keyword arguments.

    Raises:
        UsageError: an unknown name or a bad value.
    """
    try:
        return msgspec.convert(values, Options)
    except msgspec.ValidationError as error:
        raise UsageError(f"Bad option: {error}. Options are {', '.join(Options.__struct_fields__)}.") from None

"""`generate` and `chat`, with a client that answers by itself."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import cast

import pytest

from helixnet.core.errors import Busy, HelixError
from helixnet.daemon.cli import make_parser
from helixnet.daemon.generate_command import Chat, summary
from helixnet_client import Client, Completion, Message, Piece, Timings, Usage

COMPLETION = Completion(
    text="Paris.",
    token_ids=(1, 2, 3),
    finish="stop",
    usage=Usage(10, 3),
    timings=Timings(0.21, 0.04, 0.29),
    seed=0,
    retries=0,
    stages=(("12D3KooWAAAAAA", 0, 12), ("12D3KooWBBBBBB", 12, 30)),
)


class FakeStream:
    """Streams what it was told to, then raises what it was told to."""

    def __init__(self, pieces: list[str], error: BaseException | None) -> None:
        self._pieces, self._error = pieces, error
        self.completion = COMPLETION
        self.cancelled = False

    def __iter__(self) -> Iterator[Piece]:
        for text in self._pieces:
            yield Piece(text, (1,))
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True


class FakeClient:
    """Remembers what it was asked."""

    def __init__(self, *streams: FakeStream) -> None:
        self._streams = list(streams)
        self.asked: list[list[Message]] = []

    def stream_chat(self, messages: list[Message], **_: object) -> FakeStream:
        self.asked.append(list(messages))
        return self._streams.pop(0)


def a_chat(monkeypatch: pytest.MonkeyPatch, client: FakeClient, *said: str | BaseException) -> Chat:
    """A conversation in which the person says these things, then presses Ctrl-D."""
    lines = iter(said)

    def read(_: str = "") -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    return Chat(cast(Client, client), make_parser().parse_args(["chat", "--max-tokens", "5"]))


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def test_a_chat_streams_and_remembers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(FakeStream(["Hel", "lo."], None), FakeStream(["Bye."], None))
    a_chat(monkeypatch, client, "Hi", "", "And now?").loop()
    assert capsys.readouterr().out == "Hello.\nBye.\n"
    assert contents(client.asked[1]) == ["Hi", "Hello.", "And now?"]


def test_clear_forgets_and_exit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(FakeStream(["a"], None), FakeStream(["b"], None))
    a_chat(monkeypatch, client, "one", "/clear", "/nonsense", "two", "/exit", "three").loop()
    assert [contents(asked) for asked in client.asked] == [["one"], ["two"]]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = FakeStream(["Once upon"], KeyboardInterrupt())
    client = FakeClient(stopped, FakeStream(["Yes."], None))
    a_chat(monkeypatch, client, "Tell me a story", KeyboardInterrupt(), "Still there?").loop()
    assert stopped.cancelled
    assert contents(client.asked[1]) == ["Still there?"]
    assert "(stopped)" in capsys.readouterr().out


@pytest.mark.parametrize("error", [Busy("No room just now."), HelixError("It broke.")], ids=["busy", "other"])
def test_a_failed_answer_is_told_and_the_chat_goes_on(
    error: HelixError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(FakeStream([], error), FakeStream(["Yes."], None))
    a_chat(monkeypatch, client, "One", "Two").loop()
    captured = capsys.readouterr()
    assert captured.err == f"helixnet: {error}\n"
    assert contents(client.asked[1]) == ["Two"]


def test_the_summary_says_how_long_it_took_and_which_way_it_went() -> None:
    assert summary(COMPLETION, {"12D3KooWAAAAAA": "kitchen"}) == (
        "3 tokens · first after 210 ms · then 25 tokens/s · kitchen 0-11 → …BBBBBB 12-29"
    )

"""`helixnet generate` and `helixnet chat`: ask the swarm from the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from helixnet.core.errors import HelixError, UsageError
from helixnet.daemon.arguments import add_client_arguments, add_command, client_arguments

if TYPE_CHECKING:
    from helixnet.daemon.arguments import Commands
    from helixnet_client import Client, Completion, Message, Stream

GENERATE_EXAMPLE = 'helixnet generate "What is the capital of France?" --max-tokens 40'
CHAT_EXAMPLE = """helixnet chat --temperature 0.7

  /clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops the answer that is running."""
TOKENS_DEFAULT = 256
PROMPT = "you> "


def add_generate_parser(commands: Commands) -> None:
    """Add the `generate` command."""
    parser = add_command(commands, "generate", "ask the swarm one thing and stream the answer", GENERATE_EXAMPLE)
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead: text, token_ids, finish, ..."
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log probabilities of each token and of the N likeliest"
    )
    _add_options(parser)
    parser.set_defaults(func=run_generate)


def add_chat_parser(commands: Commands) -> None:
    """Add the `chat` command."""
    parser = add_command(commands, "chat", "talk with the swarm", CHAT_EXAMPLE)
    _add_options(parser)
    parser.set_defaults(func=run_chat)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=TOKENS_DEFAULT, help="tokens to make at most (256)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", default=1.0, help="sample from this share of the likeliest (1)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", default=0, help="sample from the K likeliest; 0: from all (0)"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", default=0.0, help="sample from what is at least P times the likeliest (0)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R", default=1.0, help="above 1: fewer repetitions (1)"
    )
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text (repeatable)")
    parser.add_argument("--no-cache", action="store_true", help="peers keep nothing of it when the answer has ended")
    parser.add_argument("--background", action="store_true", help="it can wait: others come first where peers are busy")
    parser.add_argument(
        "--packing",
        metavar="P",
        default="raw",
        help="how hidden states travel: raw, int8 (half the bytes, small errors) or exact (between vLLM peers) (raw)",
    )
    parser.add_argument(
        "--drafts",
        type=int,
        metavar="N",
        default=0,
        help="guess up to N tokens ahead, at most 15, where the text repeats itself: fewer rounds (0)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answer")
    parser.add_argument("--verbose", action="store_true", help="say how long it took, even if nobody watches")
    add_client_arguments(parser)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop",
        "seed",
        "background",
        "packing",
        "drafts",
    )
    return {name: getattr(arguments, name) for name in names} | {"cache_salt": None if arguments.no_cache else ""}


def run_generate(arguments: argparse.Namespace) -> int:
    """Stream one answer to stdout.

    Raises:
        HelixError: no swarm, no plan, or the request failed.
    """
    if not arguments.prompt.strip():
        raise UsageError("The prompt is empty: say what to ask.")
    from helixnet_client import Client

    options = {**_options(arguments), "logprobs": arguments.logprobs}
    with Client(**client_arguments(arguments)) as client:
        if arguments.raw:
            stream = client.stream(arguments.prompt, **options)
        else:
            stream = client.stream_chat([{"role": "user", "content": arguments.prompt}], **options)
        if arguments.json:
            for _ in stream:
                pass
        else:
            _show(stream)
        _finish(client, stream.completion, arguments)
    return 0


def _finish(client: Client, completion: Completion | None, arguments: argparse.Namespace) -> None:
    if completion is None:
        return
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(completion).decode())
    elif arguments.verbose or sys.stderr.isatty():
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{dim}{summary(completion, _names(client))}{plain}", file=sys.stderr)


def _show(stream: Stream) -> str:
    """Print the pieces as they come; all of them at the end."""
    from helixnet.daemon.wording import printable

    shown = ""
    for piece in stream:
        sys.stdout.write(printable(piece.text) if sys.stdout.isatty() else piece.text)
        sys.stdout.flush()
        shown += piece.text
    sys.stdout.write("\n")
    return shown


def _names(client: Client) -> dict[str, str]:
    """Peers' names for the summary, which does without if they cannot be had."""
    with contextlib.suppress(HelixError):
        return {str(row.record.peer): row.record.name for row in client.status().members}
    return {}


def summary(completion: Completion, names: dict[str, str]) -> str:
    """How long it took and which way it went, in one line."""
    from helixnet.daemon.wording import many, rate, seconds, short_id

    timings, tokens = completion.timings, completion.usage.completion_tokens
    parts = [many(tokens, "token"), f"first after {seconds(timings.ttft_s)}"]
    if completion.usage.cached_tokens:
        parts.append(f"{completion.usage.cached_tokens} of {completion.usage.prompt_tokens} prompt tokens were known")
    if timings.tpot_s > 0:
        parts.append(f"then {rate(1 / timings.tpot_s)}")
    if completion.finish == "length":
        parts.append("cut at --max-tokens")
    if completion.retries:
        parts.append(f"went on over other peers {many(completion.retries, 'time')}")
    stages = (f"{names.get(peer, '…' + short_id(peer))} {start}-{stop - 1}" for peer, start, stop in completion.stages)
    return " · ".join([*parts, " → ".join(stages)])


# --- chat ------------------------------------------------------------------------------------------


def run_chat(arguments: argparse.Namespace) -> int:
    """Read, answer, repeat, until /exit or Ctrl-D.

    Raises:
        HelixError: no swarm was found; later errors are shown and the conversation goes on.
    """
    from helixnet_client import Client

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and line editing

    with Client(**client_arguments(arguments)) as client:
        view = client.status()
        if sys.stdin.isatty():
            print(f"{view.model}, {len(view.members)} peers. /clear forgets, /exit leaves, Ctrl-C stops an answer.\n")
        Chat(client, arguments).loop()
    return 0


class Chat:
    """One conversation; what was said is kept until /clear."""

    def __init__(self, client: Client, arguments: argparse.Namespace) -> None:
        self._client = client
        self._arguments = arguments
        self.history: list[Message] = []

    def loop(self) -> None:
        """Until the person leaves."""
        while (said := self._read()) is not None:
            if said == "/exit":
                return
            if said == "/clear":
                self.history.clear()
                print("(forgotten)")
            elif said.startswith("/"):
                print(f"There is no command {said.split()[0]}; there are /clear and /exit.")
            elif said:
                self.answer(said)

    def _read(self) -> str | None:
        """A line; empty after Ctrl-C, None after Ctrl-D."""
        try:
            return input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            return ""

    def answer(self, said: str) -> None:
        """Stream the answer; a question whose answer failed or was stopped is not kept."""
        asked: list[Message] = [*self.history, {"role": "user", "content": said}]
        stream = self._client.stream_chat(asked, **_options(self._arguments))
        try:
            text = _show(stream)
        except KeyboardInterrupt:
            stream.cancel()
            print("\n(stopped)")
            return
        except HelixError as error:
            print(f"helixnet: {error}", file=sys.stderr)
            return
        self.history = [*asked, {"role": "assistant", "content": text}]
        _finish(self._client, stream.completion, argparse.Namespace(json=False, verbose=self._arguments.verbose))

"""What every command of ours has in common: how it reads its arguments, how it fails, whom it ends with.

It stands beside the floors: `helixnet` and `helixnet-bootstrap` both begin here. Standard library only, so that
`--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from helixnet.core.errors import HelixError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
EXIT_UNEXPECTED = 70
"""EX_SOFTWARE of sysexits.h: the fault is ours."""
DEBUG = "HELIXNET_DEBUG"
"""Environment variable; set, a failure comes with its traceback."""
PARENT_CHECK_S = 1.0
ORPHAN_S_MAX = 45.0
"""A process whose parent is gone drains like any other (30 s at most), and is then made to end."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one sentence what is wrong, and what was probably meant.

    Its commands are Parsers too, so the one that does not know an argument is the one that complains.
    """

    def __init__(self, **settings: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": layout, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but arguments that are not known end the program."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit 2 with argparse's sentence."""
        self.exit(EXIT_USAGE, f"{self.prog}: {_as_sentence(message)} See `{self.prog} --help`.\n")

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        asked = unknown[0].split("=")[0]
        near = difflib.get_close_matches(asked, options, n=1)
        if near:
            hint = f" Did you mean {near[0]}?"
        else:
            hint = "" if asked.startswith("-") else " A text of several words needs quotes around it."
        self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")


def _as_sentence(message: str) -> str:
    """`message` with a suggestion if it complains about a choice, and with a full stop."""
    head, found, rest = message.partition("invalid choice: ")
    if found:
        choices = [word.strip(" '()") for word in rest.partition("choose from")[2].split(",")]
        near = difflib.get_close_matches(rest.split(" (")[0].strip("'"), choices, n=1)
        message = f"{head}{found}{rest}." + (f" Did you mean {near[0]}?" if near else "")
    return message if message.endswith((".", "?")) else f"{message}."


def run_command(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse, call what the parser's default `func` names, and turn whatever happens into an exit code.

    Errors become one sentence on stderr.
    """
    try:
        code = _run(parser, argv)
        sys.stdout.flush()
        return code
    except BaseException as error:
        return _exit_code(parser.prog, error)


def _run(parser: Parser, argv: Sequence[str] | None) -> int:
    try:
        arguments = parser.parse_args(argv)
        return int(arguments.func(arguments))
    except SystemExit:
        sys.stdout.flush()  # help was printed: if its reader has gone away, that is to be found out here
        raise


def _exit_code(prog: str, error: BaseException) -> int:
    """What to exit with after `error`; says why on stderr."""
    if isinstance(error, BaseExceptionGroup) and error.exceptions:
        return _exit_code(prog, error.exceptions[0])
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    match error:
        case SystemExit():
            raise error
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED
        case BrokenPipeError():
            # Whoever read our output is gone (`| head`): nothing more can be said there, at exit neither.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        case HelixError():
            _complain(prog, str(error) or type(error).__name__)
            return error.exit_code
        case OSError() if error.strerror and error.filename:
            _complain(prog, f"{error.filename}: {error.strerror}")
            return 1
    _complain(
        prog,
        f"something unexpected happened ({type(error).__name__}: {error}). {DEBUG}=1 shows where; please report it.",
    )
    return EXIT_UNEXPECTED


def _complain(prog: str, text: str) -> None:
    sentence = text if text.endswith((".", "!", "?", ")")) else f"{text}."
    print(f"{prog}: {' '.join(sentence.split())}", file=sys.stderr)


def add_parent_option(parser: argparse.ArgumentParser) -> None:
    """The hidden `--exit-with-parent PID` of commands that `helixnet up` starts."""
    parser.add_argument("--exit-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)


def end_with_parent(pid: int | None) -> None:
    """Watch process `pid` from a thread, and stop this process as by SIGTERM when it is gone (None: do nothing).

    A thread and not a task: it works before there is an event loop, and when that hangs.
    """
    if pid is not None:
        threading.Thread(target=_watch_parent, args=(pid,), name="parent-watch", daemon=True).start()


def _watch_parent(pid: int) -> None:
    is_child = os.getppid() == pid
    while os.getppid() == pid if is_child else _runs(pid):
        time.sleep(PARENT_CHECK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S_MAX)
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(pid: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True

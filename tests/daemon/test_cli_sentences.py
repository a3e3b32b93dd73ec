"""Whatever a person gets wrong on the command line ends in one sentence and the right exit code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helixnet.console import EXIT_INTERRUPTED, EXIT_UNEXPECTED, Parser, run_command
from helixnet.core.errors import SwarmTooSmall
from helixnet.daemon.cli import main

HELP_S_MAX = 1.5
"""Far above the 0.2 s it takes, for busy machines; torch alone would take longer."""


@pytest.fixture(autouse=True)
def _nobody_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HELIXNET_DEBUG", "HELIXNET_JOIN", "HELIXNET_MEMORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HELIXNET_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("peer", "--memry", "1GB"), "Did you mean --memory?", id="misspelt-flag"),
        pytest.param(("peer", "--memry=1GB"), "Did you mean --memory?", id="misspelt-flag-with-value"),
        pytest.param(("peer", "--mem", "1GB"), "unrecognized arguments: --mem", id="abbreviated-flag"),
        pytest.param(("generat", "hi"), "Did you mean generate?", id="misspelt-command"),
        pytest.param((), "required: COMMAND", id="no-command"),
        pytest.param(("generate", "hello", "world"), "needs quotes", id="forgotten-quotes"),
        pytest.param(("generate", " "), "The prompt is empty", id="empty-prompt"),
        pytest.param(("generate", "hi", "--max-tokens", "many"), "invalid int value", id="not-a-number"),
        pytest.param(("peer", "--memory", "lots"), "such as 2GB", id="bad-memory"),
        pytest.param(("peer", "--preset", "moon"), "one of lan, wan, home", id="bad-preset"),
        pytest.param(("peer", "--config", "/nowhere.toml"), "cannot be read", id="no-config-file"),
        pytest.param(("status",), "No swarm runs on this machine", id="no-local-swarm"),
        pytest.param(("status", "--json", "--watch"), "not allowed with argument", id="two-shapes-at-once"),
        pytest.param(("up", "--peers", "0"), "1 to 16 peers", id="no-peers"),
        pytest.param(("up", "--memory", "1GB,2GB", "--peers", "3"), "one for each", id="budgets-for-fewer-peers"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = failure(capsys, *arguments)
    assert (code, words in said) == (2, True), said


def test_an_unknown_key_in_the_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('memroy = "2GB"\n')
    code, said = failure(capsys, "peer", "--config", str(path))
    assert code == 2
    assert "Unknown setting 'memroy'" in said
    assert "'memory'" in said


def failing(error: BaseException) -> Parser:
    """A command that fails with `error`."""

    def fail(_: argparse.Namespace) -> int:
        raise error

    parser = Parser(prog="helixnet")
    parser.set_defaults(func=fail)
    return parser


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        pytest.param(SwarmTooSmall("Layers 3-5 are uncovered"), 4, "helixnet: Layers 3-5 are uncovered.\n", id="ours"),
        pytest.param(KeyboardInterrupt(), EXIT_INTERRUPTED, "", id="ctrl-c"),
        pytest.param(
            PermissionError(13, "Permission denied", "/etc/x"), 1, "helixnet: /etc/x: Permission denied.\n", id="os"
        ),
        pytest.param(
            ExceptionGroup("tasks", [SwarmTooSmall("Too small.")]), 4, "helixnet: Too small.\n", id="in-a-task-group"
        ),
    ],
)
def test_an_error_becomes_its_sentence_and_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(failing(error), []) == code
    assert capsys.readouterr().err == said


def test_a_bug_names_its_type_and_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(failing(ZeroDivisionError("division by zero")), []) == EXIT_UNEXPECTED
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "HELIXNET_DEBUG=1" in said
    assert "Traceback" not in said
    monkeypatch.setenv("HELIXNET_DEBUG", "1")
    run_command(failing(ZeroDivisionError("division by zero")), [])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "generate", "chat", "status", "peer", "doctor"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  helixnet {command}" in capsys.readouterr().out


def test_help_is_quick() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "helixnet.daemon.cli", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - began < HELP_S_MAX
    assert b"helixnet up" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "helixnet.daemon.cli", "status", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""

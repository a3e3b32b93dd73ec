from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from helixnet.daemon.models_command import add_models_parser
from tests.tiny_models import write_checkpoint


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_models_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["models", *words])
    return int(args.func(args))


def test_a_pulled_model_is_listed_and_described(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = str(write_checkpoint(tmp_path / "tiny"))
    assert run("list") == 0
    assert "models pull" in capsys.readouterr().out
    assert run("pull", folder) == 0
    assert "tiny is ready" in capsys.readouterr().out
    assert run("list") == 0
    assert "float32" in capsys.readouterr().out
    assert run("info", folder) == 0
    described = capsys.readouterr().out
    assert "256 tokens" in described and "LlamaForCausalLM" in described


def test_an_unknown_dtype_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("pull", "--dtype", "int4")
    assert stopped.value.code == 2

"""A light client, the planner and the command line start without torch: quickly, and on machines that have none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "vllm")
COMMAND_TIMEOUT_S = 50


def modules_of(package: Path, root: Path) -> list[str]:
    """The dotted names of a package and of every module in it."""
    names = (path.relative_to(root).with_suffix("").parts for path in sorted(package.rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def heavy_after(code: str) -> str:
    """Which heavy modules a fresh interpreter has loaded after `code`, joined by blanks."""
    report = f"import sys; print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("loaded:").strip()


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(["helixnet_client"], id="helixnet_client"),
        pytest.param(modules_of(ROOT / "helixnet/core", ROOT), id="helixnet.core"),
        pytest.param(modules_of(ROOT / "helixnet/planner", ROOT), id="helixnet.planner"),
        pytest.param(["helixnet.daemon.cli"], id="helixnet.daemon.cli"),
        pytest.param(["helixnet_bootstrap"], id="helixnet_bootstrap"),
    ],
)
def test_importing_it_loads_nothing_heavy(modules: list[str]) -> None:
    assert modules
    assert heavy_after(f"import {', '.join(modules)}") == ""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["peer", "--help"], ["up", "--help"], ["plan", "--help"]],
    ids=" ".join,
)
def test_asking_the_command_for_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from helixnet.daemon.cli import main
sys.argv = ["helixnet", *{arguments!r}]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
"""
    assert heavy_after(code) == ""

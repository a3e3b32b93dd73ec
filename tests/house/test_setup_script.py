"""scripts/setup says in one sentence what is missing, on machines that cannot run HelixNet yet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED_COMMANDS = ("bash", "cat", "dirname", "env")


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder to use as the whole PATH: the shell, and no Python."""
    for name in NEEDED_COMMANDS:
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    return tmp_path


def add_command(folder: Path, name: str, script: str) -> None:
    """Put an executable shell script on the PATH that `folder` is."""
    path = folder / name
    path.write_text(f"#!{folder / 'bash'}\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def run_setup(commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/setup where only `commands` can be found."""
    return subprocess.run(
        [str(commands / "bash"), str(ROOT / "scripts/setup"), *arguments],
        env={"PATH": str(commands)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_without_python_it_names_the_version_that_is_needed(commands: Path) -> None:
    done = run_setup(commands)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_shim_that_cannot_run_and_a_python_that_is_too_old_are_passed_over(commands: Path) -> None:
    add_command(commands, "python3.12", "echo 'python3.12: command not found' >&2; exit 127")
    add_command(commands, "python3", "exit 1")
    done = run_setup(commands)
    assert done.returncode == 1
    assert "none was found" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_venv_package_it_says_what_to_install(commands: Path) -> None:
    add_command(commands, "python3", '[[ $2 == *ensurepip* ]] && exit 1\n[[ $2 == *"3, 11"* ]]')
    done = run_setup(commands)
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_an_unknown_argument_is_refused_with_the_usage(commands: Path) -> None:
    done = run_setup(commands, "--modle")
    assert done.returncode == 1
    assert "unknown argument: --modle" in done.stderr
    assert "usage: scripts/setup" in done.stderr

"""The wheel carries the three import packages, marked as typed, and nothing else of the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("helixnet", "helixnet_bootstrap", "helixnet_client")


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("helixnet_swarm-*.whl")
    return path


def test_the_wheel_holds_the_three_packages_and_its_own_metadata(wheel_path: Path) -> None:
    with zipfile.ZipFile(wheel_path) as wheel:
        roots = {name.split("/")[0] for name in wheel.namelist()}
    assert sorted(root for root in roots if not root.endswith(".dist-info")) == sorted(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_in_the_wheel_is_marked_as_typed(wheel_path: Path, package: str) -> None:
    with zipfile.ZipFile(wheel_path) as wheel:
        assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_declares_both_commands_and_the_licence(wheel_path: Path) -> None:
    with zipfile.ZipFile(wheel_path) as wheel:
        (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        commands = wheel.read(entry_points).decode()
        licences = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert "helixnet = helixnet.daemon.cli:main" in commands
    assert "helixnet-bootstrap = helixnet_bootstrap.app:main" in commands
    assert len(licences) == 1

"""What the scripts of this folder have in common: their checkout and the machine they run on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT, ROOT / "client", ROOT / "bootstrap")
"""Where the three packages of the checkout lie."""


def enter() -> None:
    """Go on in the checkout's virtual environment, if it has one, and with the checkout's packages."""
    venv = ROOT / ".venv"
    python = venv / "bin" / "python"
    if python.exists() and Path(sys.prefix) != venv:
        os.execv(python, [str(python), *sys.argv])
    use_packages()


def use_packages() -> None:
    """Import the checkout's packages, whichever Python this is."""
    sys.path[:0] = [str(folder) for folder in PACKAGES]


def progress(text: str) -> None:
    """To stderr, so that stdout is the tables alone."""
    print(text, file=sys.stderr, flush=True)


def default_artifact() -> str | None:
    """HELIXNET_ARTIFACT, or ../shared/helix beside the checkout if it exists."""
    folder = ROOT.parent / "shared" / "helix"
    return os.environ.get("HELIXNET_ARTIFACT") or (str(folder) if folder.is_dir() else None)


def machine() -> str:
    """Processor, cores, system and Python, as figures are quoted with them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """The checkout's, with a remark if code was changed since; "unknown" where there is no git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "helixnet", "scripts")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

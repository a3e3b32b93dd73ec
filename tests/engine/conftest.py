from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HELIXNET_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share the machine: torch threads that wait for each other cost more than they bring."""
    import torch

    torch.set_num_threads(1)

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helixnet.core.errors import MemoryTooSmall, UsageError
from helixnet.engine import benchmark
from helixnet.engine.benchmark import cached_capability, measure
from helixnet.engine.device import default_memory_bytes, describe_device, pick_device
from helixnet.engine.weights.catalog import prepare
from tests.tiny_models import write_checkpoint

MEMORY = 50_000_000


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """A measurement leaves torch with the threads it found fastest."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the same points, each on less."""
    for name, value in (("REPEATS", 1), ("CACHE_BYTES", 1), ("MATMUL_SIZE", 64), ("BANDWIDTH_BYTES", 1 << 20)):
        monkeypatch.setattr(benchmark, name, value)


@pytest.mark.slow
def test_a_whole_measurement_tells_speeds_a_machine_can_have(tmp_path: Path, cache: Path) -> None:
    found = measure(prepare(str(write_checkpoint(tmp_path / "tiny"))), "cpu", MEMORY)
    assert 1e8 < found.memory_bandwidth < 1e13
    assert 1e8 < found.matmul_flops < 1e15
    assert all(0 < point.seconds < 5 for point in (*found.decode, *found.prefill))


@pytest.mark.usefixtures("hasty")
def test_a_capability_is_measured_once_and_remembered(tmp_path: Path, cache: Path) -> None:
    model = prepare(str(write_checkpoint(tmp_path / "tiny")))
    assert cached_capability(model, "cpu") is None
    seen: list[tuple[int, int]] = []
    found = measure(model, "cpu", MEMORY, progress=lambda done, total: seen.append((done, total)))
    assert [point.tokens for point in found.decode] == [1, 4, 16, 64]
    assert all(point.tokens <= model.manifest.context_tokens for point in found.prefill)
    assert found.threads == torch.get_num_threads() >= 1
    assert seen[-1][0] == seen[-1][1]
    again = measure(model, "cpu", 2 * MEMORY, progress=lambda *_: pytest.fail("measured again"))
    assert again.decode == found.decode and again.memory_bytes == 2 * MEMORY


@pytest.mark.usefixtures("hasty")
def test_forcing_measures_again(tmp_path: Path, cache: Path) -> None:
    model = prepare(str(write_checkpoint(tmp_path / "tiny")))
    measure(model, "cpu", MEMORY)
    seen: list[int] = []
    measure(model, "cpu", MEMORY, force=True, progress=lambda done, _: seen.append(done))
    assert seen


def test_memory_for_less_than_a_layer_is_refused(tmp_path: Path, cache: Path) -> None:
    model = prepare(str(write_checkpoint(tmp_path / "tiny")))
    with pytest.raises(MemoryTooSmall, match="--memory"):
        measure(model, "cpu", model.manifest.layer_bytes - 1)


@pytest.mark.parametrize("wish", ["gpu", "cuda:x", "cuda:99", "", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(wish: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        pick_device(wish)


def test_auto_finds_something_with_memory() -> None:
    device = pick_device("auto")
    assert default_memory_bytes(device) > 0
    assert describe_device("cpu", 2).endswith("2 threads")

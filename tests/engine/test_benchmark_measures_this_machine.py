from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helixnet.core.errors import MemoryTooSmall, UsageError
from helixnet.engine import benchmark
from helixnet.engine.benchmark import Asked, cached_capability, measure
from helixnet.engine.device import default_memory_bytes, describe_device, pick_device
from helixnet.engine.kinds import Kind, torch_kind
from helixnet.engine.weights.catalog import prepare
from tests.tiny_models import write_checkpoint

MEMORY = 50_000_000


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    """A measurement leaves torch with the threads it found fastest."""
    yield
    torch.set_num_threads(1)


def asked(folder: Path, memory: int = MEMORY, dtype: str | None = None, kind: Kind | None = None) -> Asked:
    return Asked(prepare(str(folder), dtype=dtype), "cpu", memory, kind or torch_kind())


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the same points, each on less."""
    for name, value in (("REPEATS", 1), ("COOLING_BYTES", 64), ("MATMUL_SIZE", 64), ("BANDWIDTH_BYTES", 1 << 20)):
        monkeypatch.setattr(benchmark, name, value)


@pytest.mark.slow
def test_a_whole_measurement_tells_speeds_a_machine_can_have(tiny: Path) -> None:
    found = measure(asked(tiny))
    assert 1e8 < found.memory_bandwidth < 1e13
    assert 1e8 < found.matmul_flops < 1e15
    assert all(0 < point.seconds < 5 for point in (*found.decode, *found.prefill))
    assert 0 <= found.batch_s < 1


@pytest.mark.usefixtures("hasty")
def test_a_capability_is_measured_once_and_remembered(tiny: Path) -> None:
    assert cached_capability(asked(tiny)) is None
    seen: list[tuple[int, int]] = []
    found = measure(asked(tiny), progress=lambda done, total: seen.append((done, total)))
    assert [point.tokens for point in found.decode] == [1, 4, 16, 64]
    assert all(point.tokens <= asked(tiny).model.manifest.context_tokens for point in found.prefill)
    assert found.threads == torch.get_num_threads() >= 1
    assert found.engine.startswith("torch")
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    again = measure(asked(tiny, 2 * MEMORY), progress=lambda *_: pytest.fail("measured again"))
    assert again.decode == found.decode and again.memory_bytes == 2 * MEMORY


@pytest.mark.usefixtures("hasty")
def test_another_dtype_engine_or_driver_is_measured_for_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(asked(tiny))
    assert cached_capability(asked(tiny)) is not None
    assert cached_capability(asked(tiny, dtype="bfloat16")) is None
    assert cached_capability(asked(tiny, kind=Kind("torch", "torch 99"))) is None
    monkeypatch.setattr(benchmark, "driver_version", lambda _: "another")
    assert cached_capability(asked(tiny)) is None


@pytest.mark.usefixtures("hasty")
def test_forcing_measures_again(tiny: Path) -> None:
    measure(asked(tiny))
    seen: list[int] = []
    measure(asked(tiny), force=True, progress=lambda done, _: seen.append(done))
    assert seen


def test_memory_for_less_than_a_layer_is_refused(tiny: Path) -> None:
    with pytest.raises(MemoryTooSmall, match="--memory"):
        measure(asked(tiny, asked(tiny).model.manifest.layer_bytes - 1))


@pytest.mark.parametrize("wish", ["gpu", "cuda:x", "cuda:99", "", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(wish: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        pick_device(wish)


def test_auto_finds_something_with_memory() -> None:
    device = pick_device("auto")
    assert default_memory_bytes(device) > 0
    assert describe_device("cpu", 2).endswith("2 threads")

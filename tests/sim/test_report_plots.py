"""Pictures of reports: all of them are written, the same each time, and nothing covers anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixnet.core.types import PeerId
from helixnet.sim.faults import Fault, Kind
from helixnet.sim.report import MarkAt, Report, report
from helixnet.sim.simulation import Simulation
from tests.sim.small_simulation import small_setup

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from helixnet.sim.plots import draw, draw_sweep, latency, sweep, throughput, utilisation

FAULTS = (
    Fault(at_s=12.0, kind=Kind.CRASH, peer=PeerId("m0")),
    Fault(at_s=15.0, kind=Kind.SLOW, peer=PeerId("m1"), factor=4.0, seconds=10.0),
    Fault(at_s=20.0, kind=Kind.JOIN, peer=PeerId("m0+1")),
)


@pytest.fixture(scope="module")
def told() -> Report:
    simulation = Simulation(small_setup(faults=FAULTS))
    simulation.run()
    return report(simulation, "small")


def crowded(told: Report) -> Report:
    """As after an hour of churn: more peers and marks than one can tell apart."""
    marks = tuple(MarkAt(n / 50, f"{'crash' if n % 2 else 'join'} m{n}") for n in range(1000))
    peers = tuple(msgspec.structs.replace(told.peers[0], peer=PeerId(f"m{n}")) for n in range(100))
    return msgspec.structs.replace(told, marks=marks, peers=peers)


def served_nothing(told: Report) -> Report:
    """No plan, no answers."""
    return msgspec.structs.replace(
        told, ttft=None, tpot=None, itl=None, prediction=None, peers=(), lines=(), marks=(), over_time=()
    )


@pytest.mark.parametrize("figure", [throughput, latency, utilisation])
@pytest.mark.parametrize("become", [lambda told: told, crowded], ids=["small", "crowded"])
def test_no_legend_or_title_covers_anything(
    told: Report, figure: Callable[[Report], Figure], become: Callable[[Report], Report]
) -> None:
    check_layout(figure(become(told)))


def test_the_sweep_covers_nothing_either(told: Report) -> None:
    check_layout(sweep([told, msgspec.structs.replace(told, per_s=9.0)]))


def check_layout(drawn: Figure) -> None:
    FigureCanvasAgg(drawn).draw()  # type: ignore[no-untyped-call]
    renderer = drawn.canvas.get_renderer()  # type: ignore[attr-defined]
    whole = drawn.bbox
    legends = [*drawn.legends, *(legend for axis in drawn.axes if (legend := axis.get_legend()) is not None)]
    assert legends
    boxes = [legend.get_window_extent(renderer) for legend in legends]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert not any(box.overlaps(axis.bbox.padded(-2)) for axis in drawn.axes)
    titles = [axis.get_tightbbox(renderer) for axis in drawn.axes]
    assert all(box is not None and box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1 for box in titles)


def test_a_report_of_nothing_is_drawn_too(told: Report, tmp_path: Path) -> None:
    assert draw(served_nothing(told), tmp_path)


@pytest.mark.slow
def test_every_picture_is_written_twice_over_and_without_a_date(told: Report, tmp_path: Path) -> None:
    names = draw(told, tmp_path) + draw_sweep([told], tmp_path)
    assert names == ["throughput.svg", "latency.svg", "utilisation.svg", "sweep.svg"]
    for name in names:
        svg = (tmp_path / name).read_text()
        assert "<dc:date>" not in svg and "Matplotlib v" not in svg
        assert (tmp_path / name.replace(".svg", ".png")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_report_gives_the_same_pictures_in_any_process(told: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(told.to_json())
    code = (
        "import sys; from pathlib import Path; from helixnet.sim.plots import draw; "
        "from helixnet.sim.report import from_json; folder = Path(sys.argv[1]); "
        "draw(from_json((folder.parent / 'report.json').read_bytes()), folder)"
    )
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True, timeout=60)
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert len(files) == 6
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()}

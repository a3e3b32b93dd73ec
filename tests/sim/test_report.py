"""What a report says, against what the simulation's own counters say."""

from __future__ import annotations

import math
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixnet.core.machine import NEVER
from helixnet.core.types import PeerId
from helixnet.sim.faults import Fault, Kind
from helixnet.sim.report import Limits, LineUse, PeerUse, Report, from_json, limited_by, report, spread
from helixnet.sim.samples import Sampler
from helixnet.sim.simulation import Simulation
from helixnet.sim.tables import digits, markdown, sweep_markdown, table
from helixnet.sim.tally import BIN_S, RequestTally
from tests.sim.small_simulation import OUTPUT_TOKENS, PROMPT_TOKENS, SECONDS, small_setup

CRASH_S, JOIN_S = 20.0, 25.0
VICTIM = PeerId("m0")
FAULTS = (
    Fault(at_s=CRASH_S, kind=Kind.CRASH, peer=VICTIM),
    Fault(at_s=JOIN_S, kind=Kind.JOIN, peer=PeerId("m0+1")),
)
WARM_S = SECONDS / 4


@pytest.fixture(scope="module")
def finished() -> Simulation:
    simulation = Simulation(small_setup(faults=FAULTS))
    simulation.run()
    return simulation


@pytest.fixture(scope="module")
def told(finished: Simulation) -> Report:
    return report(finished, "small")


def test_tokens_per_s_are_those_of_the_columns_after_the_warm_up(told: Report) -> None:
    columns = told.over_time
    assert [column.at_s for column in columns] == pytest.approx([n * BIN_S for n in range(int(SECONDS / BIN_S))])
    later = [column for column in columns if column.at_s >= WARM_S - 1e-3]
    assert told.tokens_per_s == pytest.approx(statistics.mean(column.tokens_per_s for column in later))
    assert told.prompt_tokens_per_s == pytest.approx(statistics.mean(column.prompt_tokens_per_s for column in later))
    assert told.tokens_per_s > 0
    assert told.counted_s == pytest.approx(SECONDS - WARM_S)


def test_latencies_are_of_requests_asked_after_the_warm_up(finished: Simulation, told: Report) -> None:
    begins = finished.began_at + WARM_S
    asked = [one for one in finished.tally.requests if begins <= one.asked_at < finished.ends_at]
    assert told.ttft is not None and told.tpot is not None and told.itl is not None
    assert told.ttft.count == told.tpot.count == len(asked)
    assert told.ttft.mean == pytest.approx(statistics.mean(one.ttft_s for one in asked))
    assert told.tpot.p50 == pytest.approx(statistics.median(one.tpot_s for one in asked))
    assert 0 < told.itl.count < len(finished.tally.gaps_s)


def test_every_request_is_accounted_for(told: Report) -> None:
    assert told.asked == told.ended > 0
    assert told.lost == 0 and told.tokens_wrong == 0 and told.losses == ()
    assert told.is_sound


def test_goodput_counts_who_keeps_both_limits(finished: Simulation) -> None:
    def good(ttft_s: float, tpot_s: float) -> float:
        return report(finished, "small", Limits(ttft_s=ttft_s, tpot_s=tpot_s)).good

    everything = report(finished, "small", Limits(ttft_s=1e9, tpot_s=1e9))
    assert everything.good == 1.0
    assert everything.ttft is not None
    assert everything.goodput_per_s * everything.counted_s == pytest.approx(everything.ttft.count)
    # A TPOT of exactly 0 happens: tokens behind a lost packet arrive together.
    assert good(0.0, 1e9) == good(1e9, -1e-9) == 0.0
    assert good(everything.ttft.p50, 1e9) == pytest.approx(0.5, abs=0.1)


def test_a_peer_is_judged_while_it_is_there(told: Report) -> None:
    there = {one.peer: one.present_s for one in told.peers}
    assert there[VICTIM] == pytest.approx(CRASH_S - WARM_S)
    assert there[PeerId("m0+1")] == pytest.approx(SECONDS - JOIN_S)
    others = [there[one.peer] for one in told.peers if not one.peer.startswith(VICTIM)]
    assert others == pytest.approx([SECONDS - WARM_S] * len(others)) and others


def test_a_device_is_busy_for_at_least_as_long_as_its_best_batches_take(told: Report) -> None:
    assert any(one.load > 0 for one in told.peers)
    assert all(0 <= one.load <= one.busy + 1e-9 <= 1 + 1e-9 for one in told.peers)
    assert all(0 <= one.kv <= one.kv_max <= 1 for one in told.peers)
    assert all(one.control_bytes_per_s > 0 for one in told.peers)


def test_busy_shares_add_up_to_what_the_devices_counted(finished: Simulation) -> None:
    sampler = finished.sampler
    told = report(finished, "small")
    counted = sum(sampler.closed.busy_s.values()) - sum(sampler.opened.busy_s.values())
    assert sum(one.busy * one.present_s for one in told.peers) == pytest.approx(counted)


def test_lines_come_busiest_first(told: Report) -> None:
    shares = [line.busy for line in told.lines]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0


def test_faults_and_plans_are_marked_from_the_beginning_of_the_load(told: Report) -> None:
    at = {mark.what: mark.at_s for mark in told.marks}
    assert at["load begins"] == 0.0
    assert at[f"crash {VICTIM}"] == pytest.approx(CRASH_S)
    assert at["load ends"] == pytest.approx(SECONDS)
    assert told.plans == sum(mark.what.startswith("plan.active") and mark.at_s > 0 for mark in told.marks)
    assert told.prediction is not None and told.prediction.tokens_per_s > 0


def test_looking_changes_nothing(finished: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "begin", lambda *_: None)
    unseen = Simulation(small_setup(faults=FAULTS))
    unseen.run()
    assert unseen.tally.requests == finished.tally.requests
    assert unseen.tally.gaps_s == finished.tally.gaps_s


def test_a_report_survives_json(told: Report) -> None:
    assert from_json(told.to_json()) == told
    assert b"NaN" not in told.to_json()


def test_losses_that_differ_only_in_numbers_are_told_once() -> None:
    simulation = Simulation(small_setup(seconds=4.0))
    tally = simulation.run()
    for pages in (7, 8, 9):
        tally.requests.append(RequestTally(1.0, PROMPT_TOKENS, OUTPUT_TOKENS, problem=f"{pages} pages are missing."))
    tally.requests.append(RequestTally(1.0, PROMPT_TOKENS, OUTPUT_TOKENS, problem="Nobody is there."))
    tally.lost += 4
    told = report(simulation, "small")
    assert told.losses == ("3 x 7 pages are missing.", "1 x Nobody is there.")
    assert not told.is_sound


def test_a_report_of_requests_kept_in_flight_has_so_many() -> None:
    simulation = Simulation(small_setup(per_s=0.0, in_flight=3))
    simulation.run()
    told = report(simulation, "small")
    assert told.offered == "3 requests in flight"
    assert {column.in_flight for column in told.over_time} <= {2, 3}
    assert not told.limited_by.startswith("only what was asked for")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_a_spread_is_that_of_its_values(values: list[float]) -> None:
    told = spread(values)
    assert told is not None
    assert told.count == len(values)
    assert told.mean == pytest.approx(math.fsum(values) / len(values))
    assert told.quantiles[0] == min(values) and told.quantiles[-1] == max(values)
    assert list(told.quantiles) == sorted(told.quantiles)
    assert told.p50 == pytest.approx(statistics.median(values))


def test_nothing_has_no_spread() -> None:
    assert spread([]) is None


def peer(name: str, load: float = 0.1, kv: float = 0.1) -> PeerUse:
    return PeerUse(
        peer=PeerId(name),
        device="gpu",
        span=None,
        present_s=10.0,
        busy=1.0,
        load=load,
        kv=kv,
        kv_max=kv,
        control_bytes_per_s=1.0,
    )


def line(busy: float) -> LineUse:
    return LineUse(line="link a -> b", busy=busy, bytes_per_s=1.0, waited_s_max=0.0)


@pytest.mark.parametrize(
    ("load", "kv", "link", "in_flight", "kept_up", "words"),
    [
        pytest.param(0.9, 0.5, 0.5, 0, False, "compute of x, 90 % loaded", id="compute"),
        pytest.param(0.5, 0.97, 0.9, 0, False, "KV memory of x, 97 % full", id="kv"),
        pytest.param(0.9, 0.5, 3.0, 32, True, "link a -> b, 100 % busy", id="link-with-a-queue"),
        pytest.param(0.9, 0.5, 0.5, 0, True, "only what was asked for", id="kept-up"),
        pytest.param(0.3, 0.2, 0.2, 32, True, "how many requests are in flight", id="few-in-flight"),
        pytest.param(0.3, 0.2, 0.2, 0, False, "no single peer or link", id="nobody"),
    ],
)
def test_what_limits_is_named(load: float, kv: float, link: float, in_flight: int, kept_up: bool, words: str) -> None:
    assert limited_by([peer("x", load, kv), peer("y")], [line(link)], in_flight, kept_up).startswith(words)


def rows_of(text: str) -> list[list[str]]:
    return [row.split(" | ") for row in text.replace("\\|", "/").splitlines() if row.startswith("|")]


def test_a_table_keeps_its_columns_whatever_is_in_it() -> None:
    text = table(("a", "b"), [("1 x", "pipe | and\nline"), (2, 3)])
    assert {len(row) for row in rows_of(text)} == {2}
    assert "---:" in text.splitlines()[1]


def test_the_markdown_says_what_was_served_and_how_to_see_it_again(told: Report) -> None:
    text = markdown(told, "helixnet sim small --seed 3", ["throughput.svg"])
    for words in ("helixnet sim small --seed 3", "![throughput](throughput.svg)", "requests lost | 0", told.digest):
        assert words in text
    assert "nan" not in text


def test_a_sweep_has_a_row_for_each_load(told: Report) -> None:
    busier = msgspec.structs.replace(told, per_s=9.0, ttft=None, tpot=None)
    text = sweep_markdown([told, busier])
    assert [row[0] for row in rows_of(text)][2:] == ["| 1.5 requests/s", "| 9 requests/s"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.0512, "0.0512"), (1.999, "2.00"), (12.34, "12.3"), (99.97, "100"), (12345, "12 345")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_who_has_not_left_is_there_for_good() -> None:
    simulation = Simulation(small_setup(seconds=4.0))
    simulation.run()
    assert {one.left_at for one in simulation.swarm.peers.values()} == {NEVER}

"""The event heap: order, time, and a trace that tells two runs apart."""

from __future__ import annotations

from helixnet.sim.engine import Engine


def test_events_happen_in_order_of_time_then_of_scheduling() -> None:
    engine, seen = Engine(0), list[str]()
    for time, name in ((2.0, "b"), (1.0, "a"), (2.0, "c")):
        engine.at(time, seen.append, name)
    assert not engine.run(5.0)
    assert seen == ["a", "b", "c"] and engine.now == 5.0 and engine.events == 3


def test_what_is_scheduled_in_the_past_happens_now() -> None:
    engine, seen = Engine(0), list[float]()
    engine.run(3.0)
    engine.at(1.0, lambda: seen.append(engine.now))
    engine.run(4.0)
    assert seen == [3.0]


def test_time_stops_where_it_is_told_to() -> None:
    engine, seen = Engine(0), list[int]()
    for number in range(5):
        engine.at(float(number), seen.append, number)
    assert engine.run(10.0, lambda: len(seen) == 3)
    assert seen == [0, 1, 2] and engine.now == 2.0


def test_the_digest_tells_runs_apart() -> None:
    def run(what: str) -> str:
        engine = Engine(1)
        engine.after(1.0, engine.note, what)
        engine.run(2.0)
        return engine.digest()

    assert run("x") == run("x") != run("y")

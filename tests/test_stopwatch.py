"""Exclusive times of sections; with a clock that the tests move."""

import threading

import pytest

from hmpo import stopwatch
from hmpo.stopwatch import Stopwatch, section


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_a_section_holds_its_own_time_without_that_of_inner_sections(clock: Clock) -> None:
    with Stopwatch() as watch:
        clock.now += 64
        with section("outer"):
            clock.now += 1
            with section("inner"):
                clock.now += 2
            clock.now += 4
            with section("inner"):
                clock.now += 8
        clock.now += 32
        with section("outer"):
            clock.now += 16
    assert watch.seconds == {"outer": 21.0, "inner": 10.0}


def test_a_section_inside_one_of_the_same_name_is_counted_once(clock: Clock) -> None:
    with Stopwatch() as watch, section("a"):
        clock.now += 1
        with section("a"):
            clock.now += 2
        clock.now += 4
    assert watch.seconds == {"a": 7.0}


def test_each_call_of_a_decorated_function_is_a_section(clock: Clock) -> None:
    @section("a")
    def count_down(n: int) -> int:
        """Counts."""
        clock.now += 1
        return count_down(n - 1) if n else 7

    assert (count_down.__name__, count_down.__doc__) == ("count_down", "Counts.")
    assert count_down(0) == 7
    with Stopwatch() as watch:
        assert count_down(2) == 7
    assert watch.seconds == {"a": 3.0}


def test_an_exception_closes_the_sections_it_leaves(clock: Clock) -> None:
    watch = Stopwatch()
    with watch, pytest.raises(KeyError), section("outer"), section("inner"):
        clock.now += 1
        raise KeyError
    clock.now += 5
    with watch, section("later"):
        clock.now += 2
    assert watch.seconds == {"outer": 0.0, "inner": 1.0, "later": 2.0}


def test_blocks_add_up_until_the_times_are_taken(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch, section("a"):
            clock.now += 1.5
    assert watch.take() == {"a": 3.0}
    assert watch.take() == {}


def test_sections_outside_a_stopwatch_or_in_another_thread_are_not_counted(clock: Clock) -> None:
    def work(name: str) -> None:
        with section(name):
            clock.now += 1

    work("before")
    with Stopwatch() as watch:
        thread = threading.Thread(target=work, args=("thread",))
        thread.start()
        thread.join()
        work("inside")
    work("after")
    assert watch.seconds == {"inside": 1.0}


def test_an_inner_stopwatch_takes_over_and_gives_back(clock: Clock) -> None:
    with Stopwatch() as outer:
        with Stopwatch() as inner, section("a"):
            clock.now += 1
        with section("b"):
            clock.now += 2
    assert (inner.seconds, outer.seconds) == ({"a": 1.0}, {"b": 2.0})

"""One thread, turns that fail alone, jobs whose results come back, and an end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from posecrafter_rt.serve.scheduler import Scheduler
from tests.serve.drawn import wait_until


class Turns:
    """What was done, by whom."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.threads: set[int] = set()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, key: str, value: int) -> bool:
        self.threads.add(threading.get_ident())
        self.may_go_on.wait(timeout=20)
        if value < 0:
            raise ValueError("a bad turn")
        self.done.append((key, value))
        return value > 100 and self.done.count((key, value)) < 3


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def scheduler(turns: Turns) -> Iterator[Scheduler[str, int]]:
    scheduler: Scheduler[str, int] = Scheduler(turns)
    scheduler.start()
    yield scheduler
    turns.may_go_on.set()
    scheduler.stop()


def test_everything_is_done_on_one_thread(scheduler: Scheduler[str, int], turns: Turns) -> None:
    scheduler.put("a", 1)
    scheduler.put("b", 2)
    other = scheduler.call(threading.get_ident).result(timeout=20)
    wait_until(lambda: len(turns.done) == 2)
    assert turns.threads == {other} and other != threading.get_ident()


def test_a_late_value_is_overtaken(scheduler: Scheduler[str, int], turns: Turns) -> None:
    turns.may_go_on.clear()
    scheduler.put("a", 1)
    wait_until(lambda: turns.threads)  # the first turn has begun
    assert [scheduler.put("b", value) for value in (1, 2, 3)] == [None, 1, 2]
    scheduler.put("c", 1)
    scheduler.discard("c")
    turns.may_go_on.set()
    wait_until(lambda: len(turns.done) == 2)
    assert turns.done == [("a", 1), ("b", 3)]


def test_a_turn_may_ask_for_another_which_gives_way_to_what_is_newer(
    scheduler: Scheduler[str, int], turns: Turns
) -> None:
    turns.may_go_on.clear()
    scheduler.put("a", 101)
    wait_until(lambda: turns.threads)
    scheduler.put("a", 102)
    scheduler.put("b", 1)
    turns.may_go_on.set()
    wait_until(lambda: len(turns.done) == 5)
    assert turns.done == [("a", 101), ("a", 102), ("b", 1), ("a", 102), ("a", 102)]


def test_a_bad_turn_is_logged_and_the_next_one_goes_on(
    scheduler: Scheduler[str, int], turns: Turns, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        scheduler.put("a", -1)
        scheduler.put("b", 1)
        wait_until(lambda: turns.done)
    assert turns.done == [("b", 1)] and "a turn failed" in caplog.text and scheduler.is_running


def test_a_job_gives_its_result_or_its_error(scheduler: Scheduler[str, int]) -> None:
    assert scheduler.call(lambda: 3).result(timeout=20) == 3
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0).result(timeout=20)
    assert scheduler.is_running


def test_it_ends_after_its_jobs_and_takes_no_more(scheduler: Scheduler[str, int]) -> None:
    last = scheduler.call(lambda: "last")
    scheduler.stop()
    assert last.result(timeout=0) == "last" and not scheduler.is_running
    with pytest.raises(CancelledError):
        scheduler.call(lambda: 3).result(timeout=1)


def test_one_that_never_started_stops_too() -> None:
    Scheduler[str, int](lambda key, value: False).stop()

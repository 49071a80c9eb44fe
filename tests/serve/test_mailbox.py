"""Newest wins, and turns go round: by a model of what a mailbox should hold, and between threads."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.serve.mailbox import Mailbox

ACTIONS = st.sampled_from(["put", "put", "put if free", "discard", "take", "take"])


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 3))))
def test_each_key_has_one_place_in_the_order_of_its_first_value(actions: list[tuple[str, int]]) -> None:
    mailbox: Mailbox[int, int] = Mailbox()
    waiting: list[list[int]] = []  # [key, newest value], in order
    for value, (action, key) in enumerate(actions):
        place = next((pair for pair in waiting if pair[0] == key), None)
        if action == "put":
            assert mailbox.put(key, value) == (None if place is None else place[1])
            if place is None:
                waiting.append([key, value])
            else:
                place[1] = value
        elif action == "put if free":
            mailbox.put_if_free(key, value)
            if place is None:
                waiting.append([key, value])
        elif action == "discard":
            mailbox.discard(key)
            waiting = [pair for pair in waiting if pair[0] != key]
        elif waiting:
            assert mailbox.take() == tuple(waiting.pop(0))


def test_whoever_puts_without_end_waits_for_the_others() -> None:
    mailbox: Mailbox[str, int] = Mailbox()
    mailbox.put("slow", 0)
    turns = []
    for round_number in range(1, 30):
        for _ in range(5):
            mailbox.put("fast", round_number)
        taken = mailbox.take()
        assert isinstance(taken, tuple)
        turns.append(taken[0])
        if taken[0] == "slow":
            mailbox.put("slow", round_number)
    assert turns == ["slow", "fast"] * 14 + ["slow"]


def test_jobs_and_values_alternate_each_in_order() -> None:
    """Who comes and goes without end, a job each time, does not keep the others from their turns, nor they it."""
    mailbox: Mailbox[str, int] = Mailbox()
    for value, key in enumerate("abc"):
        mailbox.put(key, value)
    jobs = [lambda: None, lambda: None, lambda: None, lambda: None, lambda: None]
    assert all(mailbox.put_job(job) for job in jobs)
    expected = [jobs[0], ("a", 0), jobs[1], ("b", 1), jobs[2], ("c", 2), jobs[3], jobs[4]]
    assert [mailbox.take() for _ in expected] == expected


def test_closing_ends_it_after_its_jobs() -> None:
    mailbox: Mailbox[str, int] = Mailbox()
    mailbox.put("a", 1)

    def job() -> None:
        """Done before the end."""

    mailbox.put_job(job)
    mailbox.close()
    assert mailbox.take() is job and mailbox.take() is None
    assert not mailbox.put_job(job)


def test_a_taker_wakes_up() -> None:
    mailbox: Mailbox[str, int] = Mailbox()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.extend([mailbox.take(), mailbox.take()]))
    thread.start()
    time.sleep(0.05)
    mailbox.put("a", 1)
    mailbox.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and taken[0] in (("a", 1), None) and taken[1] is None

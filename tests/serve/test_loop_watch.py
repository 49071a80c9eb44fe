"""Standstills of an event loop: what is heard just after one may be as old as it was long."""

from __future__ import annotations

import asyncio
import contextlib
import time

from posecrafter_rt.serve.loop_watch import LoopWatch


def ticked(*times_s: float) -> LoopWatch:
    watch = LoopWatch()
    for time_s in times_s:
        watch.tick(time_s)
    return watch


def test_a_loop_that_goes_round_hears_at_once() -> None:
    assert LoopWatch().earliest_s(5.0) == 5.0
    assert ticked(1.0, 1.05, 1.12).earliest_s(1.13) == 1.13


def test_after_a_standstill_what_is_heard_may_be_as_old_as_it() -> None:
    watch = ticked(1.0, 1.05, 3.0)
    assert watch.earliest_s(3.02) == 1.05
    watch.tick(3.05)
    assert watch.earliest_s(3.06) == 3.06  # by now everything of before has been heard


def test_a_standstill_that_lasts_counts_too() -> None:
    assert ticked(1.0, 1.05).earliest_s(2.5) == 1.05


def test_it_sees_a_loop_that_is_held_up() -> None:
    async def hold_up() -> tuple[float, float, float]:
        watch = LoopWatch()
        watching = asyncio.create_task(watch.run())
        await asyncio.sleep(0.1)
        held_s = time.perf_counter()
        time.sleep(0.4)
        await asyncio.sleep(0)
        now_s = time.perf_counter()
        earliest_s = watch.earliest_s(now_s)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        return held_s, now_s, earliest_s

    held_s, now_s, earliest_s = asyncio.run(hold_up())
    assert earliest_s <= held_s < now_s - 0.3

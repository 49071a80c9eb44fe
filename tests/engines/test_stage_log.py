"""The time left of a build, from what the stages of an earlier one took."""

from __future__ import annotations

from pathlib import Path

import pytest

from posecrafter_rt.engines import stage_log
from posecrafter_rt.engines.stage_log import StageLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The time, to be changed in place; and a cache of this test alone."""
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    now = [100.0]
    monkeypatch.setattr(stage_log.time, "monotonic", lambda: now[0])
    return now


def build(clock: list[float], key: dict[str, str], durations: dict[str, float], missing: int = 0) -> list[float | None]:
    """A build that knows after its first stage what the cache lacks."""
    log, left = StageLog(key), []
    for stage, seconds in durations.items():
        left.append(log.begin(stage))
        log.set_missing(missing)
        clock[0] += seconds
    log.save()
    return left


def test_the_second_build_knows_what_is_left(clock: list[float]) -> None:
    assert build(clock, {"backend": "a"}, {"load": 2, "compile": 30, "write": 1}) == [None, None, None]
    assert build(clock, {"backend": "a"}, {"load": 2, "compile": 20, "write": 1}) == [33, 31, 1]
    assert build(clock, {"backend": "a"}, {"load": 2, "another": 5, "write": 1}) == [23, None, 1]
    assert build(clock, {"backend": "b"}, {"load": 2}) == [None]


def test_what_the_cache_lacks_takes_time_of_its_own(clock: list[float]) -> None:
    cold, warm = {"load": 2, "trace": 40, "write": 1}, {"load": 2, "write": 1}
    assert build(clock, {}, cold, missing=3) == [None, None, None]
    assert build(clock, {}, warm) == [None, None]  # not the 43 of the first
    assert build(clock, {}, warm) == [3, 1]
    assert build(clock, {}, cold, missing=3) == [3, 41, 1]  # once it is known that the cache was emptied
    assert build(clock, {}, cold, missing=2) == [3, None, None]


def test_an_unfinished_build_leaves_no_trace(clock: list[float]) -> None:
    StageLog({}).begin("load")
    assert StageLog({}).begin("load") is None

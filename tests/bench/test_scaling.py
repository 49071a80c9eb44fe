"""The scaling benchmark: slopes are those of known curves, and every point of every axis is rendered. No timing is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import scaling
from bench.scaling import Plan, judged, judged_slope, markdown, measure_axes, slope, summarise
from bench.untrained import untrained_checkpoint
from posecrafter_rt.building import BuildOptions, build_engine


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(exponent: float) -> None:
    rows: list[dict[str, Any]] = [{"at": at, "total_s": 3 * at**exponent} for at in (1, 4, 16, 64)]
    assert slope(rows) == pytest.approx(exponent)
    assert slope([*rows, {"at": 256, "error": "the process died"}]) == pytest.approx(exponent)
    assert slope(rows[:1]) is None


def test_what_is_paid_once_weighs_least_between_the_last_two_points() -> None:
    rows = [{"at": at, "total_s": 5 + at, "peak_bytes": 100} for at in (1, 10, 100, 1000)]
    found = summarise({"frames": rows})["frames"]
    assert found["slope"] < found["last_slope"] < 1 and found["memory_slope"] == pytest.approx(0)


@pytest.mark.parametrize(("axis", "found", "told"), [
    ("frames", 0.7827, "0.783: met"), ("frames, in segments", 1.004, "1.004: missed"), ("frames", 1.0, "1.000: met"),
    ("pixels", 1.0530, "1.05"), ("steps", None, "")])  # fmt: skip
def test_a_slope_in_frames_meets_or_misses_its_target(axis: str, found: float | None, told: str) -> None:
    assert judged_slope(axis, found) == told
    slopes = {axis: {"slope": found, "last_slope": 1.1, "memory_slope": 0.4}}
    machine = {"processor": "one", "torch_threads": 1}
    assert f"| {axis} | {told} | 1.10 | 0.40 |" in markdown({"machine": machine, "slopes": slopes, "axes": {}})


def test_every_point_is_rendered(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained_checkpoint(str(tiny_base), num_frames=3).save(tmp_path / "tuned.ckpt")

    built = []

    def build(folder: Path, side: float, backend: str) -> dict[str, Any]:
        built.append(side)
        length = round(32 * side)
        path = folder / f"{length}.engine"
        build_engine(folder / "tuned.ckpt", path, BuildOptions(backend, "fp32", size=(length, length)))
        return {"engine": str(path), "pixels": length**2, "size": [length, length]}

    monkeypatch.setattr(scaling, "build", build)
    monkeypatch.setattr(scaling, "in_own_process", lambda function, *arguments: function(*arguments))
    plan = Plan((1, 2), (5, 8), (0.5, 1.0), (2, 3), num_frames=2, steps=2, segment=4, repeats=1)
    axes = measure_axes(plan, tmp_path, "torch")
    assert {axis: [row["at"] for row in rows] for axis, rows in axes.items()} == {
        "frames": [1, 2], "frames, in segments": [5, 8], "pixels": [256, 1024], "steps": [2, 3]}  # fmt: skip
    assert sorted(built) == [0.5, 1.0]  # each engine once
    assert list(measure_axes(plan, tmp_path, "torch", ["steps", "segments"])) == ["frames, in segments", "steps"]
    for rows in axes.values():
        for row in rows:
            assert set(row["seconds"]) == {"prepare", "invert", "denoise", "decode"} and row["peak_bytes"] > 0
            assert row["total_s"] == sum(row["seconds"].values()) > 0
    assert ["growth" in row for row in axes["frames, in segments"]] == [False, True]  # of two segments, and of three
    axes["frames, in segments"][1]["growth"] = 0.012
    axes["steps"].append({"at": 4, "error": "the process died"})
    document = {"machine": {"processor": "one", "torch_threads": 1}, "slopes": summarise(axes), "axes": axes}
    text = markdown(document)
    assert "| 1024 |" in text and "| 4 | failed: the process died |" in text and text.count("\n## ") == 4
    assert "torch fp32" in text and " +1.2%: met |" in text and judged(-0.04).endswith("missed")


def test_quick_is_smaller_on_every_axis() -> None:
    full, quick = Plan(), scaling.QUICK
    assert max(quick.frames) < max(full.frames) and max(quick.long) < max(full.long) == 1000
    assert max(quick.sides) < max(full.sides) and max(quick.steps_axis) < max(full.steps_axis)

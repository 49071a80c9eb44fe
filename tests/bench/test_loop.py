"""The loop's benchmark: what is outside the networks is what is left of the loop's time. No timing is judged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.loop import markdown, measure, median_round
from posecrafter_rt.engines.manifest import read_manifest, write_manifest


def test_the_rest_of_the_loop_is_what_its_networks_do_not_take(tiny_engine: Path) -> None:
    row = measure(tiny_engine, 2, 3, 1)
    assert (row["frames"], row["steps"]) == (2, 3) and min(row["controlnet"], row["unet"], row["outside_s"]) > 0
    assert row["denoise_s"] == pytest.approx(row["controlnet"] + row["unet"] + row["outside_s"])
    assert row["share"] == pytest.approx(row["outside_s"] / row["denoise_s"])


def test_steps_that_strength_leaves_out_are_not_counted(tiny_engine: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.engine"
    shutil.copytree(tiny_engine, half)
    write_manifest(half, {**read_manifest(half), "recommended": {"inversion_substeps": 1, "strength": 0.5}})
    assert measure(half, 1, 4, 1)["steps"] == 2


def test_the_median_round_is_reported() -> None:
    rounds = [{"share": share, "denoise_s": 10 * share} for share in (0.05, 0.01, 0.9, 0.02, 0.03)]
    assert median_round(rounds) == {"share": 0.03, "denoise_s": 0.3}


def test_the_table_has_a_steps_times() -> None:
    row: dict[str, Any] = {
        "frames": 4,
        "steps": 10,
        "denoise_s": 2.0,
        "controlnet": 0.5,
        "unet": 1.45,
        "outside_s": 0.05,
    }
    rows = [{**row, "share": 0.025}, {"frames": 16, "error": "the process died"}]
    setup = {"base": "embedded", "size": [128, 160], "backend": "torch", "precision": "fp32"}
    text = markdown({"setup": setup, "machine": {"processor": "one", "torch_threads": 2}, "rows": rows})
    assert "| 4 | 200.00 | 50.00 | 145.00 | 5.00 | 2.50%: met |" in text
    assert "| 16 | failed: the process died |" in text and "embedded, 128x160, torch fp32" in text

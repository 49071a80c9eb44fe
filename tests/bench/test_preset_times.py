"""What presets take: the ways are real options, and a goal stands only beside what it is a goal for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.flops import Counters, Setup
from bench.presets import STAGES, WAYS, count_flops_of, markdown
from posecrafter_rt.runtime.presets import PRESETS, preset_options


def document(gpu: str, frames: int = 100) -> dict[str, Any]:
    row = {"total_s": 20.0, "seconds": dict.fromkeys(STAGES, 5.0), "peak_bytes": 1e9, "peak_gpu_bytes": 2e9,
           "flops": 4e15}  # fmt: skip
    setup = {"frames": frames, "base": "random-sd15", "size": [512, 512], "backend": "torch", "precision": "bf16"}
    return {
        "setup": setup,
        "machine": {"gpu": gpu},
        "peak_flops_per_s": 4e14,
        "rows": {"exact": row, "fast": {"error": "memory ran out"}},
    }


def test_every_preset_is_timed() -> None:
    assert {way["preset"] for way in WAYS.values()} == set(PRESETS)
    assert preset_options(**WAYS["fast, small decoder"]).decoder == "small"


def test_a_presets_count_is_the_ledgers(tiny_base: Path) -> None:
    counters, setup = Counters(tiny_base), Setup((32, 32), 6, 4)
    row = {"sampled": 4, "shallow": 0, "inverted": 4, "decoder": "full"}
    exact = count_flops_of(counters, setup, row)
    assert exact == pytest.approx(counters.exact(setup).total, rel=0.02)
    shallow = count_flops_of(counters, setup, {**row, "sampled": 2, "shallow": 2})
    assert exact - 2 * counters.exact_step(setup, 7).flops < shallow < exact
    cached, small = {**row, "inverted": 0}, {**row, "decoder": "small"}
    assert 0 < count_flops_of(counters, setup, cached) < exact > count_flops_of(counters, setup, small) > 0


def test_goals_are_a_cards_at_one_size_and_length() -> None:
    stages = "5.00 | 5.00 | 5.00 | 5.00 | 200 | 50 | 1000 | 2000 |"
    assert f"| exact | 20.00 | 12 | 5.0 | {stages}" in markdown(document("NVIDIA H100 80GB HBM3"))
    assert f"| exact | 20.00 | 115 | 5.0 | {stages}" in markdown(document("NVIDIA GeForce RTX 3090"))
    for other in (document("NVIDIA H200"), document("NVIDIA H100 80GB HBM3", frames=16)):
        assert "| exact | 20.00 |  |" in markdown(other)
    assert "| fast | failed: memory ran out" in markdown(document("NVIDIA H200"))

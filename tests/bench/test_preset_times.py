"""What presets take: the ways are real options, and a goal stands only beside what it is a goal for."""

from __future__ import annotations

from typing import Any

from bench.presets import STAGES, WAYS, markdown
from posecrafter_rt.runtime.presets import PRESETS, preset_options


def document(gpu: str, frames: int = 100) -> dict[str, Any]:
    row = {"total_s": 20.0, "seconds": dict.fromkeys(STAGES, 5.0), "peak_bytes": 1e9, "peak_gpu_bytes": 2e9}
    setup = {"frames": frames, "base": "random-sd15", "size": [512, 512], "backend": "torch", "precision": "bf16"}
    return {"setup": setup, "machine": {"gpu": gpu}, "rows": {"exact": row, "fast": {"error": "memory ran out"}}}


def test_every_preset_is_timed() -> None:
    assert {way["preset"] for way in WAYS.values()} == set(PRESETS)
    assert preset_options(**WAYS["fast, small decoder"]).decoder == "small"


def test_goals_are_a_cards_at_one_size_and_length() -> None:
    stages = "5.00 | 5.00 | 5.00 | 5.00 | 1000 | 2000 |"
    assert f"| exact | 20.00 | 12 | 5.0 | {stages}" in markdown(document("NVIDIA H100 80GB HBM3"))
    assert f"| exact | 20.00 | 115 | 5.0 | {stages}" in markdown(document("NVIDIA GeForce RTX 3090"))
    for other in (document("NVIDIA H200"), document("NVIDIA H100 80GB HBM3", frames=16)):
        assert "| exact | 20.00 |  |" in markdown(other)
    assert "| fast | failed: memory ran out" in markdown(document("NVIDIA H200"))

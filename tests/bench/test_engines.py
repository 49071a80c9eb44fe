"""The engines' benchmark: real steps of every kind of engine, their distances, and the verdict. No timing is judged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import engines, onnx_engines
from bench.engines import REFERENCE, Job, judged, parse, run, to_markdown, unsupported_reason
from posecrafter_rt.config import cache_dir
from posecrafter_rt.export.blob_cache import BlobCache
from posecrafter_rt.export.onnx import export_network

NAMES = (REFERENCE, "onnxruntime fp32", "openvino fp32, int8 weights", "onnxruntime int8")  # from near to far


@pytest.fixture(scope="module")
def rows(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    jobs = [Job(name, str(tiny_base), (32, 32), folder / name.replace(" ", "-").replace(",", "")) for name in NAMES]
    jobs.append(Job("torch fp0", str(tiny_base), (32, 32), folder / "none"))
    with pytest.MonkeyPatch.context() as patch:

        def attempt(function: Any, *arguments: Any) -> dict[str, Any]:
            try:
                result: dict[str, Any] = function(*arguments)
            except Exception as error:
                return {"error": type(error).__name__}
            return result

        patch.setattr(engines, "in_own_process", attempt)
        graphs = BlobCache(cache_dir() / "graphs")  # those that other tests have traced
        patch.setattr(onnx_engines, "export_network", partial(export_network, graphs=graphs))
        return {row["engine"]: row for row in run(jobs, [1, 3], 0.01, 2)}


def test_every_engine_runs_the_same_step(rows: dict[str, dict[str, Any]]) -> None:
    for name in NAMES:
        assert set(rows[name]["steps"]) == {"1", "3"} and rows[name]["build_s"] > 0 < rows[name]["peak_bytes"]
    for frames in ("1", "3"):
        exact, close, rounded, coarse = (rows[name]["steps"][frames]["psnr_db"] for name in NAMES)
        assert exact > close > 90 > rounded > coarse > 15


def test_a_builds_memory_is_that_of_all_that_it_has_started(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.machine._held_bytes", lambda: 7 << 50)
    assert engines.build(Job(REFERENCE, str(tiny_base), (32, 32), tmp_path / "a"))["build_peak_bytes"] == 7 << 50


def test_what_fails_is_told_and_the_rest_is_not_lost(rows: dict[str, dict[str, Any]]) -> None:
    assert set(rows["torch fp0"]) == {"engine", "error"}
    setup = {"base": "tiny", "size": [32, 32], "frame_counts": [1, 3], "rounds": 2}
    machine = {"processor": "one", "torch_threads": 1, "torch": "2"}
    document = {
        "setup": setup,
        "machine": machine,
        "rows": list(rows.values()),
        "not_here": {"tensorrt fp16": "no GPU"},
    }
    text = to_markdown(document)
    assert "- torch fp0: KeyError" in text and "- tensorrt fp16: no GPU" in text and "| onnxruntime int8 |" in text


def test_a_quick_run_builds_nothing_that_takes_minutes() -> None:
    quick = parse(["--quick"])
    assert not any("inductor" in name for name in quick.engines) and REFERENCE in quick.engines
    assert len(quick.engines) < 3 and max(quick.frames) < max(parse([]).frames)
    assert parse(["--quick", "--engines", "inductor fp32", "--frames", "9"]).engines == ["inductor fp32"]
    assert "inductor fp32" in parse([]).engines


def test_every_precision_is_a_row_of_the_backends_that_have_it() -> None:
    assert [name for name in engines.candidates() if name.endswith(" int8")] == ["openvino int8", "onnxruntime int8"]
    assert {"torch bf16", "openvino bf16"} <= {*engines.candidates()}
    assert unsupported_reason("openvino fp16") == "it has no fp16 on a CPU; use fp32 or bf16"
    assert unsupported_reason("openvino fp32") is None and unsupported_reason("onnxruntime int8") is None


def test_the_fastest_that_is_good_enough_is_judged_where_it_gains_least() -> None:
    def row(name: str, one: float, four: float, psnr: float) -> dict[str, Any]:
        return {
            "engine": name,
            "steps": {"1": {"median_ms": one, "psnr_db": psnr}, "4": {"median_ms": four, "psnr_db": psnr}},
        }

    base, coarse = row(REFERENCE, 100, 400, 300), row("int8", 1, 1, 39)
    (line,) = judged([base, coarse, row("a", 10, 200, 41), row("b", 16, 80, 41)], base["steps"], ["1", "4"])
    assert line.startswith("Fastest of those with 40 dB at least: b, 5.00 times") and line.endswith("met.")
    (line,) = judged([base, coarse, row("a", 10, 200, 41)], base["steps"], ["1", "4"])
    assert " a, 2.00 times" in line and line.endswith("missed.")

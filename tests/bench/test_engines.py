"""The engines' benchmark: real steps of every kind of engine, their distances, and the verdict. No timing is judged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import engines, onnx_engines
from bench.engines import ARCHITECTURE, REFERENCE, Job, judged, parse, run, to_markdown, unsupported_reason
from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.export.onnx import export_network
from posecrafter_rt.models.loading import PoseModel, load_base

NAMES = (REFERENCE, "onnxruntime fp32", "openvino fp32, int8 weights", "onnxruntime int8")  # from near to far
MACHINE = {"processor": "one", "torch_threads": 1, "torch": "2"}


def write_markdown(rows: list[dict[str, Any]], frame_counts: list[int], **not_here: str) -> str:
    setup = {"base": "tiny", "size": [32, 32], "frame_counts": frame_counts, "rounds": 2}
    return to_markdown({"setup": setup, "machine": MACHINE, "rows": rows, "not_here": not_here})


def as_in_engines(base: str) -> PoseModel:
    """The base with the U-Net that engines have, of which other tests have traced the graphs."""
    model = load_base(base)
    model.unet.gives_deep_features = True
    return model


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
        patch.setattr(engines, "load_base", as_in_engines)
        return {row["engine"]: row for row in run(jobs, [1, 3], 0.01, 1)}


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
    text = write_markdown(list(rows.values()), [1, 3], **{"tensorrt fp16": "no GPU"})
    assert "- torch fp0: KeyError" in text and "- tensorrt fp16: no GPU" in text and "| onnxruntime int8 |" in text


def die() -> None:
    """As the system ends what takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def lack_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def measure_until(end: Any, *arguments: Any) -> dict[str, Any]:
    """`measure` of networks that end so at a second frame; in a process of its own, where a test has replaced nothing."""

    def unet(latents: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        if len(latents) > 1:
            end()
        return {"noise_pred": latents}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "load_networks", lambda *names: {"controlnet": lambda **inputs: {}, "unet": unet})
        return MEASURE(*arguments)


MEASURE = engines.measure


@pytest.fixture
def architecture(make_tiny_model: Callable[[str], PoseModel]) -> str:
    """What a build leaves of it."""
    return json.dumps(make_tiny_model("frame").architecture().to_json())


def test_what_was_measured_outlives_the_process(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ARCHITECTURE).write_text(architecture)
    monkeypatch.setattr(engines, "measure", partial(measure_until, die))
    row = engines.measure_apart(Job("torch fp16", "tiny", (32, 32), tmp_path), [1, 2, 3], 0.001)
    assert set(row["steps"]) == {"1"} and row["peak_bytes"] > 0 < row["load_s"]
    assert row["failed"] == {"2": "the process died, most likely for lack of memory"}
    text = write_markdown([of_reference(10, 20, 30), {"engine": "torch fp16", "build_s": 1.0, **row}], [1, 2, 3])
    assert "×) | process died | – |" in text and "- torch fp16, 2 frames: the process died" in text


def test_an_engine_without_memory_for_its_second_frame_count_has_its_first(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of two rounds; the third count is not tried."""

    def attempt(function: Any, job: Job, *arguments: Any) -> dict[str, Any]:
        if function is engines.build:
            job.folder.mkdir()
            (job.folder / ARCHITECTURE).write_text(architecture)
            return {"build_s": 1.0}
        try:
            return measure_until(lack_memory if job.name == "torch fp16" else int, job, *arguments)
        except RuntimeError as error:
            return {"error": f"{type(error).__name__}: {error}"}

    monkeypatch.setattr(engines, "in_own_process", attempt)
    jobs = [Job(name, "tiny", (32, 32), tmp_path / name) for name in (REFERENCE, "torch fp16")]
    whole, short = run(jobs, [1, 2, 3], 0.001, 2)
    assert set(whole["steps"]) == {"1", "2", "3"} and "failed" not in whole
    assert set(short["steps"]) == {"1"} and short["steps"]["1"]["psnr_db"] > 200
    text = write_markdown([whole, short], [1, 2, 3])
    assert "×) | out of memory | – | 99.0 |" in text
    assert text.count("- torch fp16, 2 frames: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB") == 1


def of_reference(*medians_ms: float) -> dict[str, Any]:
    """The reference's row, of 1, 2, … frames."""
    steps = {str(1 + index): {"median_ms": median_ms, "first_s": 0.1, "psnr_db": 300.0}
             for index, median_ms in enumerate(medians_ms)}  # fmt: skip
    return {"engine": REFERENCE, "build_s": 1.0, "peak_bytes": 1, "steps": steps}


def test_a_round_that_came_farther_gives_what_another_lacks() -> None:
    far = {"load_s": 1, "peak_bytes": 9, "steps": {"1": {"median_ms": 4}, "3": {"median_ms": 7}}}
    short = {"load_s": 2, "peak_bytes": 5, "steps": {"1": {"median_ms": 2}}, "failed": {"3": "RuntimeError: no"}}
    best = engines.best_of([short, far])
    assert best["steps"] == {"1": {"median_ms": 2}, "3": {"median_ms": 7}} and best["peak_bytes"] == 9
    assert engines.best_of([{"steps": {}, "failed": {"1": "RuntimeError: no"}}]) == {"error": "RuntimeError: no"}


def test_others_are_judged_where_the_reference_has_run() -> None:
    def row(name: str, *steps: float, failed: dict[str, str]) -> dict[str, Any]:
        return {**of_reference(*steps), "engine": name, "failed": failed}

    base = row(REFERENCE, 10, failed={"2": "MemoryError: "})
    short, whole = row("torch bf16", failed={"1": "RuntimeError: no"}), row("torch fp16", 2, 4, failed={})
    del whole["steps"]["2"]["psnr_db"]
    text = write_markdown([base, short, whole], [1, 2])
    assert f"| {REFERENCE} | 10.0 (1.00×) | out of memory |" in text
    assert "| torch fp16 | 2.0 (5.00×) | 4.0 | 99.0 |" in text and "| torch bf16 | RuntimeError | – |  |" in text
    assert "torch fp16, 5.00 times as fast as `torch fp32` where it gains least of 1 frames. Target 5: met." in text
    text = write_markdown([{"engine": REFERENCE, "error": "RuntimeError: no"}, whole], [1, 2])
    assert "None is judged: `torch fp32` did not run." in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said_so_and_is_never_the_fastest(value: float) -> None:
    assert engines.psnr_db(torch.tensor([0.0, value]), torch.tensor([0.0, 1.0])) is None
    base, broken = of_reference(10, 20), {**of_reference(1, 1), "engine": "torch fp16"}
    broken["steps"]["2"]["psnr_db"] = None
    text = write_markdown([base, broken], [1, 2])
    assert "| torch fp16 | 1.0 (10.00×) | 1.0 (20.00×) | not finite |" in text
    assert f"Fastest of those with 40 dB at least: {REFERENCE}, 1.00 times" in text
    for step in base["steps"].values():
        step["psnr_db"] = None
    assert f"None is judged: `{REFERENCE}` itself is not finite." in write_markdown([base, broken], [1, 2])


def test_a_quick_run_builds_nothing_that_takes_minutes() -> None:
    quick = parse(["--quick"])
    assert not any("inductor" in name for name in quick.engines) and REFERENCE in quick.engines
    assert len(quick.engines) < 3 and max(quick.frames) < max(parse([]).frames)
    assert parse(["--quick", "--engines", "inductor fp32", "--frames", "9"]).engines == ["inductor fp32"]
    assert "inductor fp32" in parse([]).engines


def test_every_precision_is_a_row_of_the_backends_that_have_it() -> None:
    assert [name for name in engines.candidates() if name.endswith(" int8")] == ["openvino int8", "onnxruntime int8"]
    assert {"torch bf16", "openvino bf16"} <= {*engines.candidates()}
    assert unsupported_reason("inductor int8") == "it has no int8 on a CPU; use fp32 or bf16"
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

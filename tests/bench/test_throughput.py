"""The end-to-end benchmark: every contender renders, is measured apart, and is summed up rightly. No timing is judged."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bench import footage, gpu, kernels, rivals, throughput, untrained
from bench.contenders import Job, run
from bench.flops import Counters, Setup, count_flops
from bench.processes import in_own_process
from bench.report import name_by_device
from bench.runs import moving_person, psnr
from bench.throughput import (
    benchmark,
    extrapolate,
    flops_of,
    make_contenders,
    markdown,
    median,
    parse,
    picture,
    result_name,
    summarise,
)
from bench.untrained import untrained_checkpoint, write_random_base
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.folder import building
from posecrafter_rt.models.loading import load_base
from posecrafter_rt.models.sources import SD15_FOLDER

SIZE, FRAMES, STEPS = (32, 32), 3, 2
SVG = "{http://www.w3.org/2000/svg}"
STAGES = {"exact": {"prepare", "invert", "denoise", "decode"}, "published": {"prepare", "invert", "denoise", "decode"},
          "plain": {"prepare", "invert", "denoise", "decode"}, "diffusers, frame by frame": {"denoise", "decode"}}  # fmt: skip


@pytest.fixture(scope="module")
def job(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("throughput")
    untrained_checkpoint(str(tiny_base), num_frames=3).save(folder / "tuned.ckpt")
    build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32"))
    target = moving_person(FRAMES, SIZE, phase=1.0)
    return Job("exact", folder / "tuned.ckpt", folder / "tuned.engine", "fp32", target, STEPS, folder / "0.npy")


def test_every_contender_renders_and_is_summed_up(job: Job, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "in_own_process", lambda function, *arguments: function(*arguments))
    contenders: dict[str, Any] = {
        f"{method}, fp32": {"job": replace(job, method=method, output=job.output.with_name(f"{index}.npy"))}
        for index, method in enumerate(STAGES)
    }
    measured = {name: [run(contender["job"])] for name, contender in contenders.items()}
    for name, (result,) in measured.items():
        assert set(result["seconds"]) == STAGES[contenders[name]["job"].method]
        assert 0 < sum(result["seconds"].values()) <= result["total_s"] + 0.01  # the report rounds to milliseconds
        assert result["peak_bytes"] >= result["loaded_peak_bytes"] > 0
        assert (result["peak_gpu_bytes"] > 0) == torch.cuda.is_available()
        frames = np.load(contenders[name]["job"].output)
        assert frames.shape == (FRAMES, *SIZE, 3) and frames.dtype == np.uint8
    contenders["broken"] = {"job": job, "error": "the process died"}
    measured["broken"] = [{"error": "the process died"}]
    rows = summarise(contenders, measured, Counters(tiny_base), Setup(SIZE, FRAMES, STEPS))
    quality = {row["contender"]: row["psnr_db"] for row in rows if "psnr_db" in row}
    assert set(quality) == {"exact, fp32", "published, fp32"}  # the others' frames are other ones
    assert quality["exact, fp32"] is None  # equal to itself
    assert quality["published, fp32"] is None or quality["published, fp32"] >= 60
    drawn = ["".join(text.itertext()) for text in ElementTree.fromstring(picture(document_of(rows))).iter(f"{SVG}text")]
    assert {*contenders, *STAGES["exact"], "failed"} <= set(drawn)
    text = tables(rows)
    assert text.count("| plain, fp32 |") == 4 and "| broken | failed: the process died |" in text
    assert "over exact, fp32" in text and "## Times" not in tables(rows[1:])
    on_gpu = {"exact, fp32": 2 * 10**6, "plain, fp32": 3 * 10**6}
    chosen = [{**row, "peak_gpu_bytes": on_gpu[row["contender"]]} for row in rows if row["contender"] in on_gpu]
    text = tables(chosen)
    assert "| peak MB | peak GPU MB |" in text and "1.50× |" in text  # compared by the GPU's memory


def document_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    setup = {
        "base": "tiny",
        "size": [32, 32],
        "frames": FRAMES,
        "steps": STEPS,
        "precision": "fp32",
        "rounds": 1,
        "warm_up_steps": 1,
    }
    return {"setup": setup, "machine": {"cores": 1}, "rows": rows}


def tables(rows: list[dict[str, Any]]) -> str:
    return markdown(document_of(rows))


def test_a_run_that_is_cut_off_in_summing_up_leaves_what_was_measured(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*arguments: object) -> None:
        raise KeyboardInterrupt

    runs = {"plain, fp32": [{"total_s": 2.5}]}
    monkeypatch.setattr(throughput, "measure", lambda contenders, rounds: runs)
    monkeypatch.setattr(throughput, "summarise", cut_off)
    options = parse(["--checkpoint", str(job.checkpoint), "--contenders", "plain", "--json", str(tmp_path / "a.json")])
    with pytest.raises(KeyboardInterrupt):
        benchmark(options, tmp_path)
    left = json.loads((tmp_path / "a.json").read_text())
    assert left["runs"] == runs and left["setup"]["frames"] == options.frames and "processor" in left["machine"]


def test_the_exact_render_is_never_helped_by_an_earlier_one(job: Job) -> None:
    """The inversion cache lies on disk and outlives a process: each measured render computes its own inversion."""
    assert job.engine is not None
    first = run(job)
    kept = {file: file.stat().st_mtime_ns for file in (job.engine / "inversions").iterdir()}
    run(job)
    again = {file: file.stat().st_mtime_ns for file in (job.engine / "inversions").iterdir()}
    assert kept.keys() == again.keys() and all(again[file] > kept[file] for file in kept)
    assert first["seconds"]["invert"] > 0


class _Unsendable(Exception):  # as torch.compile's are
    def __init__(self, backend: str, cause: str) -> None:
        super().__init__(f"{backend} failed: {cause}")


def _fail() -> dict[str, Any]:
    raise _Unsendable("inductor", "no tile fits")


def test_a_run_that_dies_is_reported() -> None:
    assert in_own_process(_fail) == {"error": "_Unsendable: inductor failed: no tile fits"}
    assert "died" in in_own_process(os._exit, 9)["error"]  # type: ignore[arg-type]


def test_targets_are_judged_by_the_fastest_that_is_near_enough() -> None:
    def row(contender: str, total_s: float, peak: float, psnr_db: float | None = None) -> dict[str, Any]:
        return {"contender": contender, "total_s": total_s, "peak_bytes": peak, "peak_gpu_bytes": 0, "psnr_db": psnr_db}

    rows = [row("exact, torch fp32", 10, 7), row("exact, openvino bf16", 4, 6, 41), row("exact, openvino int8", 1, 1, 39),
            row("published, fp32", 11, 10), row("plain, fp32", 30, 12)]  # fmt: skip
    lines = "\n".join(throughput.judged(rows, "fp32"))
    openvino, torch_fp32 = "exact, openvino bf16, against", "exact, torch fp32, against"
    assert f"| {openvino} published, any type | 2.75 | ≥ 2.5 | met | 0.60 | ≤ 0.6 | met |" in lines
    assert f"| {torch_fp32} published, the same type | 1.10 | ≥ 1.2 | missed | 0.70 | ≤ 0.6 | missed |" in lines
    assert f"| {openvino} plain, any type | 7.50 | ≥ 5 | met | 0.50 | ≤ 0.6 | met |" in lines
    assert "int8" not in lines and f"{openvino} published, the same type" not in lines
    assert throughput.judged(rows[:3], "fp32") == [] == throughput.judged(rows[3:], "fp32")


def test_without_float32_nothing_is_judged() -> None:
    """An engine that is compared with itself alone is not near anything."""
    rows: list[dict[str, Any]] = [
        {"contender": name, "total_s": total_s, "peak_bytes": 1, "peak_gpu_bytes": 0}
        for name, total_s in (("exact, openvino int8", 1), ("published, fp16", 11))
    ]
    lines = "\n".join(throughput.judged(rows, "fp16"))
    assert "None is judged: neither `exact` nor `published` ran in fp32" in lines and "met" not in lines
    assert throughput.judged(rows[1:], "fp16") == []


@pytest.mark.parametrize(("names", "reference", "compared"), [
    (["exact, openvino int8", "exact, torch fp32", "published, fp16"], "exact, torch fp32", 3),
    (["exact, openvino int8", "plain, fp32", "published, fp32"], "published, fp32", 2),
    (["exact, openvino int8", "published, fp16", "plain, fp32"], None, 0),
    (["exact, openvino int8", "exact, torch fp32: failed", "published, fp32"], "published, fp32", 2),
])  # fmt: skip
def test_frames_are_compared_with_those_in_float32(
    names: list[str], reference: str | None, compared: int, job: Job, tiny_base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(throughput, "in_own_process", lambda function, *of: {"flops_per_s": 1e9})
    one = {"startup_s": 1.0, "total_s": 2.0, "loaded_peak_bytes": 1, "peak_bytes": 1, "peak_gpu_bytes": 0,
           "seconds": {"denoise": 2.0}}  # fmt: skip
    contenders: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for index, told in enumerate(names):
        name, _, failed = told.partition(":")
        of = replace(job, method=name.split(",")[0], output=tmp_path / f"{index}.npy")
        contenders[name], runs[name] = {"job": of}, [{"error": "no memory"} if failed else one]
        np.save(of.output, np.full((FRAMES, *SIZE, 3), index, np.uint8))
    rows = summarise(contenders, runs, Counters(tiny_base), Setup(SIZE, FRAMES, STEPS))
    quality = {row["contender"]: row["psnr_db"] for row in rows if "psnr_db" in row}
    assert len(quality) == compared and [name for name in quality if quality[name] is None] == [reference][:compared]
    said = f"PSNR is to\nthe frames of `{reference}`." if reference else "PSNR is to\nnothing: none ran in fp32."
    assert said in tables(rows)


def test_by_default_something_runs_in_float32_to_compare_with() -> None:
    assert "torch:fp32" in parse(["--precision", "fp16"]).engines
    words, _ = gpu.PARTS["renders"]
    assert "torch:fp32" in parse(list(words[1:])).engines


def test_speed_and_memory_are_judged_of_one_engine() -> None:
    def row(contender: str, total_s: float, peak: float) -> dict[str, Any]:
        return {"contender": contender, "total_s": total_s, "peak_bytes": peak, "peak_gpu_bytes": 0, "psnr_db": None}

    fast, lean, published = (
        row("exact, fast fp32", 4, 30),
        row("exact, lean fp16", 9, 5),
        row("published, fp32", 10, 10),
    )
    lines = throughput.judged([fast, lean, published], "fp32")
    assert ("- 2.5 times as fast as published, any type: met by exact, fast fp32; 0.6 of its memory: met by exact, "
            "lean fp16; both in one engine: **missed**.") in lines  # fmt: skip
    both = row("exact, both fp32", 4, 5)
    lines = throughput.judged([fast, both, lean, published], "fp32")
    assert any("both in one engine: met by exact, both fp32." in line for line in lines)


@pytest.mark.parametrize(("name", "on_gpu"), [("exact, tensorrt fp16", 1), ("exact, openvino fp16", 0)])
def test_memory_that_is_not_counted_alike_is_not_compared(name: str, on_gpu: int) -> None:
    """torch does not know of TensorRT's plans and weights, nor has an engine on the processor any of a GPU's memory."""

    def row(contender: str, total_s: float, peak_gpu: int) -> dict[str, Any]:
        return {
            "contender": contender,
            "total_s": total_s,
            "peak_bytes": 1,
            "peak_gpu_bytes": peak_gpu,
            "psnr_db": None,
        }

    def told(rows: list[dict[str, Any]]) -> list[str]:
        return [
            line.split(" | ")[-1] for line in throughput._ratios(rows) if line.startswith(("| exact", "| published"))
        ]

    rows = [row(name, 1, on_gpu), row("exact, torch fp16", 9, 20), row("published, fp16", 10, 40)]
    assert told(rows) == ["not counted |", "1.00× |", "2.00× |"]
    assert told(rows[::2]) == ["not counted |"] * 2
    lines = throughput.judged(rows, "fp16")
    assert f"| {name}, against published, any type | 10.00 | ≥ 2.5 | met | not counted | ≤ 0.6 |  |" in lines
    verdict = f"- 2.5 times as fast as published, any type: met by {name}; 0.6 of its memory: "
    assert verdict + "met by exact, torch fp16; both in one engine: not counted." in lines
    rows[1]["peak_gpu_bytes"] = 30
    assert verdict + "not counted; both in one engine: not counted." in throughput.judged(rows, "fp16")


def test_plain_under_torch_compile_renders_the_same_frames(job: Job) -> None:
    tuned = Checkpoint.load(job.checkpoint)
    baseline = rivals.Baseline(rivals.load_model(tuned, job), tuned.metadata["prompt"])
    calls: list[int] = []

    def eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        calls.append(1)
        return graph.forward

    plain = baseline.plain(tuned.frames, tuned.poses, job.target, STEPS).frames
    baseline.networks = rivals.compile_denoisers(baseline.networks, eager)
    compiled = baseline.plain(tuned.frames, tuned.poses, job.target, STEPS).frames
    difference = np.abs(plain.astype(int) - compiled).max()
    assert calls and difference <= torch.cuda.is_available()  # a GPU's sums may be rounded otherwise


def test_what_did_not_run_is_told() -> None:
    names = ["exact, torch fp32", "plain, fp32", "diffusers, frame by frame, fp32"]
    rows = [{"contender": name, "error": "none"} for name in names]
    assert throughput.absent(rows) == ["published", "plain, torch.compile"]
    text = tables([*rows, {"contender": "plain, torch.compile, fp32", "error": "none"}])
    assert "| published | not run |" in text and text.count("not run") == 1


def test_medians_are_of_each_measurement() -> None:
    def one(value: float) -> dict[str, Any]:
        return {"startup_s": value, "total_s": 2 * value, "loaded_peak_bytes": 3 * value, "peak_bytes": 4 * value,
                "peak_gpu_bytes": 6 * value, "seconds": {"denoise": 5 * value}}  # fmt: skip

    assert median([one(3.0), one(1.0), one(100.0)]) == one(3.0)


@pytest.mark.parametrize(("method", "expected"), [
    # 4 frames, 2 steps → 100 frames, 50 steps: 25 times the steps; plain 25 times the frames, the others 101 over 5
    ("plain, fp32", 25 * 25 * 1.0 + 25 * 25 * 10.0 + 25 * 100.0),
    ("published, fp32", 25 * 1.0 + 25 * 101 / 5 * 10.0 + 25 * 100.0),
    ("exact, torch fp32", 25 * 1.0 + 25 * 101 / 5 * 10.0 + 25 * 100.0),
])  # fmt: skip
def test_extrapolation(method: str, expected: float) -> None:
    row = {"seconds": {"invert": 1.0, "denoise": 10.0, "decode": 100.0}}
    assert extrapolate(method, row, 4, 2) == pytest.approx(expected)


def test_extrapolating_a_full_run_changes_nothing() -> None:
    row = {"seconds": {"prepare": 2.0, "invert": 1.0, "denoise": 10.0, "decode": 100.0}}
    for method in STAGES:
        assert extrapolate(method, row, 100, 50) == pytest.approx(113.0)


def test_diffusers_pipeline_computes_less_than_a_clip(tiny_base: Path) -> None:
    """No temporal attention, no inversion, no inserted frame; but pose embedding and text anew in each step."""
    counters, setup = Counters(tiny_base), Setup(SIZE, FRAMES, STEPS)
    assert flops_of(counters, "diffusers, frame by frame", setup) < flops_of(counters, "published", setup)
    assert flops_of(counters, "plain, torch.compile", setup) == flops_of(counters, "plain", setup)


def test_diffusers_pipeline_computes_just_what_is_counted(job: Job, tiny_base: Path) -> None:
    render = rivals.load_diffusers(job)
    flops = flops_of(Counters(tiny_base), "diffusers, frame by frame", Setup(SIZE, 1, STEPS))
    assert count_flops(lambda: render(job.target[:1], STEPS)) == flops


def test_quick_changes_defaults_and_nothing_that_was_asked_for() -> None:
    assert parse(["--quick"]).frames < parse([]).frames
    options = parse(["--quick", "--frames", "7", "--size", "64x96"])
    assert options.frames == 7 and options.size == (64, 96) and options.rounds == 1
    assert parse(["--quick", "--precision", "fp32"]).engines == [
        "torch:fp32"
    ]  # openvino's takes most of a minute to build


@pytest.mark.parametrize(("backend", "precision", "is_quick", "built"), [
    ("auto", "auto", True, "torch"), ("openvino", "auto", True, "openvino"), ("auto", "auto", False, "auto"),
    ("auto", "int8", True, "auto"),  # which torch has not
])  # fmt: skip
def test_a_quick_run_builds_what_takes_a_second_unless_another_is_named(
    backend: str, precision: str, is_quick: bool, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(throughput, "in_own_process", lambda function, *arguments: asked.append(arguments[2]) or {})
    options = Namespace(engine=None, checkpoint=Path("a.ckpt"), backend=backend, precision=precision, quick=is_quick)
    assert throughput.find_engine(options, tmp_path) == tmp_path / f"a-{built}-{precision}.engine" and asked == [built]
    assert footage.engine_options(is_quick).backend == ("torch" if is_quick else "auto")


def test_only_the_named_contenders_run(job: Job, tmp_path: Path) -> None:
    assert (
        "compile" not in parse([]).contenders and parse(["--contenders", "plain", "compile"]).contenders[1] == "compile"
    )
    assert list(make_contenders(job, ["plain", "published"], ["torch:fp32"], tmp_path)) == [
        "plain, fp32",
        "published, fp32",
    ]


def test_an_engine_that_cannot_run_here_is_a_row_and_stops_no_other(job: Job, tmp_path: Path) -> None:
    contenders = make_contenders(job, ["exact", "plain"], ["abacus:fp32", "torch:int8"], tmp_path)
    assert list(contenders) == ["exact, abacus:fp32", "exact, torch:int8", "plain, fp32"]
    assert "abacus" in contenders["exact, abacus:fp32"]["error"] and "error" not in contenders["plain, fp32"]
    assert "it has no int8" in contenders["exact, torch:int8"]["error"]


def test_what_is_done_in_8_bits_is_held_against_the_peak_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def peaks(device: str, dtypes: list[torch.dtype], budget_s: float) -> dict[str, float]:
        asked.extend(dtypes)
        return {"float32": 1e9, "bfloat16": 2e9}

    monkeypatch.setattr(kernels, "measure_peaks", peaks)
    found = [kernels.measure_peak(precision, "cpu")["flops_per_s"] for precision in ("fp32", "bf16", "int8")]
    assert found == [1e9, 2e9, 1e9] and asked == [torch.float32, torch.bfloat16, torch.float32]


def test_an_engine_on_the_processor_is_held_against_the_processors_peak(
    job: Job, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU, which the other contenders use."""
    peaks = {"cpu": 1e9, "cuda": 1e12}
    monkeypatch.setattr(throughput, "torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(throughput, "in_own_process", lambda function, *of: {"flops_per_s": peaks[of[-1]]})
    with building(tmp_path / "openvino.engine", {"device": {"type": "cpu", "name": "a processor"}}) as staging:
        (staging / "network").touch()
    output = tmp_path / "frames.npy"
    np.save(output, np.zeros((FRAMES, *SIZE, 3), np.uint8))
    contenders = {
        "exact": {"job": replace(job, engine=tmp_path / "openvino.engine", output=output)},
        "plain": {"job": replace(job, method="plain", engine=None, output=output)},
    }
    run = {"startup_s": 1.0, "total_s": 2.0, "loaded_peak_bytes": 1, "peak_bytes": 1, "peak_gpu_bytes": 0,
           "seconds": {"denoise": 2.0}}  # fmt: skip
    exact, plain = summarise(
        contenders, dict.fromkeys(contenders, [run]), Counters(tiny_base), Setup(SIZE, FRAMES, STEPS)
    )
    assert exact["percent_of_peak"] == pytest.approx(100 * exact["flops_per_s"] / 1e9)
    assert plain["percent_of_peak"] == pytest.approx(100 * plain["flops_per_s"] / 1e12)


def test_a_processors_peak_is_measured_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.timing._time_cuda", None)
    assert kernels.measure_peaks("cpu", [], 0.01)["float32"] > 0


def test_results_are_named_by_the_base_and_the_device() -> None:
    facts = {"setup": {"base": "somebody/random-sd15"}, "machine": {"cores": 2}}
    assert result_name(facts) == "throughput-random-sd15-cpu"
    assert name_by_device("throughput", {"gpu": "NVIDIA H100 80GB HBM3"}) == "throughput-nvidia-h100-80gb-hbm3"


def test_psnr() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_made_up_poses_move_smoothly_and_stay_in_the_picture() -> None:
    poses = moving_person(50, (128, 160))
    points = poses.keypoints[..., :2]
    assert (points >= 0).all() and (points < (160, 128)).all() and (poses.keypoints[..., 2] == 1).all()
    steps = np.abs(np.diff(points, axis=0)).max(axis=(1, 2))
    assert 0 < steps.max() < 5


@pytest.fixture
def small_configs(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrained, "SD15_FOLDER", tiny_base)


def test_a_random_base_loads_and_is_written_once(small_configs: None, tmp_path: Path) -> None:
    folder = write_random_base(tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    with safe_open(weights, "pt") as file:
        norm = file.get_tensor("conv_norm_out.weight")
    assert (norm == 1).all()
    assert load_base(str(folder)).unet.conv_in.weight.std() == pytest.approx(0.02, rel=0.1)
    assert write_random_base(folder) == folder and weights.stat().st_mtime_ns == before


def test_the_random_base_is_of_stable_diffusions_size() -> None:
    assert untrained.SD15_FOLDER == SD15_FOLDER

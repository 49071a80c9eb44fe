"""Measures the time and memory of each preset for a long clip, stage by stage; `quality.py --presets` measures quality.

Bench: `python -m bench.presets [ENGINE] [--json FILE] [--quick]` writes results/presets-<device>.json and .md, or FILE
and its .md, after every row. --quick takes 4 frames, two presets, and the engine `torch` unless
another is named; it only prints unless --json is given. `--base random-sd15` has the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.flops import Counters, Setup, count_flops
from bench.hardware import tensor_peak
from bench.kernels import measure_peak
from bench.processes import in_own_process
from bench.report import name_by_device, new_parser, publish, result_path, table, write_report
from bench.runs import forget_inversions, moving_person
from bench.throughput import STAGES, add_engine_arguments, find_engine, is_sd15, setup_of
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.manifest import read_manifest
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.models.small_decoder import new_small_decoder
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import RenderOptions

Row = dict[str, Any]
# The cheapest first, because a run that is cut off keeps its rows; `exact` before the one that uses its cached
# inversion.
WAYS: dict[str, dict[str, Any]] = {
    "fast, small decoder": {"preset": "fast", "decoder": "small"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "exact": {"preset": "exact"},
    "exact, inversion cached": {"preset": "exact"},
}
QUICK_WAYS = ("fast", "exact")
# Goals for 100 frames of Stable Diffusion 1.5 at 512 × 512: in seconds by card, and in the memory of any GPU.
GPU_BYTES = {"exact": 8e9}
TARGETS = {"RTX 3090": {"exact": 115, "balanced": 40, "fast": 12}, "H100": {"exact": 12, "balanced": 4, "fast": 1.5}}


def measure(engine: Path, way: str, num_frames: int) -> Row:
    """Measure one render after a short one, so that it compiles nothing. Called in a process of its own."""
    with Avatar.load(engine) as avatar:
        target = moving_person(num_frames, avatar.size, phase=1.0)
        options = avatar.resolve(**WAYS[way])
        avatar.render(target, options, num_inference_steps=max(3, options.num_inference_steps // 10))
        total = time_render(avatar, target, options, way.endswith("cached"))
        report = avatar.last_report
        assert report is not None and report.inversion_cached == way.endswith("cached")
        num_steps = options.num_inference_steps - options.start_step
        num_whole = math.ceil(num_steps / options.unet_every)
        return {"total_s": total, "seconds": report.seconds, "peak_bytes": peak_rss_bytes(),
                "peak_gpu_bytes": report.peak_gpu_bytes, "sampled": num_whole, "shallow": num_steps - num_whole,
                "inverted": 0 if report.inversion_cached else count_inversion(avatar, options),
                "decoder": options.decoder}  # fmt: skip


def time_render(avatar: Avatar, target: PoseSequence, options: RenderOptions, is_cached: bool) -> float:
    """Return the seconds of a render that inverts, or of one that finds its inversion cached.

    If nothing is cached yet, another render comes first. It has the whole target, because all of the target's poses
    choose the reference (Eq. 5) that is inverted.
    """
    if not is_cached:
        forget_inversions(avatar)
    for _ in range(2):
        start = time.perf_counter()
        avatar.render(target, options)
        total = time.perf_counter() - start
        assert avatar.last_report is not None
        if avatar.last_report.inversion_cached == is_cached:
            break
    return total


def count_inversion(avatar: Avatar, options: RenderOptions) -> int:
    """Return the number of network evaluations of the inversion."""
    schedule, substeps = avatar.schedules[options.sampler], options.inversion_substeps
    assert substeps is not None
    return len(schedule.inversion_timesteps(options.num_inference_steps, substeps, options.start_step))


def count_flops_of(counters: Counters, setup: Setup, row: Row) -> int:
    """Return the FLOPs of a render as the ledger counts; text and timestep tables are left out as negligible."""
    frame, picture = counters.latents(setup, 1), counters.pixels(setup, 1)
    poses = (setup.frames + 1) * counters.network("pose_embedding", picture).flops
    inverted = row["inverted"] * counters.exact_step(setup, 1).flops
    sampled = row["sampled"] * counters.exact_step(setup, setup.frames + 1).flops
    sampled += row["shallow"] * counters.shallow_step(setup, setup.frames + 1).flops
    if row["decoder"] == "small":
        small = new_small_decoder(counters.arch.latent_channels, counters.arch.vae_scale_factor, torch.Generator()).to(
            "meta"
        )
        decoded = count_flops(lambda: small(frame))
    else:
        decoded = counters.network("vae_decoder", frame).flops
    return poses + inverted + sampled + setup.frames * decoded


def find_peak(precision: str, device: str) -> Row:
    """Return the FLOP/s that are 100 %: measured, or the specification's if that fails, or None for an unknown card.

    Args: device: the type of the device that the engine runs on, "cuda" or "cpu".
    """
    measured = in_own_process(measure_peak, precision, device)
    if "error" not in measured:
        kind = "the engine's type" if precision in TORCH_DTYPES else "float32"
        return {"peak_flops_per_s": measured["flops_per_s"], "peak_of": f"a large matrix product in {kind}"}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = None if precision == "fp32" else tensor_peak(name)
    return {"peak_flops_per_s": peak, "peak_of": f"the card's specification (not measured: {measured['error']})"}


def goals_of(setup: Row, facts: Row) -> tuple[dict[str, float], dict[str, float]]:
    """Return the goals in seconds and in bytes of GPU memory, by way; empty for anything but what they are goals for."""
    gpu = facts.get("gpu")
    if gpu is None or setup["size"] != [512, 512] or setup["frames"] != 100 or not is_sd15(setup):
        return {}, {}
    return next((goals for card, goals in TARGETS.items() if card in gpu), {}), GPU_BYTES


def judged(rows: dict[str, Row], goals: dict[str, float], goals_bytes: dict[str, float]) -> list[str]:
    """Compare the goals with what was measured."""
    cells = [(way, f"{goal:g} s", f"{row['total_s']:.2f} s", row["total_s"] <= goal)
             for way, row in rows.items() if (goal := goals.get(way)) is not None]  # fmt: skip
    cells += [(way, f"{goal / 1e9:g} GB of GPU memory", f"{row['peak_gpu_bytes'] / 1e9:.1f} GB", row["peak_gpu_bytes"] <= goal)
              for way, row in rows.items() if (goal := goals_bytes.get(way)) is not None]  # fmt: skip
    verdicts = [(way, goal, f"{found}: {'met' if is_met else 'missed'}") for way, goal, found, is_met in cells]
    return ["## Goals", "", *table(("preset", "at most", "measured"), verdicts)] if verdicts else []


def markdown(document: Row) -> str:
    """Format the results as a table, and the verdicts on what has a goal."""
    setup, facts = document["setup"], document["machine"]
    rows = {way: row for way, row in document["rows"].items() if "error" not in row}
    size = "×".join(map(str, setup["size"]))
    goals, goals_bytes = goals_of(setup, facts)
    lines = [f"# Presets: {setup['frames']} frames at {size}, {setup['base']}, {setup['backend']} {setup['precision']}", "",
             f"Machine: {', '.join(f'{key} {value}' for key, value in facts.items())}.", "",
             "Seconds of one render after a shorter one, engine loaded; the inversion is in it unless it says cached. FLOPs are the",
             f"ledger's; peak is that of {document['peak_of']}.", ""]  # fmt: skip
    header = ("preset", "s", "goal", "frames/s", *STAGES, "TFLOP/s", "% of peak", "peak MB", "peak GPU MB")
    cells = []
    for way, row in rows.items():
        goal = f"{goals[way]:g}" if way in goals else ""
        stages = [f"{row['seconds'].get(stage, 0.0):.2f}" for stage in STAGES]
        memory = [f"{row[name] / 1e6:.0f}" for name in ("peak_bytes", "peak_gpu_bytes")]
        rate = row["flops"] / row["total_s"]
        peak = document["peak_flops_per_s"]
        speed = (f"{rate / 1e12:.3g}", f"{100 * rate / peak:.0f}" if peak else "")
        cells.append(
            (way, f"{row['total_s']:.2f}", goal, f"{setup['frames'] / row['total_s']:.1f}", *stages, *speed, *memory)
        )
    cells += [(way, f"failed: {row['error']}") for way, row in document["rows"].items() if "error" in row]
    return "\n".join([*lines, *table(header, cells), *judged(rows, goals, goals_bytes)])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. --quick only changes defaults."""
    parser = new_parser(__doc__, f"4 frames; {' and '.join(QUICK_WAYS)}")
    add_engine_arguments(parser)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS))
    options = parser.parse_args(arguments)
    options.frames = options.frames or (4 if options.quick else 100)
    options.ways = options.ways or list(QUICK_WAYS if options.quick else WAYS)
    return options


def benchmark(options: argparse.Namespace, folder: Path) -> tuple[str, Row]:
    """Measure the ways in order. Each row is written to the result's files, if it has any, before the next begins.

    Returns: the result's name, and the result.
    """
    engine = find_engine(options, folder)
    manifest, facts = read_manifest(engine), machine()
    setup = {"frames": options.frames, **setup_of(manifest)}
    rows: dict[str, Row] = {}
    peak = find_peak(manifest["precision"], manifest["device"]["type"])
    document = {"setup": setup, "machine": facts, **peak, "rows": rows}
    name = name_by_device("presets", facts)
    path = result_path(name, options.json, options.quick)
    counters, counted = Counters(locate_base(manifest["base"]).configs), Setup(tuple(manifest["size"]), options.frames)
    for way in options.ways:
        row = in_own_process(measure, engine, way, options.frames)
        rows[way] = row if "error" in row else {**row, "flops": count_flops_of(counters, counted, row)}
        print(way, rows[way], file=sys.stderr, flush=True)
        if path is not None:
            write_report(path, document, markdown(document))
    return name, document


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="presets-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        name, document = benchmark(options, folder)
    publish(name, document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

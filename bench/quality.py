"""How near the demonstration's render comes to the truth: by mode and option, and by what was tuned.

Bench: `python -m bench.quality [--quick] [--checkpoint demo/tuned.ckpt]` tunes on the demonstration's eight frames,
renders frames 46-119 by every variant and writes results/quality.json and .md. About an hour on two cores; --quick takes
every sixth frame. With --presets it renders by the presets alone, in turns, and writes results/presets.json and .md: how
near each comes to the truth and to the exact render, and how much sooner it is done. With --reuse it renders so with
the U-Net run whole at every step, every second and so on, and writes results/reuse.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.footage import load_footage, tune_person
from bench.report import RESULTS, table, write_report
from bench.runs import forget_inversions, psnr
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.demo.footage import TARGET
from posecrafter_rt.demo.run import scores
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import MODES, RenderOptions
from posecrafter_rt.runtime.presets import PRESETS, preset_options

QUICK_STRIDE = 6
REUSED = {50: (2, 3, 5), 25: (1, 2, 3), 15: (1, 2, 3), 9: (1, 2, 3), 4: (1, 2)}  # unet_every by steps
TUNED, OWN_DECODER, CLIP_SCOPE = "as the demonstration tunes", "the base's own decoder", "norm_scope clip"


# What else is priced beside the presets.
CHANGED: dict[str, dict[str, Any]] = {
    "unipc": {"sampler": "unipc"}, "residuals kept": {"controlnet_every": 2}, "small decoder": {"decoder": "small"},
}  # fmt: skip


def render_variants(steps: int) -> dict[str, RenderOptions]:
    """What is compared: each of the options alone against the defaults."""
    variants = {f"mode {mode}": RenderOptions(mode, steps) for mode in MODES}
    for resample in ("nearest", "unit_variance"):
        variants[f"resample {resample}"] = RenderOptions(num_inference_steps=steps, resample=resample)  # type: ignore[arg-type]
    for tau in (2, 4, 8):
        if tau <= steps // 5:  # within what any sensible strength leaves
            variants[f"tau {tau}"] = RenderOptions(num_inference_steps=steps, tau=tau)
    variants["inversion substeps 1"] = RenderOptions(num_inference_steps=steps, inversion_substeps=1)
    for strength in (1.0, 0.8, 0.6, 0.4, 0.2):
        variants[f"strength {strength}"] = RenderOptions(num_inference_steps=steps, strength=strength)
    variants["strength 1, substeps 1: the paper's"] = RenderOptions(
        num_inference_steps=steps, strength=1.0, inversion_substeps=1
    )
    for scale in (0.8, 1.3):
        variants[f"control scale {scale}"] = RenderOptions(num_inference_steps=steps, conditioning_scale=scale)
    for other in (steps // 2, 2 * steps):
        variants[f"{other} steps"] = RenderOptions(num_inference_steps=other)
    return variants


def measure(
    avatar: Avatar, target: PoseSequence, truth: np.ndarray, variants: dict[str, RenderOptions]
) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of every variant, and of the frame that Eq. 5 selects, repeated."""
    results = {}
    for name, options in variants.items():
        frames = avatar.render(target, options)
        results[name] = scores(frames, truth)
        print(f"{name}: {results[name]}", file=sys.stderr)
        if name == "mode +editing" and avatar.last_report is not None:
            repeated = np.repeat(avatar.frames[[avatar.last_report.reference_index]], len(truth), axis=0)
            results["the reference frame, repeated"] = scores(repeated, truth)
    return results


def timed_variants(is_reuse: bool) -> dict[str, RenderOptions]:
    """What is compared in quality and time, the exact render first: the presets, or steps with features kept over some."""
    variants = {name: preset_options(name) for name in PRESETS}
    for name, changes in CHANGED.items():
        variants |= {f"{preset}, {name}": preset_options(preset, **changes) for preset in PRESETS if preset != "exact"}
    if is_reuse:
        variants = {"exact": variants["exact"]}
        for steps, all_every in REUSED.items():
            preset = "exact" if steps == RenderOptions.num_inference_steps else "balanced"
            for every in all_every:
                options = preset_options(preset, num_inference_steps=steps, unet_every=every)
                variants[f"{steps} steps of {options.sampler}, U-Net every {every}"] = options
    return variants


def measure_timed(
    avatar: Avatar, target: PoseSequence, truth: np.ndarray, rounds: int, variants: dict[str, RenderOptions]
) -> dict[str, dict[str, Any]]:
    """Render every variant, in turns so that the machine's load falls on all alike; the least time of each counts.

    Returns: by variant: psnr and ssim to the truth, psnr_to_exact, seconds of a render that has to invert the reference
        and of one that finds that done, and what its report names as approximated.
    """
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "seconds_inverted": []} for name in variants}
    frames = {}
    for _ in range(rounds):
        for name, result in results.items():
            forget_inversions(avatar)
            start = time.perf_counter()
            frames[name] = avatar.render(target, variants[name])
            seconds = time.perf_counter() - start
            assert avatar.last_report is not None
            result["seconds"].append(seconds)
            result["seconds_inverted"].append(seconds - avatar.last_report.seconds["invert"])
            result["approximations"] = avatar.last_report.to_json()["approximations"]
            print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    for name, result in results.items():
        result |= {key: round(min(result[key]), 3) for key in ("seconds", "seconds_inverted")}
        result |= scores(frames[name], truth)
        result["psnr_to_exact"] = None if name == "exact" else round(psnr(frames[name], frames["exact"]), 2)
    return results


def make_checkpoints(folder: Path, given: Path | None) -> Iterator[tuple[str, Path]]:
    """The tunings that are compared, by name; `given` in place of the first."""
    checkpoint = tune_person(folder / "tuned.ckpt", given)
    yield TUNED, checkpoint
    tuned = Checkpoint.load(checkpoint)
    tuned.tensors = {name: tensor for name, tensor in tuned.tensors.items() if not name.startswith("vae.")}
    tuned.save(folder / "own_decoder.ckpt")
    yield OWN_DECODER, folder / "own_decoder.ckpt"
    yield CLIP_SCOPE, tune_person(folder / "clip.ckpt", norm_scope="clip")


def run_timed(stride: int, given: Path | None, rounds: int, is_reuse: bool) -> dict[str, Any]:
    """Render by every preset, or with features kept over steps, with what the demonstration tunes."""
    variants, build = timed_variants(is_reuse), BuildOptions(feature_reuse=is_reuse)
    frames, poses = load_footage()
    window = slice(TARGET.start, TARGET.stop, stride)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tune_person(Path(folder) / "tuned.ckpt", given)
        with Avatar.load(build_engine(checkpoint, Path(folder) / "tuned.engine", build).folder.path) as avatar:
            engine = {name: avatar.folder.manifest[name] for name in ("backend", "precision")}
            variants = {name: options for name, options in variants.items()
                        if options.decoder == "full" or avatar.has_small_decoder}  # fmt: skip
            results = measure_timed(avatar, poses[window], frames[window], rounds, variants)
            return {"engine": engine, "variants": results}


def run(steps: int, stride: int, given: Path | None) -> dict[str, Any]:
    """Render every variant with what the demonstration tunes, and the modes with the others."""
    frames, poses = load_footage()
    window = slice(TARGET.start, TARGET.stop, stride)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, checkpoint) in enumerate(make_checkpoints(Path(folder), given)):
            variants = render_variants(steps)
            if name != TUNED:
                variants = {name: options for name, options in variants.items() if name.startswith("mode")}
            print(f"# {name}", file=sys.stderr)
            with Avatar.load(build_engine(checkpoint, Path(folder) / f"{number}.engine").folder.path) as avatar:
                results[name] = measure(avatar, poses[window], frames[window], variants)
    return results


def to_markdown(result: dict[str, Any]) -> str:
    """One table for each tuning."""
    lines = [
        f"{result['num_frames']} unseen frames of the demonstration's footage, {result['steps']} steps unless a row "
        f"says otherwise, mode `+editing` unless it says otherwise; {result['machine']['processor']}.",
    ]
    for tuning, rows in result["tunings"].items():
        lines += ["", f"## {tuning[0].upper()}{tuning[1:]}", ""]
        cells = [(name, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}") for name, row in rows.items()]
        lines += table(("variant", "PSNR dB", "SSIM"), cells)
    return "\n".join(lines)


def timed_to_markdown(result: dict[str, Any]) -> str:
    """One table: a row for each variant."""
    exact = result["variants"]["exact"]
    cells = []
    for name, row in result["variants"].items():
        near = "" if row["psnr_to_exact"] is None else f"{row['psnr_to_exact']:.2f}"
        cells.append((
            f"{name}: {', '.join(f'{key} {value}' for key, value in row['approximations'].items())}",
            f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", near, f"{row['seconds']:.1f}",
            f"{exact['seconds'] / row['seconds']:.2f}", f"{exact['seconds_inverted'] / row['seconds_inverted']:.2f}",
        ))  # fmt: skip
    header = ("variant and what it approximates", "PSNR dB", "SSIM", "PSNR to exact dB", "s", "times faster",
              "times faster, inverted before")  # fmt: skip
    lines = [f"{result['num_frames']} unseen frames of the demonstration's footage, PSNR and SSIM to the truth; the least "
             f"of {result['rounds']} times, taken in turns; {result['engine']['backend']} "
             f"{result['engine']['precision']}, {result['machine']['processor']}, "
             f"{result['machine']['torch_threads']} threads.", ""]  # fmt: skip
    return "\n".join(lines + table(header, cells))


def main() -> None:
    """Parse the arguments, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes; else its own place in results")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    parser.add_argument(
        "--presets", action="store_true", help="the presets and what else may be left out: quality and time"
    )
    parser.add_argument("--reuse", action="store_true", help="features kept over steps: quality and time")
    parser.add_argument("--quick", action="store_true", help="every sixth frame, in two rounds")
    parser.add_argument("--stride", type=int, help="every so many-th frame; else every one")
    parser.add_argument("--rounds", type=int, help="of --presets and --reuse, whose least time counts; else 3")
    arguments = parser.parse_args()
    stride = arguments.stride or (QUICK_STRIDE if arguments.quick else 1)
    num_frames = len(range(TARGET.start, TARGET.stop, stride))
    result = {"machine": machine(), "num_frames": num_frames}
    if arguments.presets or arguments.reuse:
        rounds = arguments.rounds or (2 if arguments.quick else 3)
        result |= {"rounds": rounds, **run_timed(stride, arguments.checkpoint, rounds, arguments.reuse)}
        name = "reuse" if arguments.reuse else "presets"
        write_report(arguments.json or RESULTS / f"{name}.json", result, timed_to_markdown(result))
        return
    result |= {"steps": arguments.steps, "tunings": run(arguments.steps, stride, arguments.checkpoint)}
    write_report(arguments.json or RESULTS / "quality.json", result, to_markdown(result))


if __name__ == "__main__":
    main()

"""Measures how close the demonstration's render comes to the truth, by mode and option, and by what was tuned.

Bench: `python -m bench.quality [--stride N] [--checkpoint demo/tuned.ckpt] [--json FILE] [--quick]` tunes on the
demonstration's eight frames, renders frames 46-119, or every N-th of them, in every variant, and writes
results/quality.json and .md, or FILE and its .md. It takes about an hour on two cores. With --presets it renders only
with the presets, in turns, and writes results/presets.json and .md: how close each comes to the truth and to the exact
render, and how much faster it is. `--people N` adds N drawn people, each tuned anew. With --reuse it does the same for
single approximations: the strength, the ControlNet's residuals kept, and the whole U-Net run at every step, every
second step and so on; it writes results/reuse.json and .md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.footage import Subject, drawn_person, engine_options, filmed_person, tune_person
from bench.report import new_parser, publish, table
from bench.runs import forget_inversions, psnr
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.demo.run import scores
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import MODES, RenderOptions
from posecrafter_rt.runtime.presets import PRESETS, preset_options

QUICK_STRIDE = 40
REUSED = {50: (2, 3, 5), 25: (1, 2, 3), 15: (1, 2, 3), 9: (1, 2, 3), 4: (1, 2)}  # unet_every by steps
TUNED, OWN_DECODER, CLIP_SCOPE = "as the demonstration tunes", "the base's own decoder", "norm_scope clip"


# What is measured beside the presets.
CHANGED: dict[str, dict[str, dict[str, Any]]] = {
    "balanced": {"every other step whole": {"unet_every": 2}, "dpmpp": {"sampler": "dpmpp"},
                 "9 steps of dpmpp": {"sampler": "dpmpp", "num_inference_steps": 9, "inversion_substeps": 10, "unet_every": 1},
                 "small decoder": {"decoder": "small"}},
    "fast": {"unipc": {"sampler": "unipc"}, "residuals kept": {"controlnet_every": 2}, "small decoder": {"decoder": "small"}},
}  # fmt: skip


def render_variants(steps: int) -> dict[str, RenderOptions]:
    """Return what is compared: each option alone against the defaults."""
    variants = {f"mode {mode}": RenderOptions(mode, steps) for mode in MODES}
    for resample in ("nearest", "unit_variance"):
        variants[f"resample {resample}"] = RenderOptions(num_inference_steps=steps, resample=resample)  # type: ignore[arg-type]
    for tau in (2, 4, 8):
        if tau <= steps // 5:  # within the steps that any sensible strength leaves
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
    """Measure PSNR and SSIM of every variant, and of the frame that Eq. 5 selects, repeated."""
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
    """Return what is compared in quality and time, the exact render first: presets, or single approximations."""
    variants = {name: preset_options(name) for name in PRESETS}
    for preset, changed in CHANGED.items():
        variants |= {f"{preset}, {name}": preset_options(preset, **changes) for name, changes in changed.items()}
    if is_reuse:
        variants = {"exact": variants["exact"], "the whole noise": preset_options("exact", strength=1.0),
                    "ControlNet every 2": preset_options("exact", controlnet_every=2)}  # fmt: skip
        for steps, all_every in REUSED.items():
            preset = "exact" if steps == RenderOptions.num_inference_steps else "fast"
            for every in all_every:
                options = preset_options(preset, num_inference_steps=steps, unet_every=every)
                variants[f"{steps} steps of {options.sampler}, U-Net every {every}"] = options
    return variants


def measure_timed(
    avatar: Avatar, target: PoseSequence, truth: np.ndarray, rounds: int, variants: dict[str, RenderOptions]
) -> dict[str, dict[str, Any]]:
    """Render every variant, in turns, so that the machine's load affects all alike; the least time of each counts.

    Returns: by variant: psnr and ssim to the truth, psnr_to_exact, seconds of a render that has to invert the reference
        and of one that finds it inverted, and the approximations that its report names.
    """
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "seconds_inverted": []} for name in variants}
    frames = {}
    # So that no time below includes compiling.
    for decoder in dict.fromkeys(options.decoder for options in variants.values()):
        avatar.render(target, num_inference_steps=4, unet_every=2, decoder=decoder)
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


def make_checkpoints(folder: Path, given: Path | None, is_quick: bool) -> Iterator[tuple[str, Path]]:
    """Yield the tunings to compare, by name; `given` replaces the first."""
    checkpoint = tune_person(folder / "tuned.ckpt", given, is_quick=is_quick)
    yield TUNED, checkpoint
    tuned = Checkpoint.load(checkpoint)
    tuned.tensors = {name: tensor for name, tensor in tuned.tensors.items() if not name.startswith("vae.")}
    tuned.save(folder / "own_decoder.ckpt")
    yield OWN_DECODER, folder / "own_decoder.ckpt"
    if not is_quick:
        yield CLIP_SCOPE, tune_person(folder / "clip.ckpt", norm_scope="clip")


def run_timed(
    subject: Subject, given: Path | None, rounds: int, is_reuse: bool, is_quick: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Render a person with every preset, or with single approximations. Returns: the engine, and the variants."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tune_person(Path(folder) / "tuned.ckpt", given, subject=subject, is_quick=is_quick)
        built = build_engine(checkpoint, Path(folder) / "tuned.engine", engine_options(is_quick)).folder
        with Avatar.load(built.path) as avatar:
            engine = {name: built.manifest[name] for name in ("backend", "precision")}
            variants = {name: options for name, options in timed_variants(is_reuse).items()
                        if options.decoder == "full" or avatar.has_small_decoder}  # fmt: skip
            frames, poses = subject.unseen
            return engine, measure_timed(avatar, poses, frames, rounds, variants)


def run(subject: Subject, steps: int, given: Path | None, is_quick: bool) -> dict[str, Any]:
    """Render every variant with the demonstration's tuning, and the modes with the other tunings."""
    frames, poses = subject.unseen
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, checkpoint) in enumerate(make_checkpoints(Path(folder), given, is_quick)):
            variants = render_variants(steps)
            if name != TUNED:
                variants = {name: options for name, options in variants.items() if name.startswith("mode")}
            print(f"# {name}", file=sys.stderr)
            built = build_engine(checkpoint, Path(folder) / f"{number}.engine", engine_options(is_quick)).folder
            with Avatar.load(built.path) as avatar:
                results[name] = measure(avatar, poses, frames, variants)
    return results


def to_markdown(result: dict[str, Any]) -> str:
    """Format one table for each tuning."""
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
    """Format one table for each person, with a row for each variant."""
    header = ("variant and what it approximates", "PSNR dB", "SSIM", "PSNR to exact dB", "s", "times faster",
              "times faster, inverted before")  # fmt: skip
    lines = [f"Unseen frames, PSNR and SSIM to the truth; the least of {result['rounds']} times, taken in turns; "
             f"{result['engine']['backend']} {result['engine']['precision']}, {result['machine']['processor']}, "
             f"{result['machine']['torch_threads']} threads."]  # fmt: skip
    for subject in result["subjects"]:
        name = subject["name"]
        lines += ["", f"## {name[0].upper()}{name[1:]}: {subject['num_frames']} frames", ""]
        lines += table(header, _timed_rows(subject["variants"]))
    return "\n".join(lines)


def _timed_rows(variants: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    exact = variants["exact"]
    for name, row in variants.items():
        near = "" if row["psnr_to_exact"] is None else f"{row['psnr_to_exact']:.2f}"
        yield (
            f"{name}: {', '.join(f'{key} {value}' for key, value in row['approximations'].items())}",
            f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", near, f"{row['seconds']:.1f}",
            f"{exact['seconds'] / row['seconds']:.2f}", f"{exact['seconds_inverted'] / row['seconds_inverted']:.2f}",
        )  # fmt: skip


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = new_parser(__doc__, "two frames, hardly tuned if no checkpoint is given, `torch`, 10 steps, one round")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--presets", action="store_true", help="the presets and what else may be left out: quality and time"
    )
    what.add_argument("--reuse", action="store_true", help="single approximations: quality and time")
    parser.add_argument("--people", type=int, default=0, help="of --presets: so many drawn people, too")
    parser.add_argument("--stride", type=int, default=1, help="every so many-th frame of the footage")
    parser.add_argument("--rounds", type=int, default=3, help="of --presets and --reuse, whose least time counts")
    options = parser.parse_args()
    if options.quick:
        options.stride, options.steps, options.rounds = QUICK_STRIDE, 10, 1
    footage = filmed_person(options.stride)
    result: dict[str, Any] = {"machine": machine()}
    if options.presets or options.reuse:
        result |= {"rounds": options.rounds, "subjects": []}
        for subject in (footage, *map(drawn_person, range(options.people))):
            given = options.checkpoint if subject is footage else None
            result["engine"], variants = run_timed(subject, given, options.rounds, options.reuse, options.quick)
            result["subjects"].append(
                {"name": subject.name, "num_frames": len(subject.unseen[0]), "variants": variants}
            )
        name, markdown = "reuse" if options.reuse else "presets", timed_to_markdown(result)
    else:
        tunings = run(footage, options.steps, options.checkpoint, options.quick)
        result |= {"num_frames": len(footage.unseen[0]), "steps": options.steps, "tunings": tunings}
        name, markdown = "quality", to_markdown(result)
    publish(name, result, markdown, options.json, options.quick)


if __name__ == "__main__":
    main()

"""How near the demonstration's render comes to the truth: by mode and option, and by what was tuned.

Bench: `python -m bench.quality [--quick] [--checkpoint demo/tuned.ckpt]` tunes on the demonstration's eight frames,
renders frames 46-119 by every variant and writes results/quality.json and .md. About an hour on two cores; --quick takes
every sixth frame.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import RESULTS, table, write_report
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.demo.footage import FRAMES, TARGET, TUNING, load_poses, video_path
from posecrafter_rt.demo.run import scores
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import MODES, RenderOptions
from posecrafter_rt.tuning import TuneOptions, base_size, load_clip, resolve_precision, tune

QUICK_STRIDE = 6
TUNED, OWN_DECODER, CLIP_SCOPE = "as the demonstration tunes", "the base's own decoder", "norm_scope clip"


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


def make_checkpoints(
    folder: Path, frames: np.ndarray, poses: PoseSequence, given: Path | None
) -> Iterator[tuple[str, Path]]:
    """The tunings that are compared, by name; `given` in place of the first."""
    device, precision = resolve_precision("auto", "auto")
    options = TuneOptions(frames=FRAMES, precision=precision, device=device)  # type: ignore[arg-type]
    if given is None:
        given = folder / "tuned.ckpt"
        tune(frames[TUNING], poses[TUNING], given, options)
    yield TUNED, given
    tuned = Checkpoint.load(given)
    tuned.tensors = {name: tensor for name, tensor in tuned.tensors.items() if not name.startswith("vae.")}
    tuned.save(folder / "own_decoder.ckpt")
    yield OWN_DECODER, folder / "own_decoder.ckpt"
    tune(frames[TUNING], poses[TUNING], folder / "clip.ckpt", replace(options, norm_scope="clip"))
    yield CLIP_SCOPE, folder / "clip.ckpt"


def run(steps: int, stride: int, given: Path | None) -> dict[str, Any]:
    """Render every variant with what the demonstration tunes, and the modes with the others."""
    frames, poses = load_clip(video_path(), load_poses(), base_size("embedded"), slice(None))
    window = slice(TARGET.start, TARGET.stop, stride)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, checkpoint) in enumerate(make_checkpoints(Path(folder), frames, poses, given)):
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


def main() -> None:
    """Parse the arguments, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json", help="where the result goes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    parser.add_argument("--quick", action="store_true", help="every sixth frame")
    arguments = parser.parse_args()
    stride = QUICK_STRIDE if arguments.quick else 1
    num_frames = len(range(TARGET.start, TARGET.stop, stride))
    result = {"machine": machine(), "steps": arguments.steps, "num_frames": num_frames,
              "tunings": run(arguments.steps, stride, arguments.checkpoint)}  # fmt: skip
    write_report(arguments.json, result, to_markdown(result))


if __name__ == "__main__":
    main()

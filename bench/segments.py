"""Measures what segments cost in quality, compared with the joint render, the truth, and segments merged at every step.

Bench: `python -m bench.segments [--json FILE] [--quick] [--checkpoint demo/tuned.ckpt]` renders frames 46-119 of the
demonstration's footage and writes results/segments.json and .md, or FILE and its .md. Merging at every step follows
ControlVideo's mode for long videos (`fused.py`). Without a checkpoint it tunes as the demonstration does. --quick
renders 24 frames in 4 steps after 10 steps of tuning, which says nothing about quality; it only prints unless --json is
given.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.footage import engine_options, load_footage, tune_person
from bench.fused import render_fused
from bench.report import new_parser, publish, quality_cell, table
from bench.runs import psnr_unless_equal
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import build_engine
from posecrafter_rt.demo.footage import TARGET
from posecrafter_rt.demo.run import scores
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.segments import split_clip

SPLITS = ((12, 4), (16, 4), (24, 4), (24, 0), (48, 4))  # frames per segment, and frames shared with each neighbour
ONCE, EVERY_STEP, WITH_KEY_FRAMES = "once", "at every step", "at every step, with key frames"
QUICK_FRAMES, QUICK_STEPS, QUICK_SPLITS = 24, 4, ((8, 2), (16, 4))
Row = dict[str, Any]


def seam_frames(num_frames: int, segment: int, overlap: int) -> list[int]:
    """Return the frames that two segments share, and the frame on either side of each seam."""
    near = [range(part.settled - 1, part.settled + overlap + 1)
            for part in split_clip(num_frames, segment, overlap)[:-1]]  # fmt: skip
    return sorted({frame for frames in near for frame in frames if frame < num_frames})


def jumps(frames: np.ndarray, truth: np.ndarray, at: list[int]) -> float:
    """Return the mean change to each of these frames, relative to the truth's: 1 is as lively as the truth."""

    def change(clip: np.ndarray) -> float:
        return float(np.mean([np.abs(clip[i].astype(int) - clip[i - 1]).mean() for i in at if i > 0]))

    return change(frames) / change(truth)


def render(avatar: Avatar, target: PoseSequence, options: RenderOptions, merged: str) -> tuple[np.ndarray, float]:
    """Return frames, and the seconds that they take once all network shapes are ready and the inversion is cached."""
    few_steps = replace(options, num_inference_steps=2, strength=1.0)  # fewer would do nothing and are refused
    for now in (few_steps, options) if avatar.last_report else (few_steps, options, options):  # the first one inverts
        start = time.perf_counter()
        if merged == ONCE:
            frames = avatar.render(target, now)
        else:
            frames = render_fused(avatar, target, now, with_key_frames=merged == WITH_KEY_FRAMES)
        seconds = time.perf_counter() - start
    assert avatar.last_report is not None and avatar.last_report.inversion_cached
    return frames, seconds


def compare(avatar: Avatar, target: PoseSequence, truth: np.ndarray, steps: int, splits: Any) -> list[Row]:
    """Return a row for the joint render, and one for each split and each way to merge it, if anything is merged."""
    rows, exact = [], None
    ways = [(segment, overlap, merged) for segment, overlap in splits for merged in (ONCE, EVERY_STEP, WITH_KEY_FRAMES)
            if merged == ONCE or (overlap and segment < len(target))]  # fmt: skip
    for segment, overlap, merged in ((None, 4, ONCE), *ways):
        options = RenderOptions(num_inference_steps=steps, segment=segment, overlap=overlap)
        frames, seconds = render(avatar, target, options, merged)
        row: Row = {"segment": segment, "overlap": overlap, "merged": merged, "seconds": seconds,
                    "num_segments": len(split_clip(len(target), segment, overlap)), **scores(frames, truth)}  # fmt: skip
        if exact is None:
            exact = frames
        else:
            at = seam_frames(len(target), segment, overlap)
            row |= {"psnr_to_exact": psnr_unless_equal(exact, frames), "time_ratio": seconds / rows[0]["seconds"]}
            if at:
                row |= {"seam_change": jumps(frames, truth, at), "seam_change_exact": jumps(exact, truth, at)}
        rows.append(row)
        print(row, flush=True)
    return rows


def markdown(document: Row) -> str:
    """Format the results as a table."""
    lines = [f"{document['num_frames']} unseen frames of the demonstration's footage, {document['steps']} steps, "
             f"{document['engine']}; {document['machine']['processor']}. Merged once: clean latents are blended, as this runtime "
             "does. Merged at every step: all segments' noise predictions are; with key frames: half and half with those of a "
             "video of each segment's middle frame, after ControlVideo's mode for long videos (`bench/fused.py`).",
             "Change at seams: mean difference between neighbouring frames there, over the truth's; in brackets that of "
             "the joint render at the same frames.", ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        truth = (f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")
        if row["segment"] is None:
            cells.append(("the whole clip", "", "", "", *truth, "", "1"))
            continue
        seams = f"{row['seam_change']:.2f} ({row['seam_change_exact']:.2f})" if "seam_change" in row else ""
        cells.append((f"{row['segment']}, {row['overlap']} shared", row["merged"] if row["overlap"] else "",
                      str(row["num_segments"]), quality_cell(row, "psnr_to_exact"), *truth, seams,
                      f"{row['time_ratio']:.2f}"))  # fmt: skip
    header = ("frames of a segment", "merged", "segments", "PSNR to the joint render", "PSNR to the truth", "SSIM to the truth",
              "change at seams", "time")  # fmt: skip
    return "\n".join(lines + table(header, cells))


def run(steps: int, num_frames: int | None, splits: Any, given: Path | None, is_quick: bool) -> Row:
    """Tune unless a checkpoint is given, build an engine, compare."""
    frames, poses = load_footage()
    target, truth = poses[TARGET][:num_frames], frames[TARGET][:num_frames]
    with tempfile.TemporaryDirectory(prefix="segments-") as folder:
        checkpoint = tune_person(Path(folder) / "tuned.ckpt", given, is_quick=is_quick)
        built = build_engine(checkpoint, Path(folder) / "tuned.engine", engine_options(is_quick)).folder
        with Avatar.load(built.path) as avatar:
            rows = compare(avatar, target, truth, steps, splits)
    return {"machine": machine(), "engine": f"{built.manifest['backend']} {built.manifest['precision']}", "steps": steps,
            "num_frames": len(target), "rows": rows}  # fmt: skip


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = new_parser(__doc__, "few frames and steps, hardly tuned")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    arguments = parser.parse_args()
    steps, num_frames, splits = (QUICK_STEPS, QUICK_FRAMES, QUICK_SPLITS) if arguments.quick else (50, None, SPLITS)
    document = run(arguments.steps or steps, num_frames, splits, arguments.checkpoint, arguments.quick)
    publish("segments", document, markdown(document), arguments.json, arguments.quick)


if __name__ == "__main__":
    main()

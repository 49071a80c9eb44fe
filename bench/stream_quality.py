"""Measures a stream's quality by steps, window and decoder, compared with the truth and with the joint render.

Bench: `python -m bench.stream_quality [ENGINE | --checkpoint demo/tuned.ckpt] [--json FILE] [--quick]` streams frames
46-119 of the demonstration's footage and writes results/stream_quality.json and .md, or FILE and its .md. Without an
engine or a checkpoint it tunes as the demonstration does. `--precision int8` builds an int8 engine and writes
results/stream_quality-int8.json and .md. --quick takes 16 frames, fewer streams and a joint render of 20 steps; it only
prints unless --json is given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.footage import engine_options, load_footage, tune_person
from bench.report import new_parser, publish, table
from bench.segments import jumps
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import build_engine
from posecrafter_rt.demo.footage import TARGET
from posecrafter_rt.demo.run import scores
from posecrafter_rt.engines import ONLY_OF
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.stream_options import StreamOptions

STEPS, WINDOWS = (1, 2, 4, 8), (0, 2, 8)
QUICK_FRAMES, QUICK_STEPS, QUICK_WINDOWS, QUICK_OFFLINE_STEPS = 16, (2, 4), (0, 4), 20
Row = dict[str, Any]


def stream_clip(
    avatar: Avatar, target: PoseSequence, options: StreamOptions, calibration: PoseSequence | None = None
) -> tuple[np.ndarray, Row]:
    """Stream every pose. Returns: frames (N, H, W, 3), and notes on the run.

    ms: the median time of a frame, without the first one, which may wait for what a backend prepares.
    """
    frames, seconds, notes = [], [], []
    with avatar.stream(options, calibration=calibration) as stream:
        for pose in target.keypoints:
            begin = time.perf_counter()
            frames.append(stream.step(pose))
            seconds.append(time.perf_counter() - begin)
            notes.append(stream.last)
    return np.stack(frames), {
        "ms": round(statistics.median(seconds[1:]) * 1e3, 2),
        "num_repeats": sum(note.is_repeat for note in notes),
        "num_resets": sum(note.reset for note in notes),
    }


def grade(frames: np.ndarray, truth: np.ndarray, offline: np.ndarray) -> Row:
    """Compare with both clips. change: of neighbouring frames, over the truth's: 1 is as lively, more may flicker."""
    to_offline = {f"{name}_to_offline": value for name, value in scores(frames, offline).items()}
    change = jumps(frames, truth, list(range(1, len(truth))))
    return {**scores(frames, truth), **to_offline, "change": round(change, 3)}


def compare(
    avatar: Avatar, target: PoseSequence, truth: np.ndarray, streams: list[StreamOptions], offline_steps: int
) -> list[Row]:
    """Return a row for the joint render, one for its reference frame repeated, and two for each stream.

    The second of the two chooses its reference by the poses that will come (Eq. 5), as the render does.
    """
    begin = time.perf_counter()
    offline = avatar.render(target, num_inference_steps=offline_steps)
    ms = (time.perf_counter() - begin) * 1e3 / len(target)
    assert avatar.last_report is not None
    repeated = np.repeat(avatar.frames[[avatar.last_report.reference_index]], len(truth), axis=0)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(row, file=sys.stderr)

    add({"what": "joint render", "ms": round(ms, 2), **grade(offline, truth, offline)})
    add({"what": "its reference frame, repeated", **grade(repeated, truth, offline)})
    for options in streams:
        for calibration in (None, target):
            frames, notes = stream_clip(avatar, target, options, calibration)
            add({"what": "stream", "steps": options.steps, "window": options.window, "decoder": options.decoder,
                 "unet_every": options.unet_every,
                 "is_calibrated": calibration is not None, **notes, **grade(frames, truth, offline)})  # fmt: skip
    return rows


def run(
    engine: Path | None, checkpoint: Path | None, streams: list[StreamOptions], num_frames: int | None,
    offline_steps: int, is_quick: bool, precision: str = "auto",
) -> Row:  # fmt: skip
    """Tune and build what is not given, and compare. precision: of an engine that is built here."""
    frames, poses = load_footage()
    target, truth = poses[TARGET][:num_frames], frames[TARGET][:num_frames]
    with tempfile.TemporaryDirectory(prefix="stream-quality-") as folder:
        if engine is None:
            checkpoint = tune_person(Path(folder) / "tuned.ckpt", checkpoint, is_quick=is_quick)
            build = replace(engine_options(is_quick and precision not in ONLY_OF), precision=precision)
            engine = build_engine(checkpoint, Path(folder) / "tuned.engine", build).folder.path
        with Avatar.load(engine) as avatar:
            manifest = avatar.folder.manifest
            rows = compare(avatar, target, truth, streams, offline_steps)
    return {"machine": machine(), "engine": {name: manifest[name] for name in ("backend", "precision")},
            "num_frames": len(target), "offline_steps": offline_steps, "rows": rows}  # fmt: skip


def name_of(row: Row) -> str:
    """Return a row's name in the table."""
    if row["what"] != "stream":
        return row["what"]
    steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
    decoder = f", {row['decoder']} decoder" if row["decoder"] else ""
    every = f", U-Net every {row['unet_every']}" if row.get("unet_every", 1) > 1 else ""
    return f"{steps}, window {row['window']}{every}{decoder}" + (", calibrated" if row["is_calibrated"] else "")


def markdown(document: Row) -> str:
    """Format the results as one table."""
    facts, engine = document["machine"], document["engine"]
    commit = f", commit {facts['commit']}" if "commit" in facts else ""
    lines = [
        f"{document['num_frames']} unseen frames of the demonstration's footage; joint render of "
        f"{document['offline_steps']} steps; {engine['backend']} {engine['precision']},",
        f"{facts.get('gpu', facts['processor'])}, {facts['torch_threads']} threads{commit}. Calibrated: the reference is",
        "chosen by Eq. 5 over these poses, as the joint render's is; else it is the medoid of the training poses.",
        "Change: mean difference between neighbouring frames, over the truth's. Repeats: poses that had not moved.", "",
    ]  # fmt: skip
    cells = []
    for row in document["rows"]:
        is_itself = row["what"] == "joint render"
        near = ("", "") if is_itself else (f"{row['psnr_to_offline']:.2f}", f"{row['ssim_to_offline']:.4f}")
        ms = f"{row['ms']:.1f}" if "ms" in row else ""
        notes = [str(row.get(name, "")) for name in ("num_repeats", "num_resets")]
        truth = (f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")
        cells.append((name_of(row), *truth, *near, f"{row['change']:.2f}", ms, *notes))
    header = ("frames", "PSNR to the truth", "SSIM", "PSNR to the joint render", "SSIM", "change", "ms a frame",
              "repeats", "resets")  # fmt: skip
    return "\n".join(lines + table(header, cells))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "few frames and streams")
    parser.add_argument("engine", type=Path, nargs="?", help="an engine of what `make demo` tunes")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    parser.add_argument("--precision", default="auto", help="of an engine that is built, as `build-engine` takes it")
    options = parser.parse_args(arguments)
    if options.engine is not None and options.precision != "auto":
        parser.error("--precision is of an engine that is built, and one was given")
    return options


def main() -> None:
    """Measure, print, write both files."""
    options = parse()
    steps, windows = (QUICK_STEPS, QUICK_WINDOWS) if options.quick else (STEPS, WINDOWS)
    streams = [StreamOptions(steps=s, window=w) for s in steps for w in windows]
    streams += [StreamOptions(steps=s, decoder="full") for s in steps]
    streams += [StreamOptions(steps=s, unet_every=every) for s in steps for every in (2, 4) if every <= s]
    num_frames, offline_steps = (QUICK_FRAMES, QUICK_OFFLINE_STEPS) if options.quick else (None, 50)
    document = run(options.engine, options.checkpoint, streams, num_frames, offline_steps, options.quick,
                   options.precision)  # fmt: skip
    name = "stream_quality" + (f"-{options.precision}" if options.precision != "auto" else "")
    publish(name, document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

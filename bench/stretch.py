"""Measures the seams that `render --replace` leaves, and how close the replaced frames come to the true ones.

Bench: `python -m bench.stretch [ENGINE | --checkpoint demo/tuned.ckpt] [--json FILE] [--preset NAME]` replaces
stretches of the demonstration's footage and writes results/stretch.json and .md, or FILE and its .md. Without an engine
or a checkpoint it tunes as the demonstration does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.footage import engine_options, load_footage, tune_person
from bench.report import new_parser, publish, table
from bench.runs import psnr
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import build_engine
from posecrafter_rt.demo.run import scores
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, FACE, PoseSequence
from posecrafter_rt.runtime.seams import draw_to_anchors

STRETCHES = ((50, 62), (64, 88), (92, 112), (47, 119))  # none of these frames was tuned on
Row = dict[str, Any]


def change(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean difference of two pictures or clips, in grey levels."""
    return float(np.abs(first.astype(int) - second).mean())


def face_psnr(frames: np.ndarray, truth: np.ndarray, poses: PoseSequence) -> float:
    """Return the PSNR in dB within the rectangles around the face's keypoints, where a person moves most."""
    cut: list[list[np.ndarray]] = [[], []]
    for index, keypoints in enumerate(poses):
        points = keypoints[FACE][keypoints[FACE, 2] >= CONFIDENCE_THRESHOLD, :2]
        (left, top), (right, bottom) = points.min(0).clip(0).astype(int), np.ceil(points.max(0)).astype(int) + 1
        for kept, clip in zip(cut, (frames, truth), strict=True):
            kept.append(clip[index, top:bottom, left:right].reshape(-1))
    return psnr(np.concatenate(cut[0]), np.concatenate(cut[1]))


def grade(mended: np.ndarray, footage: np.ndarray, poses: PoseSequence, start: int, stop: int) -> Row:
    """Return how close frames are to the truth, and their change from frame to frame at both seams and within."""
    truth = footage[start:stop]
    seams = (change(mended[0], footage[start - 1]), change(mended[-1], footage[stop]))
    row: Row = {"seam": float(np.mean(seams)), "inside": change(mended[1:], mended[:-1])}
    if np.array_equal(mended, truth):
        return row
    return {**row, **scores(mended, truth), "face_psnr": face_psnr(mended, truth, poses[start:stop])}


def compare(avatar: Avatar, footage: np.ndarray, poses: PoseSequence, start: int, stop: int, preset: str) -> list[Row]:
    """Grade a stretch's true frames, a crossfade of the frames beside it, its render, and this drawn to them."""
    before, after = footage[start - 1], footage[stop]
    rendered = avatar.render(poses[start - 1 : stop + 1], preset=preset)
    shares = (np.arange(1, stop - start + 1) / (stop - start + 1))[:, None, None, None]
    ways = {
        "the truth": footage[start:stop],
        "the frames beside it, crossfaded": np.uint8(np.rint((1 - shares) * before + shares * after)),
        "rendered": rendered[1:-1],
        "rendered, drawn to the frames beside it": np.stack(
            list(draw_to_anchors(rendered, stop - start, before, after))
        ),
    }
    rows = [{"start": start, "stop": stop, "way": way, **grade(frames, footage, poses, start, stop)}
            for way, frames in ways.items()]  # fmt: skip
    print(*rows, sep="\n", file=sys.stderr)
    return rows


def markdown(document: Row) -> str:
    """Format the results as a table."""
    lines = [f"Frames of the demonstration's footage that were not tuned on, preset {document['preset']}, {document['engine']}; "
             f"{document['machine']['processor']}. Change: mean difference of neighbouring frames in grey levels, at the "
             "two seams and within the stretch.", ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        near = [f"{row[name]:.{digits}f}" if name in row else ""
                for name, digits in (("psnr", 2), ("ssim", 4), ("face_psnr", 2))]  # fmt: skip
        cells.append(
            (f"{row['start']}:{row['stop']}, {row['way']}", *near, f"{row['seam']:.2f}", f"{row['inside']:.2f}")
        )
    header = ("stretch", "PSNR dB", "SSIM", "PSNR of the face dB", "change at the seams", "change within")
    return "\n".join(lines + table(header, cells))


def run(options: argparse.Namespace) -> Row:
    """Tune and build what is not given, and compare."""
    footage, poses = load_footage()
    stretches, preset, engine = STRETCHES, options.preset, options.engine
    if options.quick:
        stretches, preset = STRETCHES[:1], "fast"
    with tempfile.TemporaryDirectory(prefix="stretch-") as folder:
        if engine is None:
            checkpoint = tune_person(Path(folder) / "tuned.ckpt", options.checkpoint, is_quick=options.quick)
            built = build_engine(checkpoint, Path(folder) / "tuned.engine", engine_options(options.quick))
            engine = built.folder.path
        with Avatar.load(engine) as avatar:
            manifest = avatar.folder.manifest
            rows = [row for stretch in stretches for row in compare(avatar, footage, poses, *stretch, preset)]
    return {
        "machine": machine(),
        "engine": f"{manifest['backend']} {manifest['precision']}",
        "preset": preset,
        "rows": rows,
    }


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = new_parser(__doc__, "one stretch by the preset fast, of a person who is hardly tuned unless one is given")
    parser.add_argument("engine", type=Path, nargs="?", help="an engine of the demonstration's person")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    parser.add_argument("--preset", default="exact")
    arguments = parser.parse_args()
    document = run(arguments)
    publish("stretch", document, markdown(document), arguments.json, arguments.quick)


if __name__ == "__main__":
    main()

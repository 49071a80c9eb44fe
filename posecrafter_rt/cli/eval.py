"""`posecrafter-rt eval`: how close a rendered video is to the true one, and to the poses that it should follow.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from posecrafter_rt.cli.arguments import AsJson, parse_range
from posecrafter_rt.cli.output import print_json, print_table
from posecrafter_rt.errors import BackendUnavailable, PoseError, VideoError
from posecrafter_rt.poses.keypoints import PoseSequence

app = typer.Typer()


@app.command()
def evaluate(
    rendered: Annotated[Path, typer.Argument(help="The rendered video, or a folder of images.", show_default=False)],
    truth: Annotated[Path, typer.Argument(help="The true video, or a folder of images.", show_default=False)],
    frame_range: Annotated[
        str | None, typer.Option("--range", metavar="START:END", help="The frames of TRUTH that were rendered.")
    ] = None,
    poses: Annotated[
        Path | None, typer.Option(help="The poses of TRUTH's frames: adds MSE-P, the error of the pose.")
    ] = None,
    rendered_poses: Annotated[
        Path | None, typer.Option(help="The poses in RENDERED; without it they are extracted.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure PSNR and SSIM of RENDERED against TRUTH, frame by frame, at RENDERED's size; with --poses MSE-P too.

    A TRUTH of another size is scaled to cover it and cut around the centre, as the training frames are.
    """
    window = parse_range(frame_range)
    if rendered_poses is not None and poses is None:
        raise typer.BadParameter("--rendered-poses is compared with --poses, which is missing")
    from posecrafter_rt.evaluate.metrics import mse_p
    from posecrafter_rt.framing import transform_keypoints
    from posecrafter_rt.poses.shown import shown_poses
    from posecrafter_rt.video_io import video_size

    height, width = video_size(rendered)
    # Poses come first: their errors should show before both videos are measured.
    target = None if poses is None else shown_poses(_read_poses(poses, truth), window, poses)
    found = None if rendered_poses is None else _read_poses(rendered_poses, rendered)
    num_frames = _count_pairs(rendered, truth, window)
    _check_lengths(num_frames, target, found)
    if target is not None:
        found = found or _extract(rendered)
    result = {"frames": num_frames, "height": height, "width": width}
    scores = _measure(rendered, truth, (height, width), window)
    if target is not None and found is not None:
        scores["mse_p"] = mse_p(*(transform_keypoints(one, (height, width)) for one in (found, target)))
    if as_json:
        print_json(result | scores)
        return
    rows = [
        ("frames", f"{num_frames} of {height}x{width}"),
        ("PSNR", f"{scores['psnr']:.2f} dB"),
        ("SSIM", f"{scores['ssim']:.4f}"),
    ]
    print_table(rows + ([("MSE-P", f"{scores['mse_p']:.3g}")] if poses is not None else []))


def _read_poses(path: Path, video: Path) -> PoseSequence:
    """Read the poses of a video's frames. Raises: PoseError if their canvas has another shape than the frames, too."""
    from posecrafter_rt.framing import check_canvas
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.video_io import video_size

    size = video_size(video)
    poses = read_openpose(path, allow_missing=True, canvas=size)
    check_canvas(video, size, poses.canvas)
    return poses


def _count_pairs(rendered: Path, truth: Path, window: slice) -> int:
    """Return how many frames both have. Counting is quick; measuring would be wasted on videos of different lengths.

    Raises: VideoError if the lengths differ.
    """
    from posecrafter_rt.video_io import stream_video

    num_frames = sum(1 for _ in stream_video(rendered)[0])
    num_true = sum(1 for _ in stream_video(truth, start=window.start or 0, stop=window.stop)[0])
    if num_frames != num_true:
        raise VideoError(
            f"{rendered} has {num_frames} frames, {truth} has {num_true} in that range",
            hint="name the frames of the true video that were rendered: --range START:END",
        )
    return num_frames


def _check_lengths(num_frames: int, target: PoseSequence | None, found: PoseSequence | None) -> None:
    """Raise PoseError unless the poses that are given are as many as the frames."""
    for name, given in (("true", target), ("rendered", found)):
        if given is not None and len(given) != num_frames:
            raise PoseError(
                f"there are {len(given)} {name} poses for {num_frames} frames",
                hint="give one pose for each frame that is compared",
            )


def _extract(rendered: Path) -> PoseSequence:
    """Return the poses in a video. An error says how to extract them with options, which this command has not."""
    from posecrafter_rt.poses.extract import extract_poses

    try:
        return extract_poses(rendered)
    except (BackendUnavailable, PoseError) as error:
        error.hint = (
            f"posecrafter-rt poses extract {shlex.quote(str(rendered))} -o r.json, which takes --detector, "
            "--weights and --python; then add --rendered-poses r.json"
        )
        raise


def _measure(rendered: Path, truth: Path, size: tuple[int, int], window: slice) -> dict[str, float]:
    """Return the means of PSNR and SSIM over the frames; one pair is in memory at a time."""
    from posecrafter_rt.evaluate.metrics import psnr, ssim
    from posecrafter_rt.video_io import stream_video

    frames = stream_video(rendered)[0]
    true_frames = stream_video(truth, size=size, start=window.start or 0, stop=window.stop)[0]
    scores: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for frame, true_frame in zip_longest(frames, true_frames):
        if frame is None or true_frame is None:
            raise VideoError(
                f"{rendered} or {truth} has changed since its frames were counted",
                hint="run the same command again once nothing writes to them any more",
            )
        scores["psnr"].append(psnr(frame[None], true_frame[None]))
        scores["ssim"].append(ssim(frame[None], true_frame[None]))
    return {name: float(np.mean(values)) for name, values in scores.items()}

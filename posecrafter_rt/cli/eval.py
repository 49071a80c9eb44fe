"""`posecrafter-rt eval`: how near a rendered video is to the true one, and to the poses that it was to follow.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posecrafter_rt.cli.arguments import AsJson, parse_range, shown_poses
from posecrafter_rt.cli.output import print_json, print_table
from posecrafter_rt.errors import VideoError

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
    from posecrafter_rt.evaluate.metrics import mse_p, psnr, ssim
    from posecrafter_rt.framing import transform_keypoints
    from posecrafter_rt.poses.extract import extract_poses
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.video_io import read_video, video_size

    frames = read_video(rendered).frames
    height, width = frames.shape[1:3]
    true_frames = read_video(truth, size=(height, width), start=window.start or 0, stop=window.stop).frames
    if len(frames) != len(true_frames):
        raise VideoError(
            f"{rendered} has {len(frames)} frames, {truth} has {len(true_frames)} in that range",
            hint="name the frames of the true video that were rendered: --range START:END",
        )
    result = {"frames": len(frames), "height": height, "width": width}
    scores = {"psnr": psnr(frames, true_frames), "ssim": ssim(frames, true_frames)}
    if poses is not None:
        target = shown_poses(read_openpose(poses, allow_missing=True, canvas=video_size(truth)), window, poses)
        if rendered_poses is None:
            found = extract_poses(rendered)
        else:
            found = read_openpose(rendered_poses, allow_missing=True, canvas=(height, width))
        scores["mse_p"] = mse_p(*(transform_keypoints(one, (height, width)) for one in (found, target)))
    if as_json:
        print_json(result | scores)
        return
    rows = [
        ("frames", f"{len(frames)} of {height}x{width}"),
        ("PSNR", f"{scores['psnr']:.2f} dB"),
        ("SSIM", f"{scores['ssim']:.4f}"),
    ]
    print_table(rows + ([("MSE-P", f"{scores['mse_p']:.3g}")] if poses is not None else []))

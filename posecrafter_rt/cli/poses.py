"""`posecrafter-rt poses extract` and `poses preview`: keypoints from a video, and pictures of them.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from posecrafter_rt.atomic import refuse_overwrite
from posecrafter_rt.cli.arguments import parse_size
from posecrafter_rt.cli.output import step_progress
from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import BODY, CONFIDENCE_THRESHOLD, FACE, FEET, LEFT_HAND, RIGHT_HAND, PoseSequence

app = typer.Typer(help="Keypoints: from a video, and to look at.", no_args_is_help=True)

_PARTS = {"body": BODY, "feet": FEET, "face": FACE, "left hand": LEFT_HAND, "right hand": RIGHT_HAND}
_PREVIEW_SHORT_SIDE_PX = 512
_SHEET_COLUMNS = 8
_FALLBACK_FPS = 25.0


@app.command()
def extract(  # noqa: PLR0913 - one argument for each option
    video: Annotated[Path, typer.Argument(help="The video of one person.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The pose file (OpenPose JSON) to write.")],
    detector: Annotated[str, typer.Option(help="dwpose, mediapipe, or auto: the first that can run.")] = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="Folder with yolox_l.onnx and dw-ll_ucoco_384.onnx; else they are downloaded.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (DWPose only).")] = "cpu",
    python: Annotated[
        Path | None, typer.Option(help="Interpreter of the environment that has the detector; else this one.")
    ] = None,
    person: Annotated[
        int | None, typer.Option(help="Which of several people in the first frame, from 0; else the largest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Detect whole-body keypoints in every frame of VIDEO."""
    from posecrafter_rt.poses.extract import extract_poses

    # Before the minutes of detection, not after them.
    refuse_overwrite(output, force)
    with step_progress("detecting") as on_step:
        poses = extract_poses(
            video,
            detector=detector,
            weights=weights,
            device=device,
            python=python,
            person=person,
            progress=lambda done, total: on_step(done, total, ""),
        )
    poses.save(output, force=force)
    _report_extracted(poses, output, as_json)


@app.command()
def preview(  # noqa: PLR0913 - one argument for each option
    poses_path: Annotated[Path, typer.Argument(metavar="POSES", help="A pose file or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A video (.mp4) or a contact sheet (.png).")],
    video: Annotated[Path | None, typer.Option(help="The video they come from, shown beside them.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Picture size; else the canvas times a whole number.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second; else the pose file's.", min=0.1)] = None,
    person: Annotated[int | None, typer.Option(help="Which of several people, from 0; else the largest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw POSES as the network sees them, into a video or a contact sheet."""
    if output.suffix.lower() not in (".mp4", ".png"):
        raise typer.BadParameter(f"{output.name} is neither .mp4 nor .png", param_hint="--output")
    refuse_overwrite(output, force)
    from posecrafter_rt.poses.openpose_json import read_openpose

    # A preview is where one looks for the frames that lack the person.
    poses = read_openpose(poses_path, person=person, allow_missing=True)
    height, width = parse_size(size) or _preview_size(poses.canvas)
    frames = None
    if video:
        from posecrafter_rt.framing import transform_keypoints

        frames = _video_frames(video, len(poses), (height, width))
        # Cut around the centre as the frames are, so that both still show the same place.
        poses = transform_keypoints(poses, (height, width))
    fps = fps or poses.fps or _FALLBACK_FPS
    if output.suffix.lower() == ".png":
        _write_sheet(poses, frames, (height, width), output, force)
    else:
        _write_video(poses, frames, (height, width), output, fps, force)
    record = {"output": str(output), "frames": len(poses), "height": height, "width": width, "fps": fps}
    typer.echo(json.dumps(record) if as_json else f"{output}: {len(poses)} poses, drawn at {width} x {height}")


def _report_extracted(poses: PoseSequence, output: Path, as_json: bool) -> None:
    usable = poses.keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    shares = {name: round(float(usable[:, points].mean()), 3) for name, points in _PARTS.items()}
    missing = np.flatnonzero(~(poses.keypoints[..., 2] > 0).any(axis=1)).tolist()
    height, width = poses.canvas
    record: dict[str, Any] = {"output": str(output), "frames": len(poses), "height": height, "width": width}
    record |= {"fps": poses.fps, "usable": shares, "frames_without_person": missing}
    if missing:
        message = f"warning: {len(missing)} of {len(poses)} frames do not show the person: {_abridged(missing)}"
        typer.echo(f"{message}\nhint: cut them out of the video, or choose a person with --person", err=True)
    if as_json:
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{output}: {len(poses)} frames, {width} x {height}")
    typer.echo("usable points: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _abridged(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def _preview_size(canvas: tuple[int, int]) -> tuple[int, int]:
    multiple = max(1, -(-_PREVIEW_SHORT_SIDE_PX // min(canvas)))
    return canvas[0] * multiple, canvas[1] * multiple


def _video_frames(video: Path, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    from posecrafter_rt.video_io import read_video

    frames = read_video(video, size=size, stop=num_frames).frames
    if len(frames) < num_frames:
        raise PoseError(
            f"{video} has {len(frames)} frames, but there are {num_frames} poses",
            hint="give the video that the poses come from",
        )
    return frames


def _write_video(
    poses: PoseSequence, frames: np.ndarray | None, size: tuple[int, int], output: Path, fps: float, force: bool
) -> None:
    from posecrafter_rt.poses.draw import draw_pose
    from posecrafter_rt.video_io import VideoWriter

    with VideoWriter(output, fps, force=force) as writer, step_progress("drawing") as on_step:
        for index, keypoints in enumerate(poses):
            picture = draw_pose(keypoints, poses.canvas, size)
            writer.write(picture if frames is None else np.concatenate([frames[index], picture], axis=1))
            on_step(index + 1, len(poses), "")


def _write_sheet(
    poses: PoseSequence, frames: np.ndarray | None, size: tuple[int, int], output: Path, force: bool
) -> None:
    from posecrafter_rt.poses.draw import draw_pose
    from posecrafter_rt.video_io import contact_sheet, write_png

    chosen = np.unique(np.linspace(0, len(poses) - 1, _SHEET_COLUMNS).round().astype(int))
    drawn = np.stack([draw_pose(poses.keypoints[index], poses.canvas, size) for index in chosen])
    write_png(output, contact_sheet([drawn] if frames is None else [frames[chosen], drawn]), force=force)

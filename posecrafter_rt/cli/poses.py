"""`posecrafter-rt poses`: extracts keypoints from a video, draws them, fits another person's to the tuned one, edits.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer

from posecrafter_rt.atomic import refuse_among, refuse_in_engine, refuse_overwrite, refuse_sources
from posecrafter_rt.cli.arguments import AsJson, Force, parse_range, parse_size
from posecrafter_rt.cli.output import step_progress
from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import (
    BODY,
    CONFIDENCE_THRESHOLD,
    DEFAULT_FPS,
    FACE,
    FEET,
    LEFT_HAND,
    RIGHT_HAND,
    PoseSequence,
)
from posecrafter_rt.poses.shown import abridged

app = typer.Typer(help="Keypoints: extract, preview, retarget, edit.", no_args_is_help=True)

_PARTS = {"body": BODY, "feet": FEET, "face": FACE, "left hand": LEFT_HAND, "right hand": RIGHT_HAND}
_PREVIEW_SHORT_SIDE_PX = 512

_Canvas = Annotated[
    str | None,
    typer.Option("--canvas", metavar="HxW", help="Size of the picture that POSES are of, where they do not say."),
]
_Edit = Callable[[PoseSequence], PoseSequence]


@app.command()
def extract(  # noqa: PLR0913 - one argument for each option
    video: Annotated[Path, typer.Argument(help="The video of one person.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The pose file (OpenPose JSON) to write.")],
    detector: Annotated[str, typer.Option(help="dwpose, mediapipe, or auto: the first that can run.")] = "auto",
    weights: Annotated[
        Path | None,
        typer.Option(help="DWPose's folder with yolox_l.onnx and dw-ll_ucoco_384.onnx; else they are downloaded."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (DWPose only).")] = "cpu",
    python: Annotated[
        Path | None, typer.Option(help="Interpreter of the environment that has the detector; else this one.")
    ] = None,
    person: Annotated[
        int | None, typer.Option(help="Which of several people in the first frame, from 0; else the largest.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Detect whole-body keypoints in every frame of VIDEO."""
    from posecrafter_rt.poses.extract import extract_poses

    # Before the minutes of detection, not after them.
    refuse_overwrite(output, force)
    refuse_sources(output, video)
    with step_progress("detecting") as on_step:

        def told(done: int, total: int, name: str) -> None:
            nonlocal detector
            detector = name
            on_step(done, total, name)

        poses = extract_poses(
            video, detector=detector, weights=weights, device=device, python=python, person=person, progress=told
        )
    poses.save(output, force=force)
    _report_extracted(poses, output, detector, as_json)


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
    canvas: _Canvas = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw POSES as the network sees them, into a video or a contact sheet."""
    if output.suffix.lower() not in (".mp4", ".png"):
        raise typer.BadParameter(f"{output.name} is neither .mp4 nor .png", param_hint="--output")
    refuse_overwrite(output, force)
    from posecrafter_rt.framing import tile_size, transform_keypoints
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.video_io import IMAGE_SUFFIXES, stream_video, video_size

    refuse_sources(output, poses_path, *((video, *_files(video, *IMAGE_SUFFIXES)) if video else ()))
    if video and output.suffix.lower() in IMAGE_SUFFIXES:
        refuse_among(output, video, "images")

    picture_size = parse_size(canvas) or (video_size(video) if video else None)
    # People look at a preview to find the frames that lack the person.
    poses = read_openpose(poses_path, person=person, canvas=picture_size, allow_missing=True)
    height, width = parse_size(size) or _preview_size(poses.canvas)
    # Cut around the centre, as `render` and the video's frames are.
    poses = transform_keypoints(poses, (height, width))
    frames = None
    if video:
        if output.suffix.lower() == ".mp4":  # decoding is fast; drawing for a short video would be wasted
            for _ in _one_a_pose(stream_video(video, stop=len(poses))[0], video, len(poses)):
                pass
        frames = _one_a_pose(stream_video(video, size=(height, width), stop=len(poses))[0], video, len(poses))
    fps = fps or poses.fps or DEFAULT_FPS
    if output.suffix.lower() == ".png":
        _write_sheet(poses, frames, (height, width), output, force)
        height, width = tile_size((height, width))
    else:
        _write_video(poses, frames, (height, width), output, fps, force)
    record = {"output": str(output), "frames": len(poses), "height": height, "width": width, "fps": fps}
    typer.echo(json.dumps(record) if as_json else f"{output}: {len(poses)} poses, drawn at {width} x {height}")


def _files(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files that are read if a folder is given; none if it is a file."""
    return [file for file in folder.iterdir() if file.suffix.lower() in suffixes] if folder.is_dir() else []


@app.command()
def retarget(
    poses_path: Annotated[
        Path, typer.Argument(metavar="POSES", help="Another person's poses: a file or a folder of them.")
    ],
    to: Annotated[
        Path, typer.Option("--to", help="Who was tuned: their poses, a tuned.ckpt or an engine folder.", metavar="WHO")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The pose file (OpenPose JSON) to write.")],
    person: Annotated[
        int | None, typer.Option(help="Which of several people in POSES, from 0; else the largest.")
    ] = None,
    canvas: _Canvas = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit the movement in POSES to the proportions and the place of the person who was tuned."""
    refuse_overwrite(output, force)
    refuse_sources(output, poses_path, *_files(poses_path, ".json"), to, *_files(to, ".json", ".safetensors"))
    refuse_among(output, poses_path, "poses")
    if _is_engine(to):
        refuse_in_engine(output, to)
    refuse_among(output, to, "poses")
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.poses.retarget import find_ratios
    from posecrafter_rt.poses.retarget import retarget as fit_movement

    poses = read_openpose(poses_path, person=person, canvas=parse_size(canvas), allow_missing=True)
    tuned = _poses_of(to)
    fitted = fit_movement(poses, tuned)
    fitted.save(output, force=force)
    ratios = find_ratios(poses, tuned)
    scales = {"body": ratios.body, "face_width": ratios.face[0], "face_height": ratios.face[1], "hands": ratios.hands}
    outside = _share_outside(fitted)
    if as_json:
        rounded = {name: round(scale, 4) for name, scale in scales.items()}
        typer.echo(json.dumps({**_described(fitted, output), "scale": rounded, "outside": round(outside, 3)}))
        return
    typer.echo(_summary(fitted, output))
    typer.echo("scaled by: " + ", ".join(f"{name.replace('_', ' ')} {scale:.3g}" for name, scale in scales.items()))
    if outside >= 0.005:
        typer.echo(f"outside the picture: {outside:.0%} of the usable points")


@app.command()
def edit(  # noqa: PLR0913 - one argument for each option
    poses_path: Annotated[Path, typer.Argument(metavar="POSES", help="A pose file or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The pose file (OpenPose JSON) to write.")],
    turn_head: Annotated[
        list[str] | None,
        typer.Option(metavar="DEGREES@START:END", help="Turn the head, -60 to 60; above 0 to the picture's right."),
    ] = None,
    blink: Annotated[list[str] | None, typer.Option(metavar="START:END", help="Close both eyes and open them.")] = None,
    wave: Annotated[
        list[str] | None,
        typer.Option(metavar="SIDE@START:END", help="Wave with the person's own left or right forearm."),
    ] = None,
    fill: Annotated[
        int,
        typer.Option(
            min=0, metavar="FRAMES", help="Fill in points that are not seen, or hardly, for so many frames at most."
        ),
    ] = 0,
    person: Annotated[int | None, typer.Option(help="Which of several people, from 0; else the largest.")] = None,
    canvas: _Canvas = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Script what the person in POSES does; each edit may be given several times, and END is not in its range.

    Gaps are filled first; then heads are turned, eyes blink, arms wave. All other frames stay as they are. With
    --person or --canvas there need be no edit: what is written is that person alone, or says how large its picture is.
    """
    edits = [*map(_parse_turn, turn_head or ()), *map(_parse_blink, blink or ()), *map(_parse_wave, wave or ())]
    if not edits and not fill and person is None and canvas is None:
        raise typer.BadParameter("nothing to edit: give --turn-head, --blink, --wave, --fill, --person or --canvas")
    refuse_overwrite(output, force)
    refuse_sources(output, poses_path, *_files(poses_path, ".json"))
    refuse_among(output, poses_path, "poses")
    from posecrafter_rt.poses.openpose_json import read_openpose

    poses = original = read_openpose(poses_path, person=person, canvas=parse_size(canvas), allow_missing=True)
    if fill:
        from posecrafter_rt.poses.fill import fill_gaps

        poses = fill_gaps(poses, fill)
    for apply in edits:
        poses = apply(poses)
    poses.save(output, force=force)
    changed = np.flatnonzero((poses.keypoints != original.keypoints).any(axis=(1, 2))).tolist()
    if as_json:
        typer.echo(json.dumps({**_described(poses, output), "changed_frames": changed}))
        return
    typer.echo(f"{_summary(poses, output)}; {len(changed)} frames changed")


def _parse_turn(text: str) -> _Edit:
    from posecrafter_rt.poses.edit import turn_head

    degrees, frames = _parse_edit(text, "DEGREES", "20")
    try:
        return partial(turn_head, frames=frames, degrees=float(degrees))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: {degrees!r} is no number of degrees; write such as 20@30:60") from None


def _parse_blink(text: str) -> _Edit:
    from posecrafter_rt.poses.edit import blink

    return partial(blink, frames=parse_range(text))


def _parse_wave(text: str) -> _Edit:
    from posecrafter_rt.poses.edit import Side, wave

    side, frames = _parse_edit(text, "SIDE", "left")
    if side not in get_args(Side):
        raise typer.BadParameter(f"{text!r}: {side!r} is no side; write such as left@30:90")
    return partial(wave, frames=frames, side=cast(Side, side))


def _parse_edit(text: str, name: str, example: str) -> tuple[str, slice]:
    """Parse `20@30:60` → `20` and frames 30 to 59."""
    value, at, frames = text.partition("@")
    if not at:
        raise typer.BadParameter(f"{text!r} does not say which frames; write {name}@START:END, such as {example}@30:60")
    return value, parse_range(frames)


def _poses_of(path: Path) -> PoseSequence:
    """Return the poses of who was tuned, from a pose file, a folder of them, a tuned.ckpt or an engine folder."""
    if _is_engine(path):
        from posecrafter_rt.engine_training import read_training
        from posecrafter_rt.engines.folder import open_folder

        return read_training(open_folder(path).path)[1]
    if path.is_file() and path.suffix.lower() != ".json":
        from posecrafter_rt.checkpoint import Checkpoint

        return Checkpoint.load(path).poses
    from posecrafter_rt.poses.openpose_json import read_openpose

    return read_openpose(path, allow_missing=True)


def _is_engine(path: Path) -> bool:
    from posecrafter_rt.engines.manifest import MANIFEST

    return (path / MANIFEST).is_file()


def _share_outside(poses: PoseSequence) -> float:
    """Return the share of the usable points that lies outside the canvas."""
    usable = poses.keypoints[poses.keypoints[..., 2] >= CONFIDENCE_THRESHOLD, :2]
    height, width = poses.canvas
    is_outside = ((usable < -0.5) | (usable > (width - 0.5, height - 0.5))).any(axis=1)
    return float(is_outside.mean()) if len(usable) else 0.0


def _described(poses: PoseSequence, output: Path) -> dict[str, Any]:
    height, width = poses.canvas
    return {"output": str(output), "frames": len(poses), "height": height, "width": width, "fps": poses.fps}


def _summary(poses: PoseSequence, output: Path) -> str:
    height, width = poses.canvas
    return f"{output}: {len(poses)} frames, {width} x {height}"


def _report_extracted(poses: PoseSequence, output: Path, detector: str, as_json: bool) -> None:
    usable = poses.keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    shares = {name: round(float(usable[:, points].mean()), 3) for name, points in _PARTS.items()}
    missing = np.flatnonzero(~usable.any(axis=1)).tolist()
    record = {**_described(poses, output), "detector": detector, "usable": shares, "frames_without_person": missing}
    if missing:
        message = f"warning: {len(missing)} of {len(poses)} frames do not show the person: {abridged(missing)}"
        typer.echo(f"{message}\nhint: cut them out of the video, or choose a person with --person", err=True)
    if as_json:
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{_summary(poses, output)}, detected by {detector}")
    typer.echo("usable points: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _preview_size(canvas: tuple[int, int]) -> tuple[int, int]:
    multiple = max(1, -(-_PREVIEW_SHORT_SIDE_PX // min(canvas)))
    return canvas[0] * multiple, canvas[1] * multiple


def _one_a_pose(frames: Iterator[np.ndarray], video: Path, num_frames: int) -> Iterator[np.ndarray]:
    """Yield a video's frames as they are decoded. Raises: PoseError at the end if they were fewer than `num_frames`."""
    count = 0
    for frame in frames:
        count += 1
        yield frame
    if count < num_frames:
        raise PoseError(
            f"{video} has {count} frames, but there are {num_frames} poses",
            hint="give the video that the poses come from",
        )


def _write_video(
    poses: PoseSequence,
    frames: Iterator[np.ndarray] | None,
    size: tuple[int, int],
    output: Path,
    fps: float,
    force: bool,
) -> None:
    from posecrafter_rt.poses.draw import draw_pose
    from posecrafter_rt.video_io import VideoWriter

    with VideoWriter(output, fps, force=force) as writer, step_progress("drawing") as on_step:
        for index, keypoints in enumerate(poses):
            picture = draw_pose(keypoints, poses.canvas, size)
            writer.write(picture if frames is None else np.concatenate([next(frames), picture], axis=1))
            on_step(index + 1, len(poses), "")


def _write_sheet(
    poses: PoseSequence, frames: Iterator[np.ndarray] | None, size: tuple[int, int], output: Path, force: bool
) -> None:
    from posecrafter_rt.framing import contact_sheet, shown_in_sheet
    from posecrafter_rt.poses.draw import draw_pose
    from posecrafter_rt.video_io import write_png

    chosen = shown_in_sheet(len(poses))
    drawn = np.stack([draw_pose(poses.keypoints[index], poses.canvas, size) for index in chosen])
    shown = [] if frames is None else [np.stack([frame for index, frame in enumerate(frames) if index in chosen])]
    write_png(output, contact_sheet([*shown, drawn]), force=force)

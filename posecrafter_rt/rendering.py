"""A render as files: the video, a contact sheet, and report.json beside it.

Layer 7: around `avatar`, for the command line and the demonstration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt import __version__
from posecrafter_rt.atomic import atomic_path, refuse_overwrite, sha256_json
from posecrafter_rt.avatar import Avatar, OnStep
from posecrafter_rt.framing import contact_sheet, shown_in_sheet, transform_keypoints
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.partial import open_partial, read_state
from posecrafter_rt.video_io import VideoWriter, write_png

DEFAULT_FPS = 25.0


def output_paths(video: Path) -> tuple[Path, Path, Path]:
    """The video, its contact sheet and its report."""
    return video, video.with_suffix(".png"), video.with_name(f"{video.stem}.report.json")


def partial_path(video: Path) -> Path:
    """The folder that holds the finished segments of an unfinished render."""
    return video.with_name(f"{video.name}.partial")


def refuse_outputs(video: Path, force: bool) -> None:
    """Raise OutputExists if any of the three is there and `force` is false.

    What a killed render had already moved to its place does not count: the same command is about to finish it.
    """
    folder = partial_path(video)
    state = read_state(folder)
    is_moving = state is not None and state["staged"]
    for path in output_paths(video):
        if not is_moving or (folder / path.name).exists():
            refuse_overwrite(path, force)


def render_to_files(
    avatar: Avatar,
    target: PoseSequence,
    video: Path,
    options: RenderOptions,
    *,
    fps: float | None = None,
    force: bool = False,
    on_step: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Render and write the video, the contact sheet and the report; returns the report.

    No more frames are held than an engine decodes at once and the contact sheet shows. With `options.segment`, finished
    segments are kept in `partial_path(video)`: the same call goes on from them, and gives the bytes of an unbroken run.
    Raises: OutputExists before any work; whatever `Avatar.render`, `VideoWriter` and `open_partial` raise. An interrupted
        render leaves none of the three.
    """
    refuse_outputs(video, force)
    fps = fps or target.fps or DEFAULT_FPS
    VideoWriter(video, fps, force=True)  # refuses what is no name of a video before any work

    def told(stage: str, step: int, steps: int) -> None:
        if on_step is not None:
            on_step(step, steps, stage)

    if options.segment is not None:
        return _render_resumably(avatar, target, video, avatar.resolve(options), fps, force, told)
    frames = avatar.iter_render(target, options, on_step=told)
    return _write_outputs(avatar, target, frames, output_paths(video), fps)


def _render_resumably(
    avatar: Avatar, target: PoseSequence, video: Path, options: RenderOptions, fps: float, force: bool, told: OnStep
) -> dict[str, Any]:
    outputs = output_paths(video)
    fingerprint = _fingerprint(avatar, target, options, fps)
    with open_partial(partial_path(video), fingerprint, outputs, force=force) as partial:
        if not partial.holds(outputs):
            if options.segment == "auto" and partial.choice is None:
                partial.fix(avatar.choose_segment(len(target), options))
            segments = avatar.iter_segments(target, options, choice=partial.choice, finished=partial.reports(),
                                            carried=partial.carried(), on_step=told)  # fmt: skip
            for segment in segments:
                partial.save(segment.frames, segment.carried, segment.report)
            staged = output_paths(partial.folder / video.name)
            _write_outputs(avatar, target, partial.frames(), staged, fps)
        partial.publish(outputs)
    report: dict[str, Any] = json.loads(outputs[2].read_text(encoding="utf-8"))
    return report


def _fingerprint(avatar: Avatar, target: PoseSequence, options: RenderOptions, fps: float) -> str:
    """Of all that the bytes of a video depend on; the engine's seal covers weights, backend and libraries."""
    return sha256_json({
        "engine": avatar.folder.manifest["seal"], "package": __version__, "options": vars(options), "fps": fps,
        "poses": sha256(target.keypoints.tobytes()).hexdigest(), "canvas": target.canvas,
    })  # fmt: skip


def _write_outputs(
    avatar: Avatar, target: PoseSequence, frames: Iterable[np.ndarray], outputs: tuple[Path, Path, Path], fps: float
) -> dict[str, Any]:
    """Write the three files, replacing what is there; returns the report, of a render that ends with its frames."""
    video, sheet_path, report_path = outputs
    shown = shown_in_sheet(len(target))
    kept = []
    with VideoWriter(video, fps, force=True) as writer:
        for index, frame in enumerate(frames):
            writer.write(frame)
            if index in shown:
                kept.append(frame.copy())  # of its own: a view would hold all that were decoded with it
    assert avatar.last_report is not None  # the loop above ran to its end
    report = {**avatar.last_report.to_json(), "engine": {name: avatar.folder.manifest[name] for name in
              ("backend", "precision", "size", "checkpoint", "base", "norm_scope")}}  # fmt: skip
    poses = PoseSequence(target.keypoints[shown], target.canvas)
    pictures = draw_poses(transform_keypoints(poses, avatar.size), avatar.size)
    reference = avatar.frames[report["reference_index"]]
    rows = [("reference", [reference]), ("poses", list(pictures)), ("rendered", kept)]
    write_png(sheet_path, contact_sheet(rows), force=True)
    with atomic_path(report_path) as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report

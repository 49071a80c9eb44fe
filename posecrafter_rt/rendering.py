"""A render as files: the video, a contact sheet, and report.json beside it.

Layer 7: around `avatar`, for the command line and the demonstration.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posecrafter_rt.atomic import atomic_path, refuse_overwrite
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.framing import contact_sheet, transform_keypoints
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.video_io import VideoWriter, write_png

DEFAULT_FPS = 25.0


def output_paths(video: Path) -> tuple[Path, Path, Path]:
    """The video, its contact sheet and its report."""
    return video, video.with_suffix(".png"), video.with_name(f"{video.stem}.report.json")


def refuse_outputs(video: Path, force: bool) -> None:
    """Raise OutputExists if any of the three is there and `force` is false."""
    for path in output_paths(video):
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

    Raises: OutputExists before any work; whatever `Avatar.render` and `VideoWriter` raise. An interrupted render leaves
    none of the three.
    """
    refuse_outputs(video, force)
    _, sheet_path, report_path = output_paths(video)
    told = on_step or (lambda step, steps, note: None)
    frames = []
    with VideoWriter(video, fps or target.fps or DEFAULT_FPS, force=force) as writer:
        for frame in avatar.iter_render(target, options, on_step=lambda stage, step, steps: told(step, steps, stage)):
            writer.write(frame)
            frames.append(frame)
    assert avatar.last_report is not None  # the loop above ran to its end
    report = {**avatar.last_report.to_json(), "engine": {name: avatar.folder.manifest[name] for name in
              ("backend", "precision", "size", "checkpoint", "base", "norm_scope")}}  # fmt: skip
    pictures = draw_poses(transform_keypoints(target, avatar.size), avatar.size)
    reference = avatar.frames[report["reference_index"]]
    write_png(
        sheet_path,
        contact_sheet([("reference", [reference]), ("poses", list(pictures)), ("rendered", frames)]),
        force=True,
    )
    with atomic_path(report_path) as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report

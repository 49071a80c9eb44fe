"""Render to files: the video, a contact sheet, and a report beside it.

Layer 7: around `avatar`, for the command line and the demonstration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt import __version__
from posecrafter_rt.atomic import (
    atomic_path,
    disk_full,
    means_full,
    partial_path,
    refuse_among,
    refuse_in_engine,
    refuse_overwrite,
    refuse_sources,
    sha256_json,
)
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.errors import DiskFull
from posecrafter_rt.framing import contact_sheet, shown_in_sheet, transform_keypoints
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import DEFAULT_FPS, PoseSequence
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.partial import PartialRender, open_partial, read_state
from posecrafter_rt.runtime.progress import OnStep
from posecrafter_rt.runtime.stretch import Stretch
from posecrafter_rt.video_io import VideoWriter, write_png


def output_paths(video: Path) -> tuple[Path, Path, Path]:
    """Return the paths of the video, its contact sheet and its report."""
    return video, video.with_suffix(".png"), video.with_name(f"{video.stem}.report.json")


def refuse_outputs(video: Path, force: bool, fingerprint: str | None = None) -> None:
    """Raise OutputExists if any of the three outputs is a folder, or if one exists and `force` is false, and
    PoseCrafterError if their folder cannot be written.

    Outputs that a killed render had already moved to their places do not count: the same command will finish it.
    Args: fingerprint: of the render that is to begin; None: not known yet, it may be the one that was killed.
    """
    refuse_overwrite(video, force=True)  # first of all refuse a folder: `.` has no name to derive the others from
    folder, outputs = partial_path(video), output_paths(video)
    state = read_state(folder)
    left = [path for path in outputs if (folder / path.name).exists()]
    is_moving = (state is not None and state["staged"] and fingerprint in (None, state["fingerprint"])
                 and all(path in left or path.exists() for path in outputs))  # fmt: skip
    for path in left if is_moving else outputs:
        refuse_overwrite(path, force)


def goes_on(video: Path) -> bool:
    """Return whether the call that was to make this video, and was broken off, would go on from what is finished."""
    state = read_state(partial_path(video))
    return state is not None and bool(state["segments"] or state["staged"])


def render_to_files(
    avatar: Avatar,
    target: PoseSequence,
    video: str | PathLike[str],
    options: RenderOptions,
    *,
    stretch: Stretch | None = None,
    force: bool = False,
    on_step: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Render and write the video, the contact sheet and the report; return the report.

    The video has the frame rate of `target`, or 25 frames per second. With `stretch`, the output is the stretch's video
    with the stretch replaced. `target` then holds the poses of `Stretch.rendered`; the report counts these frames, and
    the sheet shows the stretch.
    Only the frames that an engine decodes at once and those of the contact sheet are in memory. With `options.segment`,
    finished segments are kept in `partial_path(video)`: the same call continues from them and gives the bytes of an
    unbroken run. An interrupted render leaves none of the three outputs.
    Raises: OutputExists before any work (even with `force` if the output is the video to be mended), and at the end if
        another program has made one of the outputs meanwhile: the same call with `force` then has nothing left to
        render. Also what `Avatar.render`, `Stretch.mend`, `VideoWriter` and `open_partial` raise.
    """
    video = Path(video)
    work, options = _Work(avatar, target, target.fps or DEFAULT_FPS, stretch), avatar.resolve(options)
    fingerprint = work.fingerprint(options)
    refuse_outputs(video, force, fingerprint)
    refuse_in_engine(video, avatar.folder.path)
    if stretch is not None:
        for path in output_paths(video):  # a single picture may be a video, and have the contact sheet's name
            refuse_sources(path, stretch.video)
        refuse_among(video, stretch.video, "images")
    VideoWriter(video, work.fps, force=True)  # checks the name and the rate before any work

    def told(stage: str, step: int, steps: int) -> None:
        if on_step is not None:
            on_step(step, steps, stage)

    outputs = output_paths(video)
    with _naming(video), open_partial(partial_path(video), fingerprint, outputs, force=force) as partial:
        if not partial.holds(outputs):
            if options.segment is None:
                rendered = avatar.iter_render(target, options, on_step=told)
            else:
                rendered = _render_segments(work, options, partial, told)
            _write_outputs(work, rendered, output_paths(partial.folder / video.name))
        partial.publish(outputs, force=force)
    report: dict[str, Any] = json.loads(outputs[2].read_text(encoding="utf-8"))
    return report


@contextmanager
def _naming(video: Path) -> Iterator[None]:
    """Report a full disk under the video's name: the folder beside it, which was written to, may be gone by now.

    An error that names a file elsewhere, such as in a compiler's cache, may concern another disk and is kept.
    """
    try:
        yield
    except (DiskFull, OSError) as error:
        if not means_full(error):
            raise
        reason = error.__cause__ if isinstance(error, DiskFull) else error  # a writer may have wrapped it already
        if isinstance(reason, OSError) and not _is_beside(reason, video):
            raise reason from None
        told = disk_full(video)
        if partial_path(video).exists():
            told.hint = f"free some space in {video.parent}; the same command then goes on from what is finished"
        raise told from error


def _is_beside(error: OSError, video: Path) -> bool:
    """Return whether an error concerns a file in the video's folder, or names no file."""
    return error.filename is None or Path(error.filename).resolve().is_relative_to(video.parent.resolve())


@dataclass(frozen=True)
class _Work:
    """What is rendered: the poses `target`, as a video of their own or, with `stretch`, into a stretch of another."""

    avatar: Avatar
    target: PoseSequence
    fps: float
    stretch: Stretch | None

    def fingerprint(self, options: RenderOptions) -> str:
        """Return a hash of everything that the video's bytes depend on.

        The engine's seal covers weights, backend and libraries.
        """
        replaced = None if self.stretch is None else [self.stretch.start, self.stretch.stop, self.stretch.frames_sha256]
        return sha256_json({
            "engine": self.avatar.folder.manifest["seal"], "package": __version__, "options": vars(options),
            "fps": self.fps, "poses": sha256(self.target.keypoints.tobytes()).hexdigest(), "canvas": self.target.canvas,
            "replaced": replaced,
        })  # fmt: skip


def _render_segments(work: _Work, options: RenderOptions, partial: PartialRender, told: OnStep) -> Iterator[np.ndarray]:
    """Render and store the segments that are not finished; then return the frames of all segments."""
    avatar, target = work.avatar, work.target
    if options.segment == "auto" and partial.choice is None:
        partial.fix(avatar.choose_segment(len(target), options))
    segments = avatar.iter_segments(target, options, choice=partial.choice, finished=partial.reports(),
                                    carried=partial.carried(), on_step=told, look_ahead=True)  # fmt: skip
    with closing(segments):
        for segment in segments:
            partial.save(segment.frames, segment.carried, segment.report)
    return partial.frames()


def _write_outputs(work: _Work, rendered: Iterable[np.ndarray], outputs: tuple[Path, Path, Path]) -> None:
    """Write the three files, replacing what is there. The report is complete once all of `rendered` is taken."""
    video, sheet_path, report_path = outputs
    avatar, target, stretch = work.avatar, work.target, work.stretch
    of_sheet = target.keypoints if stretch is None else target.keypoints[stretch.inside]
    shown = shown_in_sheet(len(of_sheet))
    kept: list[np.ndarray] = []
    frames = _keeping(rendered if stretch is None else stretch.draw_to_neighbours(rendered), shown, kept)
    with VideoWriter(video, work.fps, force=True) as writer:
        for frame in frames if stretch is None else stretch.mend(frames):
            writer.write(frame)
    assert avatar.last_report is not None  # the loop above ran to its end
    report = {**avatar.last_report.to_json(), "replaced": stretch and [stretch.start, stretch.stop],
              "engine": _described(avatar.folder.manifest)}  # fmt: skip
    poses = PoseSequence(of_sheet[shown], target.canvas)
    pictures = draw_poses(transform_keypoints(poses, avatar.size), avatar.size)
    rows = [("reference", [avatar.frames[report["reference_index"]]]), ("poses", list(pictures)), ("rendered", kept)]
    if stretch is not None:
        rows.insert(2, ("replaced", [frame for index, frame in enumerate(stretch.replaced()) if index in shown]))
    write_png(sheet_path, contact_sheet(rows), force=True)
    with atomic_path(report_path) as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")


def _described(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says about the engine; `loras` is empty if none was fused."""
    named = ("backend", "precision", "size", "checkpoint", "base", "norm_scope")
    return {**{name: manifest[name] for name in named}, "loras": manifest.get("loras", [])}


def _keeping(frames: Iterable[np.ndarray], shown: np.ndarray, kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass frames on unchanged, and append copies of those that a sheet shows to `kept`."""
    for index, frame in enumerate(frames):
        if index in shown:
            kept.append(frame.copy())  # a view would keep all frames alive that were decoded with it
        yield frame

"""`posecrafter-rt demo`: tune, build and render on real footage, and measure the result against the truth.

Layer 7.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt.atomic import atomic_path, refuse_existing, refuse_overwrite
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, BuildProgress, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.demo.footage import FRAMES, TARGET, TUNING, load_poses, video_path
from posecrafter_rt.engines.folder import PASSED_OVER
from posecrafter_rt.errors import CheckpointError, OutputExists
from posecrafter_rt.evaluate.metrics import psnr, ssim
from posecrafter_rt.framing import side_by_side
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.models.weights import read_scheduler_config
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import DEFAULT_FPS
from posecrafter_rt.rendering import output_paths, render_to_files
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.tuning import (
    TuneOptions,
    TuneStatus,
    base_size,
    choose_frames,
    load_clip,
    step_counts,
    tune,
)
from posecrafter_rt.video_io import read_video, write_video

Step = Callable[[int, int, str], None]
METRICS_FILE = "metrics.json"
FURTHER_FILES = ("contact_sheet.png", "controlvideo.mp4", "side_by_side.mp4")  # beside the render's own


def scores(rendered: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return PSNR in dB and SSIM of two clips (N, H, W, 3) uint8, rounded for a report."""
    return {"psnr": round(psnr(rendered, truth), 3), "ssim": round(ssim(rendered, truth), 4)}


class Demo:
    """The steps of the demonstration, in order. Each writes its files to `output` and its seconds to `seconds`.

    Without `force`, files of an interrupted demonstration in `output` are reused, but neither those of a complete one
    nor the user's are overwritten.
    Raises: OutputExists; BackendUnavailable without the footage; PoseCrafterError for more steps than there can be,
        or so few that they would do nothing.
    """

    def __init__(self, output: Path, num_inference_steps: int, tuning: TuneOptions, force: bool) -> None:
        if output.exists() and not output.is_dir():
            raise OutputExists(f"{output} is a file", "give the name of a folder, new or of an earlier demonstration")
        refuse_overwrite(output / METRICS_FILE, force)
        self.checkpoint, self.engine = output / "tuned.ckpt", output / "tuned.engine"
        if not force and not self.checkpoint.exists():  # nothing is made before it, so all that is there is the user's
            for path in (self.engine, *output_paths(output / "out.mp4"), *(output / name for name in FURTHER_FILES)):
                refuse_existing(path)
        self.tuning = replace(tuning, frames=FRAMES, precision="auto", device="cpu")
        self.output, self.num_inference_steps, self.force = output, num_inference_steps, force
        self.seconds: dict[str, float] = {}
        # The render would refuse a number of steps only after minutes of tuning and building.
        base = locate_base("embedded")
        options = RenderOptions(num_inference_steps=num_inference_steps).with_recommended(base.settings().recommended)
        options.check_start(DDIMSchedule.from_config(read_scheduler_config(base)))
        self.size = base_size("embedded")
        self.frames, self.poses = load_clip(video_path(), load_poses(), self.size, slice(None))
        if not force and self.checkpoint.exists() and not self._is_tuned():
            raise OutputExists(f"{self.checkpoint} was not tuned by this demonstration, or with other numbers of steps",
                               "give the same options to go on, --force to tune again, or another folder")  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)

    def _is_tuned(self) -> bool:
        """Return whether the checkpoint is what `tune` would write, as far as its frames and steps tell."""
        try:
            found = Checkpoint.load(self.checkpoint)
        except CheckpointError:
            return False
        frames, poses = self.frames[TUNING], self.poses[TUNING].keypoints
        chosen = choose_frames(len(frames), FRAMES)
        steps = step_counts(self.tuning, locate_base(self.tuning.base).settings(), len(chosen))
        return (
            all(found.metadata.get(name) == value for name, value in {"base": self.tuning.base, **steps}.items())
            and np.array_equal(found.frames, frames[chosen])
            and np.array_equal(found.poses.keypoints, poses[chosen])
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    def tune(self, on_step: Step) -> None:
        """Tune on eight frames taken uniformly from the first 36."""

        def told(status: TuneStatus) -> None:
            on_step(status.step, status.steps, f"{status.part} loss {status.loss:.4f}")

        with self._timed("tune"):
            if self.force or not self.checkpoint.exists():
                frames, poses = self.frames[TUNING], self.poses[TUNING]
                tune(frames, poses, self.checkpoint, self.tuning, force=self.force, on_step=told)

    def build(self, on_stage: BuildProgress) -> None:
        """Build the engine for this machine."""
        with self._timed("build"):
            # With `force`, `auto` would retry what it passed over, every time. An engine is replaced without it.
            force = self.force and not (self.engine / PASSED_OVER).exists()
            build_engine(self.checkpoint, self.engine, BuildOptions(), force=force, progress=on_stage)

    def render(self, on_step: Step) -> dict[str, Any]:
        """Render frames 46 to 119 from their poses; return the metrics of the render and of both baselines."""
        target, truth = self.poses[TARGET], self.frames[TARGET]
        with Avatar.load(self.engine) as avatar:
            with self._timed("render"):
                options = RenderOptions(num_inference_steps=self.num_inference_steps)
                report = render_to_files(avatar, target, self.output / "out.mp4", options, force=True, on_step=on_step)
            (self.output / "out.png").replace(self.output / "contact_sheet.png")
            options = RenderOptions("controlvideo", self.num_inference_steps)

            def told(stage: str, step: int, steps: int) -> None:
                on_step(step, steps, f"controlvideo, {stage}")

            frames = avatar.render(target, options, on_step=told)
            write_video(self.output / "controlvideo.mp4", frames, target.fps or DEFAULT_FPS, force=True)
            reference = avatar.frames[report["reference_index"]]
        rendered, controlvideo = (read_video(self.output / f"{name}.mp4").frames for name in ("out", "controlvideo"))
        pictures = draw_poses(target, self.size)
        write_video(self.output / "side_by_side.mp4",
                    side_by_side(truth, pictures, rendered, labels=("truth", "pose", "render")),
                    target.fps or DEFAULT_FPS, force=True)  # fmt: skip
        repeated = np.repeat(reference[np.newaxis], len(truth), axis=0)
        clips = {"render": rendered, "repeated_reference": repeated, "controlvideo": controlvideo}
        return {name: scores(clip, truth) for name, clip in clips.items()}

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json; return its content."""
        metrics = {**metrics, "seconds": self.seconds, "peak_rss_bytes": peak_rss_bytes()}
        with atomic_path(self.output / METRICS_FILE) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        return metrics

"""The demonstration's footage for benchmarks: its clip, and a checkpoint and an engine of the person in it.

Bench: imported by quality.py, segments.py, stream_quality.py and stretch.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt.demo.footage import FRAMES, TUNING, load_poses, video_path
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tuning import TuneOptions, base_size, load_clip, resolve_precision, tune


def load_footage() -> tuple[np.ndarray, PoseSequence]:
    """All 120 frames (N, H, W, 3) uint8 at the embedded base's size, and their poses."""
    return load_clip(video_path(), load_poses(), base_size("embedded"), slice(None))


def tune_person(output: Path, given: Path | None = None, **changes: Any) -> Path:
    """A checkpoint, tuned as the demonstration tunes; `given` where there is one. changes: of `TuneOptions`."""
    if given is not None:
        return given
    frames, poses = load_footage()
    device, precision = resolve_precision("auto", "auto")
    options = TuneOptions(**{"frames": FRAMES, "precision": precision, "device": device, **changes})  # type: ignore[arg-type]
    tune(frames[TUNING], poses[TUNING], output, options)
    return output

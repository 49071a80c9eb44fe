"""Streaming frame by frame against one batched forward with the causal window mask, for every backend."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines import get_backend
from posecrafter_rt.engines.base import Engine, Precision
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError, PoseError
from posecrafter_rt.method import DPMSchedule, dpmpp_sample
from posecrafter_rt.method.dpmpp import dpmpp_terms
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.denoiser import Tables
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.prepare import edit_latents, embed_poses, text_tables, time_tables
from posecrafter_rt.runtime.stream import AvatarStream, sample_reference
from posecrafter_rt.runtime.stream_denoiser import Sampling
from posecrafter_rt.runtime.stream_options import StreamOptions
from tests.tiny import CountingThreads

SIZE = (32, 32)
NUM_POSES = 7
EVERY_POSE = LiveOptions(still=0, jump=10)  # nothing is skipped, no past is forgotten


class Setting(NamedTuple):
    """A tiny avatar: its modules, its engines, the latents that its frames start from and the reference's pose."""

    model: PoseModel
    engines: dict[str, Engine]
    schedule: DPMSchedule
    inverted: Tensor
    pose: np.ndarray


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., PoseModel]) -> PoseModel:
    model = make_tiny_model()
    model.fold()
    return model


@pytest.fixture(scope="module")
def setting(model: PoseModel, backend_name: str, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return set_up(model, backend_name, "fp32", tmp_path_factory.mktemp(backend_name))


def set_up(model: PoseModel, backend_name: str, precision: Precision, folder: Path) -> Setting:
    """Build its engines in a folder, and load them."""
    arch, backend = replace(model.architecture(), size=SIZE), get_backend(backend_name)
    folder.mkdir(exist_ok=True)
    backend.build(model, arch, folder, precision, lambda stage: None)
    engines = backend.load(folder, arch, precision, folder / "compiled")
    inverted = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2)).to(engines["unet"].device)
    return Setting(model, engines, DPMSchedule.from_config(model.scheduler_config), inverted, some_poses(1, seed=5)[0])


def some_poses(count: int, seed: int = 0) -> np.ndarray:
    """Poses of a whole person on a 32 × 32 canvas, each a little farther to the right."""
    generator = np.random.default_rng(seed)
    pose = np.concatenate([generator.uniform(6, 22, (134, 2)), np.ones((134, 1))], axis=1)
    poses = np.repeat(pose[None], count, axis=0)
    poses[:, :, 0] += np.arange(count)[:, None] * 0.7
    return poses.astype(np.float32)


def sampling_of(setting: Setting, steps: int) -> Sampling:
    input_ids = setting.model.tokenize(["a person"])
    timesteps = setting.schedule.timesteps(steps)
    tables = Tables(time_tables(setting.engines, timesteps), text_tables(setting.engines, input_ids))
    return Sampling(tables, dpmpp_terms(setting.schedule, steps), 1.0)


def window_mask(frames: int, window: int) -> Tensor:
    """bool (frames, frames): frame 0 is the reference, alone; frame i sees it, itself and the `window` before."""
    age = torch.arange(frames)[:, None] - torch.arange(frames)
    mask = (age >= 0) & (age <= window)
    mask[:, 0] = True
    return mask


def last_layer(
    model: PoseModel, frames: Tensor, time: Tensor, text_kv: Tensor, features: Tensor, first: Tensor, mask: Tensor
) -> Tensor:
    """`VideoUNet.predict_shallow` under a mask of which frame attends to which."""
    unet, context = model.unet, replace(model.unet._context(frames, time, text_kv, None), temporal_mask=mask)
    samples = [unet.conv_in(frames) + first, features]
    return unet._out(unet._up(unet._up_layers()[-1:], samples, context), context)


@torch.no_grad()
def batched(setting: Setting, sampling: Sampling, poses: np.ndarray, window: int, unet_every: int = 1) -> np.ndarray:
    """All frames in one forward a step, by the plain modules: (N, H, W, 3), the reference dropped.

    unet_every: frames but the reference keep the deep features, and the ControlNet's first residual, over so many steps.
    """
    model, options = setting.model, StreamOptions()
    target = PoseSequence(poses, SIZE)
    latents, _ = edit_latents(setting.inverted, setting.pose, target, options)
    latents = latents.cpu()
    embeddings = embed_poses(
        setting.engines, PoseSequence(np.concatenate([setting.pose[None], poses]), SIZE), SIZE
    ).cpu()
    mask = window_mask(len(latents), window)
    tables = {name: (sampling.tables.time_projections[name].cpu(), sampling.tables.text_kv[name].cpu())
              for name in ("unet", "controlnet")}  # fmt: skip

    kept: list[Tensor] = []

    def denoise(frames: Tensor, index: int, timestep: int) -> Tensor:
        time = {name: projections[index : index + 1] for name, (projections, _) in tables.items()}
        down, mid = model.controlnet(frames, time["controlnet"], tables["controlnet"][1], embeddings, torch.ones(1))
        noise_pred, deep = model.unet.predict(frames, time["unet"], tables["unet"][1], down, mid, temporal_mask=mask)
        if index % unet_every == 0:
            kept[:] = deep, down[0]
            return noise_pred
        features, first = (torch.cat([new[:1], old[1:]]) for new, old in zip((deep, down[0]), kept, strict=True))
        return last_layer(model, frames, time["unet"], tables["unet"][1], features, first, mask)

    clean = dpmpp_sample(denoise, latents, setting.schedule, len(sampling.terms))
    pixels = model.networks()["vae_decoder"](clean[1:])[0]
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def open_stream(setting: Setting, sampling: Sampling, **options: Any) -> AvatarStream:
    reference = sample_reference(setting.engines, sampling, setting.inverted, setting.pose, SIZE)
    return AvatarStream(setting.engines, reference, StreamOptions(steps=len(sampling.terms), **options))


def assert_same_pictures(given: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding: a level here and there."""
    difference = np.abs(given.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize(("steps", "window"), [(3, 2), (1, 4), (2, 0), (2, 16), (8, 30)])
def test_streaming_is_one_forward_with_a_causal_window(setting: Setting, steps: int, window: int) -> None:
    sampling, poses = sampling_of(setting, steps), some_poses(NUM_POSES)
    expected = batched(setting, sampling, poses, window)
    with open_stream(setting, sampling, window=window, live=EVERY_POSE) as stream:
        frames = np.stack([stream.step(pose) for pose in poses])
    assert_same_pictures(frames, expected)
    assert np.abs(np.diff(expected.astype(int), axis=0)).max() > 2  # the frames do differ
    if window < NUM_POSES - 1:
        wider = batched(setting, sampling, poses, NUM_POSES)
        assert np.abs(wider.astype(int) - expected.astype(int)).max() > 1  # and the window bears on them


@pytest.mark.parametrize(("engine_kind", "precision", "kept"), [
    ("torch", "bf16", torch.bfloat16), ("openvino", "fp16", torch.float32), ("openvino", "int8", torch.float32),
    pytest.param("openvino", "bf16", torch.float32, marks=pytest.mark.slow),
])  # fmt: skip
def test_in_16_and_8_bits_it_is_near_to_that_forward(
    model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_kind: str, precision: Precision,
    kept: torch.dtype,
) -> None:  # fmt: skip
    """As near as their bits allow."""
    reason = get_backend(engine_kind).unsupported_reason(precision)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr("posecrafter_rt.engines.torch.multiplies", lambda precision, device: True)  # not widened
    exact = set_up(model, "torch", "fp32", tmp_path / "fp32")
    narrow = set_up(model, engine_kind, precision, tmp_path / precision)
    sampling, poses = sampling_of(exact, 2), some_poses(NUM_POSES)
    expected, without = (batched(exact, sampling, poses, window).astype(int) for window in (2, 0))
    with open_stream(narrow, sampling_of(narrow, 2), window=2, live=EVERY_POSE) as stream:
        assert {tensor.dtype for tensor in stream.reference.memory["temporal"].values()} == {kept}
        frames = np.stack([stream.step(pose) for pose in poses])
    difference = np.abs(frames - expected)
    assert difference.mean() < (0.5 if precision == "bf16" else 0.75) and difference.max() <= 8
    assert difference.mean() < np.abs(frames - without).mean()


@pytest.mark.parametrize(("steps", "window", "unet_every"), [(4, 2, 2), (3, 0, 3)])
def test_features_kept_over_steps_are_those_of_one_forward_that_keeps_them(
    setting: Setting, steps: int, window: int, unet_every: int
) -> None:
    sampling, poses = sampling_of(setting, steps), some_poses(NUM_POSES)
    expected = batched(setting, sampling, poses, window, unet_every)
    with open_stream(setting, sampling, window=window, unet_every=unet_every, live=EVERY_POSE) as stream:
        frames = np.stack([stream.step(pose) for pose in poses])
    assert_same_pictures(frames, expected)
    assert np.abs(batched(setting, sampling, poses, window).astype(int) - expected.astype(int)).max() > 1
    if window:
        wider = batched(setting, sampling, poses, NUM_POSES, unet_every)
        assert np.abs(wider.astype(int) - expected.astype(int)).max() > 1


def test_the_networks_run_whole_at_every_so_many_steps(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = AvatarStream._advance

    def watched(stream: AvatarStream, frames: list, steps: slice, is_whole: bool = True) -> None:
        called.append("whole" if is_whole else "shallow")
        original(stream, frames, steps, is_whole)

    sampling = sampling_of(setting, 5)
    monkeypatch.setattr(AvatarStream, "_advance", watched)
    for every, expected in ((1, "wwwww"), (2, "wswsw"), (3, "wssws"), (8, "wssss")):
        called.clear()
        with open_stream(setting, sampling, window=1, unet_every=every) as stream:
            stream.step(some_poses(1)[0])
        assert "".join(name[0] for name in called) == expected


def test_a_pipeline_keeps_no_features() -> None:
    with pytest.raises(PoseCrafterError, match="pipelined"):
        StreamOptions(steps=2, unet_every=2, is_pipelined=True)
    with pytest.raises(PoseCrafterError, match="0 steps"):
        StreamOptions(unet_every=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_pipeline_gives_the_same_frames_later(setting: Setting, steps: int) -> None:
    sampling, poses = sampling_of(setting, steps), some_poses(NUM_POSES)
    expected = batched(setting, sampling, poses, 2)
    with open_stream(setting, sampling, window=2, is_pipelined=True, live=EVERY_POSE) as stream:
        frames = np.stack([stream.step(pose) for pose in poses])
        assert all(np.array_equal(frame, stream.reference.frame) for frame in frames[: steps - 1])
    assert_same_pictures(frames[steps - 1 :], expected[: NUM_POSES - steps + 1])


def test_a_jump_forgets_the_past_and_reset_everything(setting: Setting) -> None:
    sampling, poses = sampling_of(setting, 2), some_poses(4)
    far = poses[3].copy()
    far[:, :2] = 31 - far[:, :2]
    with open_stream(setting, sampling, window=4, live=LiveOptions(still=0, jump=0.1)) as stream:
        first = [stream.step(pose) for pose in (*poses[:3], far)]
        assert stream.last.reset
        stream.reset()
        assert np.array_equal(stream.step(far), first[3]) and not stream.last.reset
        stream.reset()
        assert all(np.array_equal(stream.step(pose), frame) for pose, frame in zip(poses[:3], first, strict=False))


@pytest.mark.parametrize("options", [{}, {"is_pipelined": True}, {"unet_every": 2}])
def test_a_stream_opened_in_inference_mode_goes_on_outside_it(setting: Setting, options: dict[str, Any]) -> None:
    far = some_poses(1)[0].copy()
    far[:, :2] = 31 - far[:, :2]
    with torch.inference_mode():
        stream = open_stream(setting, sampling_of(setting, 2), live=LiveOptions(still=0, jump=0.1), **options)
        first = stream.step(some_poses(1)[0])
    with stream:
        stream.step(far)
        assert stream.last.reset
        stream.reset()
        assert np.array_equal(stream.step(some_poses(1)[0]), first)


def test_a_jump_travels_down_the_pipeline(setting: Setting) -> None:
    sampling, poses = sampling_of(setting, 3), some_poses(3)
    far = poses[2].copy()
    far[:, :2] = 31 - far[:, :2]
    later = far.copy()
    later[:, 0] -= 0.5
    live = LiveOptions(still=0, jump=0.1)
    with open_stream(setting, sampling, window=4, live=live) as stream:
        expected = [stream.step(pose) for pose in (*poses, far, later)]
    with open_stream(setting, sampling, window=4, is_pipelined=True, live=live) as stream:
        frames = [stream.step(pose) for pose in (*poses, far, later, later, later)]
    for frame, wanted in zip(frames[2:], expected, strict=True):
        assert_same_pictures(frame, wanted)


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_after_an_error_a_stream_begins_anew(
    setting: Setting, is_pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that half their steps remember, or that were never finished, do not spoil those that come after."""
    sampling, poses = sampling_of(setting, 2), some_poses(5)
    with open_stream(setting, sampling, window=2, is_pipelined=is_pipelined) as stream:
        expected = [stream.step(pose) for pose in poses[2:]]
        stream.reset()
        stream.step(poses[0])
        remember, calls = stream._denoiser.remember, []

        def fails_at_the_second_call(*arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            remember(*arguments)

        monkeypatch.setattr(stream._denoiser, "remember", fails_at_the_second_call)
        with pytest.raises(OutOfMemory) as caught:
            [stream.step(pose) for pose in poses[1:]]
        assert caught.value.hint and "a smaller window" in caught.value.hint
        for pose, frame in zip(poses[2:], expected, strict=True):
            assert np.array_equal(stream.step(pose), frame) and not stream.last.is_repeat
    with pytest.raises(PoseCrafterError, match="this stream is closed"):
        stream.step(poses[0])


def test_nothing_is_left_of_numbers_that_were_not_finite(setting: Setting) -> None:
    """A masked slot counts 0 times, and 0 times NaN is NaN."""
    sampling, poses = sampling_of(setting, 2), some_poses(3)
    with open_stream(setting, sampling, window=2) as stream:
        expected = [stream.step(pose) for pose in poses]
        for tensor in stream._denoiser.temporal.values():
            tensor[:, 1:] = float("nan")  # as an overflow leaves it
        stream.reset()
        for pose, frame in zip(poses, expected, strict=True):
            assert np.array_equal(stream.step(pose), frame)


def test_still_poses_cost_nothing_and_a_lost_person_is_held(setting: Setting) -> None:
    sampling, pose = sampling_of(setting, 1), some_poses(1)[0]
    with open_stream(setting, sampling) as stream:
        first = stream.step(pose)
        again = stream.step(pose)
        assert stream.last.is_repeat and np.array_equal(first, again) and again is not first
        again[:] = 0
        assert np.array_equal(stream.step(None), first) and stream.last.held
        assert stream.step(pose + np.float32([1, 0, 0])).shape == (*SIZE, 3) and not stream.last.is_repeat
        for bad in (np.zeros((18, 3)), np.full((134, 3), np.nan)):
            with pytest.raises(PoseError):
                stream.step(bad)


def test_a_pipeline_renders_every_pose_and_tells_how_it_met_the_newest(setting: Setting) -> None:
    sampling, (pose, *_) = sampling_of(setting, 2), some_poses(2)
    with open_stream(setting, sampling, is_pipelined=True) as stream:
        for _ in range(4):
            stream.step(pose)
            assert not stream.last.is_repeat
        stream.step(None)
        assert stream.last.held  # this pose, not the one whose frame that was
    with open_stream(setting, sampling_of(setting, 1), is_pipelined=True) as stream:  # nothing is on its way
        assert [(stream.step(pose), stream.last.is_repeat)[1] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("options", [{"unet_every": 2}, {"is_pipelined": True}])
def test_steps_leave_no_memory_behind(setting: Setting, options: dict[str, Any]) -> None:
    """What a step makes is gone after the next: tensors to the byte, all of the process's memory but for
    the noise, of which one round of three must be without."""
    poses = some_poses(8)
    with open_stream(setting, sampling_of(setting, 2), window=2, live=EVERY_POSE, **options) as stream:
        for number in range(10):  # compiled, and the ring is full
            stream.step(poses[number % 8])
        before, growths = tensor_bytes(), []
        for _ in range(3):
            resident = resident_bytes()
            for number in range(60):
                stream.step(poses[number % 8])
            growths.append(resident_bytes() - resident)
            if growths[-1] < 2e6:
                break
        assert tensor_bytes() == before
        assert min(growths) < 2e6, growths


def tensor_bytes() -> int:
    """Of all tensors that there are; what several show is counted once."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident_bytes() -> int:
    """Of the process; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_the_same_at_every_step_is_made_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Watched:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.spec, self.device = engine, engine.spec, engine.device

        def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
            given.extend(inputs[name] for name in ("pose_embeddings", "is_reference", "conditioning_scale"))
            return self.engine(**inputs)

    monkeypatch.setitem(setting.engines, "controlnet_stream", Watched(setting.engines["controlnet_stream"]))
    sampling = sampling_of(setting, 3)
    with open_stream(setting, sampling, live=EVERY_POSE) as stream:
        given.clear()
        for pose in some_poses(2):
            stream.step(pose)
    places = [[tensor.data_ptr() for tensor in given[first::3]] for first in range(3)]
    assert [len(set(of_steps)) for of_steps in places] == [2, 1, 1]  # an embedding a pose, the others for good


def test_before_anybody_is_seen_the_reference_stands_there(setting: Setting) -> None:
    with open_stream(setting, sampling_of(setting, 2), window=3) as stream:
        frame = stream.step(None)
        assert stream.last.held
        assert_same_pictures(frame, stream.reference.frame)


@pytest.mark.parametrize(("has_own", "expected"), [(True, 1), (False, 2)])
def test_torch_leaves_the_cores_to_engines_that_have_their_own_threads(
    setting: Setting, has_own: bool, expected: int, two_threads: None
) -> None:
    sampling, threads = sampling_of(setting, 1), set[int]()
    reference = sample_reference(setting.engines, sampling, setting.inverted, setting.pose, SIZE)
    engines = {name: CountingThreads(engine, has_own, threads) for name, engine in setting.engines.items()}
    with AvatarStream(engines, reference, StreamOptions(steps=1)) as stream:
        stream.step(some_poses(1)[0])
    assert threads == {expected} and torch.get_num_threads() == 2

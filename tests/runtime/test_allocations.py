"""Beside its networks a render allocates nothing at a step, and a stream the same for every frame, however many steps it takes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines import Engine
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import Clip, edit_latents, embed_poses
from posecrafter_rt.runtime.render import render_clip
from posecrafter_rt.runtime.stream import AvatarStream, sample_reference
from posecrafter_rt.runtime.stream_options import StreamOptions
from tests import tiny
from tests.allocations import Allocations, Unwatched
from tests.runtime.test_stream import EVERY_POSE, SIZE, Setting, sampling_of, set_up, some_poses, tensor_bytes

FRAMES = 479  # between frame 20 and frame 500
FEW_FRAMES = 79  # between frame 20 and frame 100
# Of a stream's frame: three views of numpy's arrays, which are torch's from then on (the pose's picture, the edit's maps and
# rectangles); these in the types that are computed with, but for the maps, which have it; the edited latents; the pose's
# embedding, which the next frame's would overwrite; the frame's numbers, those in 8 bits; whether all are finite.
OF_A_FRAME = {"aten.lift_fresh.default": 3, "aten._to_copy.default": 3, "aten.new_empty.default": 2,
              "aten.add.Tensor": 1, "aten.isfinite.default": 1, "aten.all.default": 1}  # fmt: skip


@pytest.mark.parametrize("change", [
    {}, {"sampler": "dpmpp"}, {"sampler": "unipc", "guidance_scale": 3.0, "tau": 3}, {"guidance_scale": 3.0, "unet_every": 2},
])  # fmt: skip
def test_a_renders_step_allocates_nothing(avatar: Avatar, change: dict[str, Any]) -> None:
    options = RenderOptions(num_inference_steps=6, strength=1.0, **change)
    schedule, poses = avatar.schedules[options.sampler], tiny.some_poses(3)
    allocations, steps = Allocations(), list[list[str]]()
    tables = avatar._once.tables(schedule.timesteps(6), avatar._prompts(options))
    inverted = torch.randn(4, tiny.SIZE[0] // 2, tiny.SIZE[1] // 2, generator=torch.Generator().manual_seed(0))
    latents, plan = edit_latents(inverted, poses.keypoints[0], poses, options, is_late=options.tau > 1)
    assert (plan.rects[..., 2:] > plan.rects[..., :2]).any()  # there is something to edit
    clip = Clip(latents, embed_poses(avatar.engines, tiny.some_poses(4), tiny.SIZE), plan)
    kept = clip.latents.clone()
    engines = {name: Unwatched(engine, allocations) for name, engine in avatar.engines.items()}

    def note(index: int) -> None:
        steps.append([*allocations.made, *allocations.read])
        allocations.clear()

    expected = render_clip(avatar.engines, schedule, tables, clip, options)
    with allocations:
        rendered = render_clip(engines, schedule, tables, clip, options, note)
    assert torch.equal(rendered, expected) and torch.equal(clip.latents, kept)
    assert len(steps) == 6 and not any(steps[1:]) and not allocations.made and not allocations.read, steps


@pytest.fixture(scope="module")
def setting(make_tiny_model: Callable[..., PoseModel], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    model = make_tiny_model()
    model.fold()
    return set_up(model, "torch", "fp32", tmp_path_factory.mktemp("torch"))


@pytest.mark.parametrize(("options", "frames"), [
    ({"steps": 2}, FRAMES), ({"steps": 5}, FEW_FRAMES), ({"steps": 4, "unet_every": 2}, FEW_FRAMES),
    ({"steps": 3, "is_pipelined": True}, FEW_FRAMES),
], ids=str)  # fmt: skip
def test_every_frame_of_a_stream_allocates_the_same(setting: Setting, options: dict[str, Any], frames: int) -> None:
    """Frame 5 and the last, at any number of steps; and what is held stays as it is, Python's and numpy's memory too."""
    allocations, poses = Allocations(), cycle(some_poses(8))
    engines = {name: Unwatched(Recalled(engine), allocations) for name, engine in setting.engines.items()}
    reference = sample_reference(engines, sampling_of(setting, options["steps"]), setting.inverted, setting.pose, SIZE)
    with AvatarStream(engines, reference, StreamOptions(window=2, live=EVERY_POSE, **options)) as stream:

        def step(count: int) -> None:
            for _ in range(count):
                stream.step(next(poses))

        def watch_step() -> None:
            with allocations:
                step(1)
            assert Counter(allocations.made) == OF_A_FRAME
            assert len(allocations.read) == 1  # whether the frame is finite, once it has been waited for
            allocations.clear()

        step(4)
        watch_step()
        tracemalloc.start()
        try:
            step(15)
            before = tensor_bytes(), tracemalloc.get_traced_memory()[0]
            step(frames)
            after = tensor_bytes(), tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        watch_step()
    assert after[0] == before[0]
    # Python's cache of what it looked up on types holds some of the names that torch asks for, at most 300 kB in all.
    assert after[1] - before[1] < 200 * frames, (before, after)


class Recalled(tiny.Watched):
    """An engine that computes once for each number of frames, and gives that from then on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, [])
        self.outputs: dict[int, dict[str, Tensor]] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        frames = len(inputs[self.spec.inputs[0].name])
        if frames not in self.outputs:
            self.outputs[frames] = {name: tensor.clone() for name, tensor in self.engine(**inputs).items()}
        return dict(self.outputs[frames])

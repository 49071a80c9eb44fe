"""What tests of avatars on the tiny base share: its size, poses of noise, a render that is broken off, and an engine that is watched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.avatar_render import SegmentRender
from posecrafter_rt.building import BuildOptions
from posecrafter_rt.engines import Engine
from posecrafter_rt.models.loading import PoseModel, named_parameters
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.spec import NETWORK_NAMES, SHALLOW_STREAM, SHALLOW_UNET

SIZE = (32, 32)
NETWORKS = (*NETWORK_NAMES, SHALLOW_UNET, SHALLOW_STREAM)  # those of the tiny base, of which engines are built as usual
TORCH = BuildOptions(backend="torch", precision="fp32")


def some_poses(count: int, seed: int = 3, size: tuple[int, int] = SIZE) -> PoseSequence:
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate(
        [rng.uniform(0, 1, (1, 134, 2)) + rng.normal(0, 0.02, (count, 134, 2)), np.ones((count, 134, 1))], -1
    )
    keypoints[..., :2] *= (size[1], size[0])
    return PoseSequence(keypoints.astype(np.float32), size, 25.0)


def break_off(avatar: Avatar, poses: PoseSequence, video: Path, options: RenderOptions, after: int) -> None:
    """Render to files, and be interrupted once so many segments are done."""
    decode = SegmentRender._decode

    def interrupted(render: SegmentRender, *others: Any) -> Iterator[np.ndarray]:
        if len(render.report.segments) == after:
            raise KeyboardInterrupt
        return decode(render, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentRender, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_to_files(avatar, poses, video, options)


class Watched:
    """An engine that notes the batch size of every call."""

    def __init__(self, engine: Engine, sizes: list[int]) -> None:
        self.engine, self.spec, self.device, self.sizes = engine, engine.spec, engine.device, sizes
        self.has_own_threads = engine.has_own_threads

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(inputs[self.spec.inputs[0].name]))
        return self.engine(**inputs)

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        return self.engine.swap_weights(tensors)


class CountingThreads:
    """An engine that notes how many threads torch has when it is called, and says whether it has its own."""

    def __init__(self, engine: Engine, has_own_threads: bool, threads: set[int]) -> None:
        self.engine, self.spec, self.device, self.threads = engine, engine.spec, engine.device, threads
        self.has_own_threads = has_own_threads

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.threads.add(torch.get_num_threads())
        return self.engine(**inputs)

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        return self.engine.swap_weights(tensors)


def some_tuned(model: PoseModel) -> frozenset[str]:
    """Names of weights of each kind and component, which are to count as tuned; before folding."""
    parts = (".resnets.", ".attn_temp.", ".conv_temp.", ".attn1.to_out.")
    return frozenset(name for name, _ in named_parameters(model) if name.startswith("vae.decoder.")
                     or (name.startswith(("unet.", "controlnet.")) and any(part in name for part in parts)))  # fmt: skip


def link_the_rest(source: Path, refitted: Path) -> None:
    """Do for folders of networks what a build does after `Backend.refit`."""
    for file in source.iterdir():
        if not (refitted / file.name).exists():
            os.link(file, refitted / file.name)

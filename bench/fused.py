"""Renders segments whose noise predictions are merged at every step, as in ControlVideo's mode for long videos.

Bench: `segments.py` compares this with the runtime's segments, which are rendered one after the other and blended once
they are clean. Here all segments take every step together, so no frame is finished before the whole clip is.
ControlVideo (Zhao et al. 2023) merges short videos and a video of key frames; which frames are key frames, and the
weights, are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines.base import beside
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.method import DDIMSchedule, ddim_sample
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.denoiser import Denoiser
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import prepare_clip
from posecrafter_rt.runtime.progress import ignore
from posecrafter_rt.runtime.render import decode
from posecrafter_rt.runtime.report import RenderReport
from posecrafter_rt.runtime.segments import ramp, split_clip

Window = tuple[np.ndarray, np.ndarray]
"""Frames that are predicted jointly, int64 (F,), and the weight of each one's prediction, float64 (F,)."""


def windows(num_frames: int, segment: int, overlap: int, *, with_key_frames: bool) -> list[Window]:
    """Return the segments of `split_clip` with the weights of `ramp`; with_key_frames adds their middle frames.

    A frame's weights sum to 1. A key frame takes half from the key frames' video and half from its own segments.
    """
    made: list[Window] = []
    before = 0
    for part in split_clip(num_frames, segment, overlap):
        weights = np.ones(part.stop - part.start)
        weights[:before] = ramp(before)
        after = part.stop - part.settled
        weights[len(weights) - after :] = ramp(after)[::-1]
        made.append((np.arange(part.start, part.stop), weights))
        before = after
    if with_key_frames:
        middles = np.array([frames[len(frames) // 2] for frames, _ in made])
        for frames, weights in made:
            weights[np.isin(frames, middles)] /= 2
        made.append((middles, np.full(len(middles), 0.5)))
    return made


class Fused:
    """Merges predictions of windows that all begin with the reference: (1 + N, 4, h, w), the reference's first."""

    def __init__(
        self, parts: Sequence[Window], denoiser: Callable[[Tensor], Denoiser], device: torch.device | str = "cpu"
    ) -> None:
        """denoiser: makes the denoiser for a window's frames; frame 0 is the reference."""
        self.frames = [torch.from_numpy(np.concatenate([[0], 1 + frames])).to(device) for frames, _ in parts]
        # The reference is in all windows, with the same weight in each.
        self.weights = [torch.from_numpy(np.concatenate([[1 / len(parts)], weights])).float().reshape(-1, 1, 1, 1).to(device)
                        for _, weights in parts]  # fmt: skip
        self.denoisers = [denoiser(frames) for frames in self.frames]

    def __call__(self, latents: Tensor, index: int, timestep: int) -> Tensor:
        total = torch.zeros_like(latents)
        for frames, weights, denoise in zip(self.frames, self.weights, self.denoisers, strict=True):
            total.index_add_(0, frames, denoise(latents[frames], index, timestep) * weights)
            denoise.forget()  # otherwise the residuals of all windows would be kept at once
        return total


@torch.no_grad()
def render_fused(avatar: Avatar, poses: PoseSequence, options: RenderOptions, *, with_key_frames: bool) -> np.ndarray:
    """Render a clip in windows of `options.segment` frames that share `options.overlap`: frames (N, H, W, 3) uint8.

    Raises: ValueError unless the sampler is DDIM, `segment` is a number, and `tau` and the `_every` options are 1.
    """
    options, target = avatar.resolve(options), transform_keypoints(poses, avatar.size)
    is_plain = options.tau == options.unet_every == options.controlnet_every == 1
    if options.sampler != "ddim" or not isinstance(options.segment, int) or not is_plain:
        raise ValueError("only DDIM in segments, edited at once, every step whole")
    report = RenderReport(options=options, precision=avatar.networks.built, num_frames=len(target))
    inverted = avatar._prepare(target, options, report, ignore)
    schedule, steps = avatar.schedules[options.sampler], options.num_inference_steps
    assert isinstance(schedule, DDIMSchedule)
    prepared = avatar._once.prepared(
        report.reference_index, inverted, schedule.timesteps(steps), avatar._prompts(options)
    )
    clip = prepare_clip(avatar.engines, prepared, target, options)

    def denoiser(frames: Tensor) -> Denoiser:
        return Denoiser(avatar.engines, prepared.tables, clip.pose_embeddings[frames],
                        options.conditioning_scale, options.guidance_scale)  # fmt: skip

    parts = windows(len(target), options.segment, options.overlap, with_key_frames=with_key_frames)
    with beside(avatar.engines["unet"]):
        latents = ddim_sample(
            Fused(parts, denoiser, inverted.device), clip.latents, schedule, steps, start_step=options.start_step)  # fmt: skip
    return np.stack(list(decode(avatar.engines, latents[1:], options.decoder)))

"""The denoiser of a render: the two groups of guidance, and how they are combined."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.runtime.denoiser import Denoiser
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import embed_poses
from tests.tiny import SIZE, some_poses

PROMPT, SCALE, FRAMES = "a woman in a red coat, dancing", 3.0, 2


def noise_pred(avatar: Avatar, options: RenderOptions, prompts: list[str]) -> Tensor:
    """Of noise, at one timestep, by a denoiser of these prompts and the options' guidance."""
    timesteps = np.array([501])
    tables = avatar._once.tables(timesteps, prompts)
    latents = torch.randn(FRAMES, 4, SIZE[0] // 2, SIZE[1] // 2, generator=torch.Generator().manual_seed(0))
    pose_embeddings = embed_poses(avatar.engines, some_poses(FRAMES), SIZE)
    denoise = Denoiser(avatar.engines, tables, pose_embeddings, options.conditioning_scale, options.guidance_scale)
    return denoise(latents, 0, int(timesteps[0])).clone()  # the engine's own buffer, for one group


def test_guidance_goes_from_no_prompt_to_the_prompt_and_beyond(avatar: Avatar) -> None:
    """noise_pred = u + scale · (c - u), u without a prompt, c with it, each by a denoiser of its own."""
    options = RenderOptions(prompt=PROMPT, guidance_scale=SCALE)
    unconditional, conditional = (noise_pred(avatar, options, [prompt]) for prompt in ("", PROMPT))
    difference = conditional - unconditional
    assert difference.abs().max() > 0.05
    guided = noise_pred(avatar, options, avatar._prompts(options))
    torch.testing.assert_close(guided, unconditional + SCALE * difference, rtol=0, atol=1e-5)

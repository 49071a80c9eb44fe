"""The render loop of one segment: edited latents in, frames out. Read this file first.

Layer 5. Beside it, `prepare` is everything that is computed once, `denoiser` what every step calls, and `method.ddim`
has the walk over the steps. `avatar_render` is the loop over the segments of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine, beside
from posecrafter_rt.errors import NotFinite
from posecrafter_rt.method import DDIMSchedule, DPMSchedule, ddim_sample, dpmpp_sample, unipc_sample
from posecrafter_rt.ops import affine_warp_paste_
from posecrafter_rt.runtime.denoiser import Denoiser, Every, Tables
from posecrafter_rt.runtime.options import Decoder, RenderOptions
from posecrafter_rt.runtime.prepare import Clip
from posecrafter_rt.runtime.segments import ramp
from posecrafter_rt.spec import SMALL_DECODER

DECODERS: dict[Decoder, str] = {"full": "vae_decoder", "small": SMALL_DECODER}


@torch.no_grad()
def render_clip(
    engines: Mapping[str, Engine],
    schedule: DDIMSchedule,
    tables: Tables,
    clip: Clip,
    options: RenderOptions,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Denoise all frames of a clip jointly (method step 5), with the sampler of `options`, whose schedule is given.

    on_step: called with the index of each step before it.
    Returns: clean latents (F, 4, h, w), the inserted reference still at frame 0.
    """
    denoise = Denoiser(engines, tables, clip.pose_embeddings, options.conditioning_scale, options.guidance_scale,
                       Every(options.controlnet_every, options.unet_every))  # fmt: skip
    plan, steps = clip.plan, options.num_inference_steps
    edit_step = None if plan is None or options.tau == 1 else options.start_step + options.tau - 1
    edits: tuple[Tensor, Tensor] | None = None
    if plan is not None and edit_step is not None:  # moved and converted now, so that no step does it
        affines, rects = torch.from_numpy(plan.affines), torch.from_numpy(plan.rects.astype(np.int64))
        device = clip.latents.device
        edits = affines.to(device, non_blocking=True), rects.to(device, non_blocking=True)

    def before_step(index: int, latents: Tensor) -> Tensor:
        if on_step is not None:
            on_step(index)
        if edits is not None and index == edit_step:
            affine_warp_paste_(latents, *edits, options.resample)
            denoise.forget()
        return latents

    with beside(engines["unet"]):
        if isinstance(schedule, DPMSchedule):
            sample = unipc_sample if options.sampler == "unipc" else dpmpp_sample
            return sample(denoise, clip.latents, schedule, steps, start_step=options.start_step,
                          restart_step=edit_step, before_step=before_step)  # fmt: skip
        return ddim_sample(
            denoise, clip.latents, schedule, steps, start_step=options.start_step, before_step=before_step
        )


def blend(carried: Tensor | None, latents: Tensor) -> Tensor:
    """Join a segment to the one before: blend the frames that both rendered linearly, with weights that sum to 1.

    Args: carried: (o, 4, h, w), the earlier segment's clean latents of the shared frames; None: there is no earlier
        one. latents: (F, 4, h, w), the later segment's, which begin with the shared frames.
    Returns: (F, 4, h, w); `latents` itself if nothing is shared.
    """
    if carried is None or not len(carried):
        return latents
    weights = latents.new_tensor(ramp(len(carried))).reshape(-1, 1, 1, 1)
    shared = torch.lerp(carried.to(latents.device), latents[: len(carried)], weights)
    return torch.cat([shared, latents[len(carried) :]])


@torch.no_grad()
def decode(engines: Mapping[str, Engine], latents: Tensor, decoder: Decoder = "full") -> Iterator[np.ndarray]:
    """Decode latents (N, 4, h, w); yields frames (H, W, 3) uint8 RGB.

    Frames are decoded one at a time, because decoding takes several times as much memory per frame as denoising (0.8 GB
    at Stable Diffusion 1.5's 512²). This also makes a frame the same, bit for bit, whatever frames come with it.
    Raises: NotFinite for a frame with values that are not finite; its picture could look like any other.
    """
    network = engines[DECODERS[decoder]]
    for part in latents.split(1):
        pixels = network(latents=part)["pixels"][0]
        with beside(network):
            is_finite = torch.isfinite(pixels).all()
            levels = pixels.add(1).mul_(127.5).round_().clamp_(0, 255)  # a new tensor, not the network's own output
            frame = levels.to(torch.uint8).permute(1, 2, 0).cpu()
        if not is_finite:  # read only now, because `.cpu()` has already waited for the GPU
            raise NotFinite("a decoded frame is not finite", "build the engine with --precision fp32, or bf16")
        yield frame.numpy()

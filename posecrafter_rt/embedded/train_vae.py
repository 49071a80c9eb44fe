"""Recipe, stage 1: trains the autoencoder, on crops of drawn people and photographs.

Layer 4, training only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from posecrafter_rt.embedded.architecture import VAE
from posecrafter_rt.embedded.corpus import Clips, photograph_crop
from posecrafter_rt.machine import cpu_gains_by_bf16
from posecrafter_rt.models.blocks import channels_last

CROP = (64, 80)
BATCH = 24
LEARNING_RATE = 1.5e-3
KL_WEIGHT = 2e-6
PEOPLE_SHARE = 0.6
EMA_DECAY = 0.998


def mixed_precision() -> torch.autocast:
    """Return bf16 autocast if the processor gains by it; else bf16 convolutions take up to ten times float32's time."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_gains_by_bf16())


def to_pixels(frames: np.ndarray) -> Tensor:
    """Convert (b, H, W, 3) uint8 → (b, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _batches(clips: Clips, pictures: list[np.ndarray], seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    num_clips, clip_length, height, width, _ = clips.frames.shape
    while True:
        crops = []
        for _ in range(BATCH):
            if not pictures or rng.random() < PEOPLE_SHARE:
                frame = clips.frames[rng.integers(num_clips), rng.integers(clip_length)]
                top, left = rng.integers(height - CROP[0] + 1), rng.integers(width - CROP[1] + 1)
                crop = frame[top : top + CROP[0], left : left + CROP[1]]
            else:
                crop = photograph_crop(rng, pictures, CROP)
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        yield to_pixels(np.stack(crops))


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the weighted absolute and squared error of the pixels and absolute error of their gradients (contours)."""
    error = decoded - pixels
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * F.mse_loss(decoded, pixels) + 0.5 * gradients


def train_vae(
    clips: Clips, pictures: list[np.ndarray], seconds: float, seed: int, log: Callable[[str], None]
) -> AutoencoderKL:
    """Train for `seconds` of wall time; return the averaged weights with `scaling_factor` measured on the clips."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE)
    channels_last(vae)
    averaged = deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    start = time.monotonic()
    for step, pixels in enumerate(_batches(clips, pictures, seed)):
        progress = (time.monotonic() - start) / seconds
        if progress >= 1:
            break
        warmup = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * (0.5 * (1 + np.cos(np.pi * progress)) + 0.01)
        with mixed_precision():
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), vae.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        if step % 100 == 0:
            log(f"vae step {step} loss {loss.item():.4f} {time.monotonic() - start:.0f} s")
    averaged.register_to_config(scaling_factor=_scaling_factor(averaged, clips))
    return averaged


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, clips: Clips) -> float:
    """Return 1 / standard deviation of the latents, so that the diffusion sees unit variance."""
    sample = clips.frames[:: max(1, len(clips.frames) // 64), 0]
    return round(1 / vae.encode(to_pixels(sample)).latent_dist.mode().std().item(), 5)

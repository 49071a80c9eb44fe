"""Recipe, stage 2: trains U-Net, ControlNet and text encoder together, on drawn clips of one person each.

Layer 4, training only. The first frame of a clip is its key frame, as in tuning and rendering, so the base
learns to carry a person's appearance from the key frame to other poses; temporal attention does not exist yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from posecrafter_rt.embedded.architecture import CONTROLNET, SCHEDULER, UNET
from posecrafter_rt.embedded.corpus import Clips
from posecrafter_rt.embedded.train_vae import mixed_precision, to_pixels
from posecrafter_rt.method.noise import shared_noise
from posecrafter_rt.models.blocks import NormScope, channels_last
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.loading import PoseModel, tokenize
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.poses.draw import draw_pose

CLIPS_PER_STEP, FRAMES_PER_CLIP = 4, 4
LEARNING_RATE = 1e-3
EMA_DECAY = 0.999
SHARED_NOISE = 0.5  # a render starts every frame from one noise; in half of the clips frames share some


@dataclass
class Corpus:
    """All that the denoiser trains on.

    latents: (clips, n, 4, h, w) bf16; pose_pictures: (clips, n, H, W, 3) uint8; input_ids: (clips, 77).
    """

    latents: Tensor
    pose_pictures: Tensor
    input_ids: Tensor


@torch.no_grad()
def encode_corpus(clips: Clips, vae: AutoencoderKL, tokenizer: CLIPTokenizer, log: Callable[[str], None]) -> Corpus:
    """Encode every frame once and draw every pose once."""
    num_clips, clip_length, height, width, _ = clips.frames.shape
    latents, pictures = [], np.empty_like(clips.frames)
    for index in range(num_clips):
        with mixed_precision():
            mode = vae.encode(to_pixels(clips.frames[index])).latent_dist.mode()
        latents.append((mode.float() * vae.config.scaling_factor).bfloat16())
        for frame in range(clip_length):
            pictures[index, frame] = draw_pose(clips.keypoints[index, frame], (height, width))
        if index % 500 == 0:
            log(f"encoded {index} of {num_clips} clips")
    return Corpus(
        torch.stack(latents),
        torch.from_numpy(pictures),
        tokenize(tokenizer, clips.captions, tokenizer.model_max_length),
    )


class Denoiser(nn.Module):
    """The networks that stage 2 trains: the text encoder, and clip models around an image U-Net and ControlNet."""

    def __init__(self, text_encoder: CLIPTextModel, norm_scope: NormScope) -> None:
        super().__init__()
        self.image_unet = UNet2DConditionModel(**UNET)
        self.image_controlnet = ControlNetModel(**CONTROLNET)
        for conv in (*self.image_controlnet.controlnet_down_blocks, self.image_controlnet.controlnet_mid_block):
            nn.init.normal_(conv.weight, std=0.02)  # trained from scratch: zero convolutions would only delay it
        nn.init.normal_(self.image_controlnet.controlnet_cond_embedding.conv_out.weight, std=0.05)
        self.text_encoder = text_encoder
        self.unet = VideoUNet(self.image_unet, norm_scope, temporal_attention=False)  # shares the image U-Net's modules
        self.controlnet = VideoControlNet(self.image_controlnet, norm_scope)

    def start_from(self, base: PoseModel) -> None:
        """Take the weights of an earlier run's base."""
        for module, trained in ((self.image_unet, base.unet), (self.image_controlnet, base.controlnet),
                                (self.text_encoder, base.text_encoder)):  # fmt: skip
            weights = trained.state_dict()
            module.load_state_dict({name: weights[name] for name in module.state_dict()})

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor, poses: Tensor) -> Tensor:
        """Predict the velocity of G clips of F frames: latents (G·F, 4, h, w), timesteps (G,), poses (G·F, 3, H, W)."""
        text = self.text_encoder(input_ids).last_hidden_state
        down, mid = self.controlnet(
            latents, self.controlnet.time_projections(timesteps), self.controlnet.text_kv(text),
            self.controlnet.pose_embedding(poses), latents.new_ones(1))  # fmt: skip
        return self.unet(latents, self.unet.time_projections(timesteps), self.unet.text_kv(text), down, mid)


def _sample_batch(corpus: Corpus, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    chosen = rng.integers(len(corpus.latents), size=CLIPS_PER_STEP)
    order = np.argsort(rng.random((CLIPS_PER_STEP, corpus.latents.shape[1])), axis=1)[:, :FRAMES_PER_CLIP]
    latents = corpus.latents[chosen[:, None], order].float()
    poses = corpus.pose_pictures[chosen[:, None], order].flatten(0, 1)
    return latents, poses.permute(0, 3, 1, 2).float().div(255), corpus.input_ids[chosen]


def train_denoiser(
    corpus: Corpus,
    denoiser: Denoiser,
    seconds: float,
    seed: int,
    log: Callable[[str], None],
    snapshot: Callable[[Denoiser], None],
) -> Denoiser:
    """Train for `seconds` of wall time; return the averaged weights. `snapshot` is called every ten minutes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    channels_last(denoiser)
    averaged = deepcopy(denoiser).eval().requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LEARNING_RATE, weight_decay=1e-3, betas=(0.9, 0.99))
    start, last_snapshot, smoothed, step = time.monotonic(), 0.0, 1.0, 0
    while (elapsed := time.monotonic() - start) < seconds:
        warmup, progress = min(1.0, (step + 1) / 200), elapsed / seconds
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * (0.5 * (1 + np.cos(np.pi * progress)) + 0.005)
        latents, poses, input_ids = _sample_batch(corpus, rng)
        noise = shared_noise(latents, SHARED_NOISE)
        timesteps = torch.randint(0, 1000, (CLIPS_PER_STEP,))
        noisy = scheduler.add_noise(latents, noise, timesteps).flatten(0, 1)
        with mixed_precision():
            velocity_pred = denoiser(noisy, timesteps, input_ids, poses)
        velocity = scheduler.get_velocity(latents, noise, timesteps).flatten(0, 1)
        loss = nn.functional.mse_loss(velocity_pred.float(), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(denoiser.parameters()),
                                 1 - min(EMA_DECAY, (step + 1) / (step + 10)))  # fmt: skip
        smoothed += 0.02 * (loss.item() - smoothed)
        step += 1
        if step % 50 == 0:
            log(f"denoiser step {step} loss {smoothed:.4f} {elapsed:.0f} s")
        if elapsed - last_snapshot > 600:
            last_snapshot = elapsed
            snapshot(averaged)
    return averaged

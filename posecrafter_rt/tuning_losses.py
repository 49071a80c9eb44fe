"""Losses of tuning: the denoiser's (Eq. 3), then, if the base asks for it, the decoder's and a small decoder's.

Layer 4. The paper does not tune Stable Diffusion's autoencoder, and neither does any base whose `decoder_steps` is 0. A
small autoencoder has little capacity for colours and contours, but a few frames suffice to fit its decoder to one
person. The encoder is not tuned, so that latents keep their meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.method.noise import shared_noise
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.networks import VaeDecoder
from posecrafter_rt.poses.draw import draw_poses

LATENT_NOISE = 0.2  # at most, in units of the latents' deviation: rendered latents differ a little from encoded ones
ABSOLUTE_WEIGHT = 0.25
LESSONS, LESSONS_A_STEP = 64, 2
CONTOUR_WEIGHT = 0.25  # without it a small decoder blurs more than it needs to
MAX_SHIFT = 3  # latent pixels


@contextmanager
def drawing_on_cpu() -> Iterator[None]:
    """In the block, draw numbers and make tensors on the CPU unless told otherwise, whatever a program's default is.

    Where the CPU is the default, nothing is changed: a change makes every call of torch a little slower.
    """
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@dataclass(frozen=True)
class TrainingSet:
    """The encoded training data, computed once.

    pixels (n, 3, H, W), latents (n, 4, h, w), controlnet_cond (n, 3, H, W), encoder_hidden_states (1, tokens, D).
    """

    pixels: Tensor
    latents: Tensor
    controlnet_cond: Tensor
    encoder_hidden_states: Tensor


@torch.no_grad()
def encode(model: PoseModel, checkpoint: Checkpoint, device: str) -> TrainingSet:
    """Encode a checkpoint's frames, poses and prompt."""
    networks = model.networks()
    pixels = torch.from_numpy(checkpoint.frames).permute(0, 3, 1, 2).to(device).float().div(127.5).sub(1)
    latents = torch.cat([networks["vae_encoder"](frame[None])[0] for frame in pixels])
    pictures = draw_poses(checkpoint.poses, checkpoint.frames.shape[1:3])
    cond = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float().div(255)
    input_ids = model.tokenize([checkpoint.metadata["prompt"]]).to(device)
    return TrainingSet(pixels, latents, cond, networks["text_encoder"](input_ids)[0])


def denoiser_loss(model: PoseModel, data: TrainingSet, generator: torch.Generator, schedule: DDIMSchedule) -> Tensor:
    """Return the loss of Eq. 3 on a minibatch at one timestep: a scalar, float32. generator: on the CPU."""
    settings = model.settings
    chosen = _minibatch(len(data.latents), settings.minibatch, generator)
    latents = data.latents[chosen]
    timestep = draw_timestep(schedule.num_train_timesteps, settings.timestep_exponent, generator)
    noise = shared_noise(latents[None], settings.shared_noise, generator)[0]
    alpha = schedule.alphas_cumprod[timestep].to(latents.device)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = noise if schedule.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    noise_pred = _predict(model, noisy, timestep.to(latents.device), data, chosen)
    return F.mse_loss(noise_pred.float(), target)


def draw_timestep(num_train_timesteps: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Draw a timestep in 0 … num_train_timesteps - 1 with density proportional to t^exponent: int64 (1,)."""
    uniform = torch.rand(1, generator=generator, dtype=torch.float64)
    return (num_train_timesteps * uniform ** (1 / (1 + exponent))).long()


def _minibatch(num_frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw random frames in random order. The first is the key frame, so every training frame serves as one."""
    return torch.randperm(num_frames, generator=generator)[:size]


def _predict(model: PoseModel, noisy: Tensor, timestep: Tensor, data: TrainingSet, chosen: Tensor) -> Tensor:
    unet, controlnet, text = model.unet, model.controlnet, data.encoder_hidden_states
    down, mid = controlnet(
        noisy, controlnet.time_projections(timestep), controlnet.text_kv(text),
        controlnet.pose_embedding(data.controlnet_cond[chosen]), noisy.new_ones(1))  # fmt: skip
    return unet(noisy, unet.time_projections(timestep), unet.text_kv(text), down, mid)


def decoder_parameters(vae: AutoencoderKL) -> dict[str, nn.Parameter]:
    """Return what the decoder's steps train, by `vae.…` name: all layers between scaled latents and pixels."""
    return {f"vae.{name}": parameter for name, parameter in vae.named_parameters()
            if name.startswith(("decoder.", "post_quant_conv."))}  # fmt: skip


def decoder_loss(vae: AutoencoderKL, data: TrainingSet, generator: torch.Generator) -> Tensor:
    """Return the `pixel_loss` of one frame decoded from slightly noisy latents: a scalar, float32.

    It takes a whole frame, not crops of several, because the decoder's norms take their statistics over the picture.
    """
    chosen = torch.randint(len(data.latents), (1,), generator=generator)
    amount = LATENT_NOISE * torch.rand(1, generator=generator, dtype=torch.float32)
    noise = torch.randn(1, *data.latents.shape[1:], generator=generator, dtype=torch.float32)
    disturbed = data.latents[chosen] + (amount * noise).to(data.latents.device)
    decoded = vae.decode(disturbed / vae.config["scaling_factor"]).sample.float()
    return pixel_loss(decoded, data.pixels[chosen])


def pixel_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean squared error plus ABSOLUTE_WEIGHT times the mean absolute error."""
    error = decoded - pixels
    return error.square().mean() + ABSOLUTE_WEIGHT * error.abs().mean()


@dataclass(frozen=True)
class Lessons:
    """Training data of a small decoder: latents (LESSONS, 4, h, w), and the full decoder's output, (…, 3, H, W)."""

    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def teach(vae: AutoencoderKL, data: TrainingSet, generator: torch.Generator) -> Lessons:
    """Make lessons from the training latents: every other is mixed with another, every third shifted, all get noise.

    Rendered latents lie between and near those of training. There the small decoder is to match the full one.
    """
    latents = torch.stack([_lesson(data.latents.cpu(), number, generator) for number in range(LESSONS)])
    latents = latents.to(data.latents.device)
    decoder = VaeDecoder(vae=vae)
    return Lessons(latents, torch.cat([decoder(part)[0].float() for part in latents.split(1)]))


def _lesson(latents: Tensor, number: int, generator: torch.Generator) -> Tensor:
    first, second = latents[torch.randint(len(latents), (2,), generator=generator)]
    drawing: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    share = 0.5 * torch.rand(1, **drawing) if number % 2 else torch.zeros(1, dtype=torch.float32)
    lesson = torch.lerp(first, second, share)
    if number % 3 == 0:
        shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator)
        lesson = lesson.roll((int(shift[0]), int(shift[1])), (1, 2))
    return lesson + LATENT_NOISE * torch.rand(1, **drawing) * torch.randn(lesson.shape, **drawing)


def small_decoder_loss(small_decoder: nn.Module, lessons: Lessons, generator: torch.Generator) -> Tensor:
    """Return the `pixel_loss` of a few lessons plus CONTOUR_WEIGHT times the mean absolute error of their gradients.

    A scalar, float32. generator: on the CPU.
    """
    chosen = torch.randint(len(lessons.latents), (LESSONS_A_STEP,), generator=generator).to(lessons.latents.device)
    decoded, pixels = small_decoder(lessons.latents[chosen]).float(), lessons.pixels[chosen]
    contours = sum((decoded - pixels).diff(dim=dim).abs().mean() for dim in (-1, -2))
    return pixel_loss(decoded, pixels) + CONTOUR_WEIGHT * contours

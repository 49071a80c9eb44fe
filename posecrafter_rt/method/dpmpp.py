"""DPM-Solver++ (2M): solves DDIM's differential equation to second order, and so in fewer steps.

Layer 1: torch, no networks, as `ddim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method.ddim import BeforeStep, Coefficients, DDIMSchedule, Denoise, buffers, ddim_step, walk

Terms = tuple[Coefficients, tuple[float, float, float]]
"""The terms of one step: x_0's `DDIMSchedule.clean_coefficients`; the weights of latents, x_0 and the previous x_0.

The last weight is 0 if there is no previous x_0.
"""


@dataclass(frozen=True)
class DPMSchedule(DDIMSchedule):
    """The same noise levels with the timesteps of diffusers' `DPMSolverMultistepScheduler`.

    With leading and linspace spacing, DDIM spends its last step at timestep 0 or 1, where nothing is left to do. Here
    the timesteps are those of one step more, without the last, so that every step counts.
    """

    def timesteps(self, num_inference_steps: int) -> np.ndarray:
        """As `DDIMSchedule.timesteps`; with linspace spacing at most num_train_timesteps - 1 steps, with leading spacing
        steps_offset fewer.
        """
        if self.timestep_spacing == "trailing":
            return super().timesteps(num_inference_steps)
        last = self.num_train_timesteps - 1 - (self.steps_offset if self.timestep_spacing == "leading" else 0)
        if not 1 <= num_inference_steps <= last:
            raise PoseCrafterError(f"{num_inference_steps} denoising steps were asked for", hint=f"give 1 to {last}")
        return super().timesteps(num_inference_steps + 1)[:-1]

    def sampling_pairs(self, num_inference_steps: int) -> np.ndarray:
        """As `DDIMSchedule.sampling_pairs`, but a step ends at the next one's timestep, the last at the clean end."""
        starts = self.timesteps(num_inference_steps)
        return np.stack([starts, np.append(starts[1:], -1)], axis=1)

    def first_order_weights(self, start: int, end: int) -> tuple[float, float]:
        """Return the weights of latents and x_0: n'/n and s' - s n'/n, with s = sqrt(a), n = sqrt(1 - a)."""
        (signal, noise), (next_signal, next_noise) = self.scales(start), self.scales(end)
        return next_noise / noise, next_signal - signal * next_noise / noise

    def log_ratio(self, timestep: int) -> float:
        """Return l = log(s / n), half the logarithm of the signal-to-noise ratio."""
        signal, noise = self.scales(timestep)
        return math.log(signal / noise)


def dpmpp_terms(
    schedule: DPMSchedule, num_inference_steps: int, *, start_step: int = 0, restart_step: int | None = None
) -> list[Terms]:
    """Return the terms of every sampling step, in order.

    With s = sqrt(a), n = sqrt(1 - a), l = log(s / n), from t to t' (Lu et al. 2022, Algorithm 2):
    x' = n'/n x + (s' - s n'/n) ((1 + q) x_0 - q x_0,before), q = (l' - l) / (2 (l - l_before)).
    The first step that is done has no previous x_0, and at the clean end l' may be infinite: there q = 0, as in DDIM.
    Args: start_step, restart_step: see `dpmpp_sample`.
    """
    pairs = schedule.sampling_pairs(num_inference_steps).tolist()
    first_order = {start_step, restart_step, num_inference_steps - 1}
    terms = []
    for index, (start, end) in enumerate(pairs):
        of_latents, weight = schedule.first_order_weights(start, end)
        share = 0.0 if index in first_order else _extrapolation(schedule, pairs[index - 1][0], start, end)
        terms.append((schedule.clean_coefficients(start), (of_latents, weight * (1 + share), -weight * share)))
    return terms


def _extrapolation(schedule: DPMSchedule, *timesteps: int) -> float:
    """Return q for the timesteps before, of and after a step."""
    before, here, after = map(schedule.log_ratio, timesteps)
    return (after - here) / (2 * (here - before))


def dpmpp_step_(
    latents: Tensor, noise_pred: Tensor, before: Tensor, pred_original_sample: Tensor, terms: Terms
) -> Tensor:
    """Do one step in place.

    Args: latents: **modified in place**; before: the `pred_original_sample` of the previous step, not read if its
        weight is 0; pred_original_sample: **overwritten** by the x_0 of this step. All have one shape and dtype, and
        each has memory of its own.
    Returns: latents.
    """
    to_clean, (of_latents, of_sample, of_before) = terms
    ddim_step(latents, noise_pred, to_clean, out=pred_original_sample)
    latents.mul_(of_latents).add_(pred_original_sample, alpha=of_sample)
    return latents.add_(before, alpha=of_before) if of_before else latents


@torch.no_grad()
def dpmpp_sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: DPMSchedule,
    num_inference_steps: int,
    *,
    start_step: int = 0,
    restart_step: int | None = None,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """Denoise latents deterministically, as diffusers' `DPMSolverMultistepScheduler` does with `euler_at_final`.

    Args: as `ddim_sample`. restart_step: a step before which `before_step` changes the latents, so that the previous
        x_0 is no longer theirs. That step is of first order, like the first one that is done.
    Returns, raises: as `ddim_sample`.
    """
    terms = dpmpp_terms(schedule, num_inference_steps, start_step=start_step, restart_step=restart_step)
    before, pred_original_sample = buffers(latents, 2)

    def step(index: int, state: Tensor, noise_pred: Tensor) -> Tensor:
        nonlocal before, pred_original_sample
        before, pred_original_sample = pred_original_sample, before
        return dpmpp_step_(state, noise_pred, before, pred_original_sample, terms[index])

    timesteps = schedule.timesteps(num_inference_steps).tolist()
    return walk(denoise, latents, timesteps, step, start_step=start_step, before_step=before_step)

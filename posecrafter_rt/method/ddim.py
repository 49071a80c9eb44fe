"""Deterministic DDIM: the schedule, inversion of one latent and sampling (Eq. 4; method steps 2 and 5).

Layer 1: torch, no networks; the denoiser is a callable, so that eager modules and engines look alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.errors import ModelError, PoseCrafterError, ShapeError

log = logging.getLogger(__name__)

Denoise = Callable[[Tensor, int, int], Tensor]
"""(latents, index into `timesteps(num_inference_steps)`, timestep) -> noise prediction, the shape of latents."""

BeforeStep = Callable[[int, Tensor], Tensor]
"""(index, latents before that step) -> the latents to denoise: the given ones, or others of their shape in memory of
their own. Later steps overwrite the given ones."""

Coefficients = tuple[float, float]
"""One step is `c_latents * latents + c_prediction * noise_pred`."""

_CHOICES = {
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
_LEARNED = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
_UNSUPPORTED = ("rescale_betas_zero_snr", "clip_sample", "thresholding", "trained_betas")


@dataclass(frozen=True)
class DDIMSchedule:
    """Noise levels and timesteps of a diffusion model, as a diffusers scheduler config states them.

    A step goes from the noise level of timestep t to that of t - num_train_timesteps // num_inference_steps; a negative
    timestep means the clean end, whose level is 1 (`set_alpha_to_one`) or that of timestep 0. Inversion walks the
    sampler's own steps backwards, so it ends exactly at the sampler's first timestep for every step count and spacing.

    This is diffusers' `DDIMScheduler` with eta = 0 and, for leading and trailing spacing, its `DDIMInverseScheduler`.
    Where diffusers differs: its inverse has no linspace spacing and clips the sample unless told otherwise; its
    trailing table has one entry too many, timestep -1, at step counts where 1000 / n rounds badly (61, 103, ...); and
    leading spacing at 1000 steps with offset 1 reads past the end of its noise levels (here it is refused).
    Raises: ModelError for a setting this runtime does not have.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ModelError(
                    f"the scheduler's {name} is {getattr(self, name)!r}", hint=f"supported are {', '.join(choices)}"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DDIMSchedule:
        """Read a diffusers scheduler config (`scheduler/scheduler_config.json`), whichever sampler it names.

        Absent keys take diffusers' defaults for DDIM, except `clip_sample`, which makes no sense for latents and is
        taken as false. Keys that do not bear on deterministic DDIM are passed over.
        Raises: ModelError for a setting this runtime does not have.
        """
        for name in _UNSUPPORTED:
            if config.get(name):
                raise ModelError(
                    f"the scheduler's {name} is set, which is not supported", hint=f"use a base model without {name}"
                )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in known})

    @property
    def learned(self) -> dict[str, Any]:
        """The settings that a denoiser was trained with, as JSON values. The others only set a sampler's timesteps."""
        return {name: getattr(self, name) for name in _LEARNED}

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The noise levels: float32 (num_train_timesteps,), 1 - share of noise variance, decreasing; on the CPU."""
        return torch.cumprod(1.0 - self._betas(), dim=0)

    def _betas(self) -> Tensor:
        # In float32 throughout, so that the levels are bit for bit those that diffusers trains and samples with.
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float32)
        if self.beta_schedule == "scaled_linear":
            roots = (self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps)
            return torch.linspace(*roots, dtype=torch.float32) ** 2

        def level(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        count = self.num_train_timesteps
        betas = [min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)]
        return torch.tensor(betas, dtype=torch.float32)

    def timesteps(self, num_inference_steps: int) -> np.ndarray:
        """Return the sampler's timesteps, noisiest first.

        Args: num_inference_steps: 1..num_train_timesteps.
        Returns: int64 (num_inference_steps,), descending, each in 0..num_train_timesteps - 1.
        Raises: PoseCrafterError for a step count that the schedule does not allow.
        """
        count, total = num_inference_steps, self.num_train_timesteps
        if not 1 <= count <= total:
            raise PoseCrafterError(f"{count} denoising steps were asked for", hint=f"give 1 to {total}")
        if self.timestep_spacing == "linspace":
            table = np.linspace(0, total - 1, count).round()[::-1].astype(np.int64)
        elif self.timestep_spacing == "leading":
            table = np.arange(count)[::-1].astype(np.int64) * (total // count) + self.steps_offset
        else:
            # Cut to length, because arange appends an entry where the ratio's rounding leaves a remainder.
            table = np.round(np.arange(total, 0, -total / count)[:count]).astype(np.int64) - 1
        if table[0] >= total:
            raise PoseCrafterError(
                f"{count} denoising steps with offset {self.steps_offset} start at timestep {table[0]}, but the model "
                f"knows 0 to {total - 1}",
                hint="use fewer denoising steps",
            )
        return table

    def warn_of_less_noise(self, num_inference_steps: int) -> None:
        """Log a warning if the first timestep lies more than a tenth below what so many steps would suggest.

        Leading spacing rounds the distance between timesteps down, as in diffusers, so 501 steps of 1000 start at 501.
        """
        first, total = int(self.timesteps(num_inference_steps)[0]), self.num_train_timesteps
        if first < 0.9 * (total - total / num_inference_steps):
            log.warning("a schedule of %d steps starts at timestep %d of %d, because timesteps are whole: fewer steps "
                        "start at more noise", num_inference_steps, first, total)  # fmt: skip

    def sampling_pairs(self, num_inference_steps: int) -> np.ndarray:
        """Return timesteps (from, to) of each sampling step: int64 (num_inference_steps, 2); `to` < 0 is clean."""
        starts = self.timesteps(num_inference_steps)
        return np.stack([starts, starts - self.num_train_timesteps // num_inference_steps], axis=1)

    def inversion_pairs(self, num_inference_steps: int, substeps: int = 1, start_step: int = 0) -> np.ndarray:
        """Return timesteps (from, to) of every inversion step, in order: the sampling steps walked backwards.

        The model is evaluated at `to`, the noisier end, as in diffusers' inverse scheduler and in ControlVideo.
        Args:
            substeps: parts into which each step is divided, as far as there are timesteps between its ends.
            start_step: the first step that sampling will do; the inversion ends there.
        Returns: int64 (steps, 2); `from` < 0 is clean; the last `to` is the timestep of `start_step`.
        Raises: PoseCrafterError for fewer than one substep, or a start outside 0..num_inference_steps - 1.
        """
        if substeps < 1:
            raise PoseCrafterError(f"{substeps} substeps of inversion were asked for", hint="give 1 or more")
        if not 0 <= start_step < num_inference_steps:
            raise PoseCrafterError(
                f"sampling was to start at step {start_step} of {num_inference_steps}",
                hint=f"give 0 to {num_inference_steps - 1}",
            )
        divided = []
        for start, end in self.sampling_pairs(num_inference_steps)[start_step:][::-1, ::-1].tolist():
            parts = max(1, min(substeps, end - max(start, 0)))
            stops = np.linspace(max(start, 0), end, parts + 1).round().astype(np.int64)
            stops[0] = start
            divided.append(np.stack([stops[:-1], stops[1:]], axis=1))
        return np.concatenate(divided)

    def inversion_timesteps(self, num_inference_steps: int, substeps: int = 1, start_step: int = 0) -> np.ndarray:
        """Return the timesteps at which the inversion evaluates the model, noisiest first: int64 (steps,)."""
        pairs = self.inversion_pairs(num_inference_steps, substeps, start_step)
        return pairs[::-1, 1].copy()  # torch takes no negative strides

    def sampling_coefficients(self, num_inference_steps: int) -> list[Coefficients]:
        """Return the coefficients that `ddim_step` needs for every sampling step, in order."""
        return [self._coefficients(*pair) for pair in self.sampling_pairs(num_inference_steps).tolist()]

    def inversion_coefficients(
        self, num_inference_steps: int, substeps: int = 1, start_step: int = 0
    ) -> list[Coefficients]:
        """Return the coefficients that `ddim_step` needs for every inversion step, in order."""
        pairs = self.inversion_pairs(num_inference_steps, substeps, start_step)
        return [self._coefficients(*pair) for pair in pairs.tolist()]

    def clean_coefficients(self, timestep: int) -> Coefficients:
        """Return the coefficients of x_0 = c_latents * latents + c_prediction * noise_pred at a timestep."""
        return self._transfer(self.scales(timestep), (1.0, 0.0))

    def _coefficients(self, start: int, end: int) -> Coefficients:
        return self._transfer(self.scales(start), self.scales(end))

    def _transfer(self, scales: tuple[float, float], next_scales: tuple[float, float]) -> Coefficients:
        """Return the coefficients of x' = sqrt(a') x_0 + sqrt(1 - a') eps as a sum of latents and prediction."""
        (signal, noise), (next_signal, next_noise) = scales, next_scales
        if self.prediction_type == "epsilon":  # x_0 = (x - noise * eps) / signal
            return next_signal / signal, next_noise - next_signal * noise / signal
        # x_0 = signal * x - noise * v, eps = noise * x + signal * v
        return next_signal * signal + next_noise * noise, next_noise * signal - next_signal * noise

    def scales(self, timestep: int) -> tuple[float, float]:
        """Return (sqrt(a), sqrt(1 - a)) at a timestep; a negative one is the clean end."""
        level = 1.0 if timestep < 0 and self.set_alpha_to_one else float(self.alphas_cumprod[max(timestep, 0)])
        return math.sqrt(level), math.sqrt(1.0 - level)


def ddim_step(latents: Tensor, noise_pred: Tensor, coefficients: Coefficients, *, out: Tensor | None = None) -> Tensor:
    """Do one step of sampling or inversion: c_latents * latents + c_prediction * noise_pred.

    Args: latents: any shape, fp32 or wider; noise_pred: the same shape, any float dtype; coefficients: Python floats;
        out: **overwritten**, shape and dtype of latents, in memory of its own.
    Returns: out, or a new tensor of that kind.
    Raises: ShapeError if the shapes differ.
    """
    if noise_pred.shape != latents.shape:
        raise ShapeError(
            f"the denoiser gave {tuple(noise_pred.shape)} for latents of {tuple(latents.shape)}",
            hint="the denoiser must return one prediction per latent",
        )
    scale, weight = coefficients
    return torch.mul(latents, scale, out=out).add_(noise_pred, alpha=weight)


@torch.no_grad()
def ddim_invert(
    denoise: Denoise,
    latents: Tensor,
    schedule: DDIMSchedule,
    num_inference_steps: int,
    *,
    substeps: int = 1,
    start_step: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Carry clean latents to the noise that sampling from `start_step` would turn into them (Eq. 4).

    x_to = sqrt(a_to) x_0 + sqrt(1 - a_to) eps, with x_0 from x_from, and eps predicted at (x_from, to).
    Args:
        denoise: the noise prediction; gets latents in their own dtype, and an index into `inversion_timesteps`.
        latents: (f, 4, h, w), VAE-scaled, any float dtype. The arithmetic runs in fp32, or in their dtype if wider.
        schedule: noise levels and timesteps.
        num_inference_steps: of the sampler that the noise is for.
        substeps, start_step: see `DDIMSchedule.inversion_pairs`; 1 and 0 are the paper's.
        progress: called with (steps done, total steps) after each step.
    Returns: the latents at the timestep of `start_step`, dtype and shape of latents, new tensor.
    Raises: PoseCrafterError for an impossible step count or start; ShapeError if the prediction has another shape.
    """
    coefficients = schedule.inversion_coefficients(num_inference_steps, substeps, start_step)
    timesteps = schedule.inversion_timesteps(num_inference_steps, substeps, start_step).tolist()
    (denoise, state), (stepped,) = _in_full_precision(denoise, latents), buffers(latents, 1)
    for done, step in enumerate(coefficients):
        index = len(timesteps) - 1 - done
        noise_pred = denoise(state, index, timesteps[index])
        state, stepped = ddim_step(state, noise_pred, step, out=stepped), state
        if progress is not None:
            progress(done + 1, len(timesteps))
    return state.to(latents.dtype)


@torch.no_grad()
def ddim_sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: DDIMSchedule,
    num_inference_steps: int,
    *,
    start_step: int = 0,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """Denoise latents deterministically (DDIM, eta = 0).

    x_to = sqrt(a_to) x_0 + sqrt(1 - a_to) eps, with x_0 from x_from, and eps predicted at (x_from, from).
    Args:
        denoise: the noise prediction; gets latents in their own dtype.
        latents: (f, 4, h, w) at the noise level of `start_step`, any float dtype. Arithmetic as in `ddim_invert`.
        schedule: noise levels and timesteps.
        num_inference_steps: steps of the whole schedule.
        start_step: the first step to do, 0..num_inference_steps; steps before it count as done.
        before_step: called before step i (counted from 0) with (i, latents in the arithmetic's dtype). It returns the
            latents to denoise, and may edit the given ones in place; later steps overwrite those. This hook does the
            latent edit at step tau, at i = start_step + tau - 1.
    Returns: clean latents, dtype and shape of latents, new tensor.
    Raises: PoseCrafterError for an impossible step count or start; ShapeError if the prediction has another shape.
    """
    coefficients = schedule.sampling_coefficients(num_inference_steps)
    (stepped,) = buffers(latents, 1)

    def step(index: int, state: Tensor, noise_pred: Tensor) -> Tensor:
        nonlocal stepped
        state, stepped = ddim_step(state, noise_pred, coefficients[index], out=stepped), state
        return state

    timesteps = schedule.timesteps(num_inference_steps).tolist()
    return walk(denoise, latents, timesteps, step, start_step=start_step, before_step=before_step)


def walk(
    denoise: Denoise,
    latents: Tensor,
    timesteps: list[int],
    step: Callable[[int, Tensor, Tensor], Tensor],
    *,
    start_step: int = 0,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """Run the loop of every sampler; see `ddim_sample`. Between calls of `denoise` it neither allocates nor waits.

    Args: step: (index, latents before it in the arithmetic's dtype, noise prediction) -> latents after it. It may keep
        and overwrite the memory of the latents before it.
    """
    if not 0 <= start_step <= len(timesteps):
        raise PoseCrafterError(
            f"sampling was to start at step {start_step} of {len(timesteps)}", hint=f"give 0 to {len(timesteps)}"
        )
    denoise, state = _in_full_precision(denoise, latents)
    for index in range(start_step, len(timesteps)):
        edited = state if before_step is None else before_step(index, state)
        if edited is not state:  # it is the caller's, so no step may overwrite it
            state.copy_(edited)
        state = step(index, state, denoise(state, index, timesteps[index]))
    return state.to(latents.dtype)


def buffers(latents: Tensor, count: int) -> list[Tensor]:
    """Allocate memory for latents in the arithmetic's dtype; the contents are undefined."""
    return [torch.empty_like(latents, dtype=_arithmetic_dtype(latents)) for _ in range(count)]


def _in_full_precision(denoise: Denoise, latents: Tensor) -> tuple[Denoise, Tensor]:
    """Return a `denoise` that takes latents in the arithmetic's dtype and casts them back, and a copy in that dtype."""
    state = latents.to(_arithmetic_dtype(latents), copy=True)
    if state.dtype == latents.dtype:
        return denoise, state
    given = torch.empty_like(latents)
    return lambda state, index, timestep: denoise(given.copy_(state), index, timestep), state


def _arithmetic_dtype(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)

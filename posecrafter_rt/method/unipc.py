"""UniPC of second order: every step is corrected by the prediction at its end, which the next step needs anyway.

Layer 1: torch, no networks, as `ddim`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posecrafter_rt.method.ddim import BeforeStep, Coefficients, Denoise, buffers, ddim_step, walk
from posecrafter_rt.method.dpmpp import DPMSchedule

Weights = tuple[float, float, float, float]
"""Weights of the latents, of x_0 there, of x_0 one timestep before, and of x_0 at the step's end (correctors only)."""


class UniPCTerms(NamedTuple):
    """The terms of one step.

    to_clean: x_0's `DDIMSchedule.clean_coefficients`. corrector: the weights that redo the previous step with the x_0
    at its end; None: there is none to correct. predictor: the weights of this step.
    """

    to_clean: Coefficients
    corrector: Weights | None
    predictor: Weights


def unipc_terms(
    schedule: DPMSchedule, num_inference_steps: int, *, start_step: int = 0, restart_step: int | None = None
) -> list[UniPCTerms]:
    """Return the terms of every sampling step, in order (Zhao et al. 2023, with B(h) = e^h - 1, predicting x_0).

    From t to t': x' = n'/n x + s' E (x_0 + d), with s = sqrt(a), n = sqrt(1 - a), l = log(s / n), h = l' - l and
    E = 1 - e^-h. In the predictor d is (x_0,before - x_0) / 2r, with r = (l_before - l) / h < 0. The corrector has
    d = p (x_0,before - x_0) / r + q (x_0' - x_0), with p + q = b_1 and r p + q = b_2 the integrals of the polynomial.
    A step without a previous x_0 has d = 0, and its corrector d = (x_0' - x_0) / 2. At the clean end h may be infinite,
    and no prediction is made there, so the last step is of first order and is not corrected.
    Args: start_step, restart_step: see `unipc_sample`.
    """
    pairs = schedule.sampling_pairs(num_inference_steps).tolist()
    fresh = {start_step, restart_step}
    terms: list[UniPCTerms] = []
    for index, (start, end) in enumerate(pairs):
        is_first_order = index in fresh or index == num_inference_steps - 1
        corrector = None
        if index > start_step and index not in fresh:
            before = None if index - 1 in fresh else pairs[index - 2][0]
            corrector = _corrector(schedule, before, *pairs[index - 1])
        predictor = _predictor(schedule, None if is_first_order else pairs[index - 1][0], start, end)
        terms.append(UniPCTerms(schedule.clean_coefficients(start), corrector, predictor))
    return terms


def _predictor(schedule: DPMSchedule, before: int | None, start: int, end: int) -> Weights:
    of_latents, weight = schedule.first_order_weights(start, end)
    share = 0.0 if before is None else weight / (2 * _ratio(schedule, before, start, end))
    return of_latents, weight - share, share, 0.0


def _corrector(schedule: DPMSchedule, before: int | None, start: int, end: int) -> Weights:
    of_latents, weight = schedule.first_order_weights(start, end)
    if before is None:
        return of_latents, weight / 2, 0.0, weight / 2
    step, ratio = schedule.log_ratio(end) - schedule.log_ratio(start), _ratio(schedule, before, start, end)
    first = 1 / -math.expm1(-step) - 1 / step  # b_1
    second = 2 * (first / -step - 0.5 / math.expm1(-step))  # b_2
    of_before = (first - second) / (1 - ratio)
    of_end = weight * (first - of_before)
    of_before *= weight / ratio
    return of_latents, weight - of_before - of_end, of_before, of_end


def _ratio(schedule: DPMSchedule, before: int, start: int, end: int) -> float:
    """Return r for the timesteps before, of and after a step."""
    earlier, here, after = map(schedule.log_ratio, (before, start, end))
    return (earlier - here) / (after - here)


@torch.no_grad()
def unipc_sample(
    denoise: Denoise,
    latents: Tensor,
    schedule: DPMSchedule,
    num_inference_steps: int,
    *,
    start_step: int = 0,
    restart_step: int | None = None,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """Denoise latents deterministically, as diffusers' `UniPCMultistepScheduler` does with order 2 and `bh2`.

    Its timesteps are those of DPM-Solver++. One prediction, made before the latents are corrected, serves both the
    correction and the next step.
    Args: as `ddim_sample`. restart_step: a step before which `before_step` changes the latents. Nothing computed before
        is theirs any longer, so it starts afresh like the first step.
    Returns, raises: as `ddim_sample`.
    """
    terms = unipc_terms(schedule, num_inference_steps, start_step=start_step, restart_step=restart_step)
    # Of the previous step: the latents it began with; the x_0 predicted at its start, one step earlier, and at its end.
    origin, at_start, before, at_end = buffers(latents, 4)

    def step(index: int, state: Tensor, noise_pred: Tensor) -> Tensor:
        nonlocal origin, at_start, before, at_end
        to_clean, corrector, predictor = terms[index]
        ddim_step(state, noise_pred, to_clean, out=at_end)
        if corrector is not None:
            state, origin = _combine(corrector, origin, (at_start, before, at_end), out=origin), state
        at_start, before, at_end = at_end, at_start, before
        state, origin = _combine(predictor, state, (at_start, before), out=origin), state
        return state

    timesteps = schedule.timesteps(num_inference_steps).tolist()
    return walk(denoise, latents, timesteps, step, start_step=start_step, before_step=before_step)


def _combine(weights: Weights, latents: Tensor, pred_original_samples: tuple[Tensor, ...], *, out: Tensor) -> Tensor:
    """Return the weighted sum in `out`, which may be `latents`. Tensors of weight 0 are not read."""
    combined = torch.mul(latents, weights[0], out=out)
    for weight, pred_original_sample in zip(weights[1:], pred_original_samples, strict=False):
        if weight:
            combined.add_(pred_original_sample, alpha=weight)
    return combined

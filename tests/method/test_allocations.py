"""Between two calls of the denoiser a sampler takes nothing from memory and waits for no number; what is not its own it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posecrafter_rt.method import DDIMSchedule, DPMSchedule, ddim_invert, ddim_sample, dpmpp_sample, unipc_sample
from posecrafter_rt.method.dpmpp import dpmpp_terms
from tests.allocations import Allocations
from tests.method.test_ddim import SD15, latents_of, toy_denoiser

STEPS = 8
SAMPLERS = [(ddim_sample, DDIMSchedule), (dpmpp_sample, DPMSchedule), (unipc_sample, DPMSchedule)]
LOOPS = [
    (ddim_sample, DDIMSchedule, {}), (ddim_sample, DDIMSchedule, {"start_step": 3}),
    (ddim_invert, DDIMSchedule, {}), (ddim_invert, DDIMSchedule, {"substeps": 2, "start_step": 3}),
    (dpmpp_sample, DPMSchedule, {}), (dpmpp_sample, DPMSchedule, {"restart_step": 4}),
    (unipc_sample, DPMSchedule, {}), (unipc_sample, DPMSchedule, {"restart_step": 4}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("run", "kind", "options"), LOOPS)
def test_a_step_allocates_nothing(
    run: Callable[..., Tensor], kind: type[DDIMSchedule], options: dict[str, Any], dtype: torch.dtype
) -> None:
    schedule, steps = kind.from_config(SD15), list[list[str]]()
    toy, latents = toy_denoiser(schedule), latents_of(0, dtype)

    def denoise(latents: Tensor, index: int, timestep: int) -> Tensor:
        steps.append([*allocations.made, *allocations.read])
        allocations.clear()
        with allocations.elsewhere():
            return toy(latents, index, timestep)

    with Allocations() as allocations:
        run(denoise, latents, schedule, STEPS, **options)
    assert len(steps) >= 5 and steps[0]  # before the loop its memory is made
    assert not any(steps[1:]), steps[1:]
    at_the_end = 0 if dtype == torch.float32 else 1  # the result in the type of what was given
    assert len(allocations.made) == at_the_end and not allocations.read


def test_what_the_watcher_looks_for_is_found() -> None:
    numbers, out = torch.zeros(3), torch.zeros(3)
    with Allocations() as allocations:
        torch.add(numbers, 1, out=out).mul_(2)[1:].view(2, 1)
        assert not allocations.made and not allocations.read
        numbers + 1, torch.tensor([1.0]), numbers.clone()
        assert len(allocations.made) == 3 and not allocations.read
        with allocations.elsewhere():
            bool(numbers.clone()[0])
        assert bool(numbers[0]) is False and len(allocations.made) == 3 and len(allocations.read) == 1


@pytest.mark.parametrize(("sample", "kind"), SAMPLERS)
def test_what_a_hook_and_a_denoiser_return_is_left_alone(
    sample: Callable[..., Tensor], kind: type[DDIMSchedule]
) -> None:
    schedule = kind.from_config(SD15)
    prediction, given = latents_of(1), latents_of(2)
    sample(lambda x, i, t: prediction, latents_of(0), schedule, 5, before_step=lambda i, x: given if i in (0, 2) else x)
    assert torch.equal(prediction, latents_of(1)) and torch.equal(given, latents_of(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("run", "kind"), [*SAMPLERS, (ddim_invert, DDIMSchedule)])
def test_a_prediction_may_lie_where_the_latents_do(
    run: Callable[..., Tensor], kind: type[DDIMSchedule], dtype: torch.dtype
) -> None:
    schedule, latents = kind.from_config(SD15), latents_of(0, dtype)
    apart = run(lambda x, i, t: x.clone(), latents, schedule, 5)
    assert torch.equal(run(lambda x, i, t: x, latents, schedule, 5), apart)
    assert torch.equal(latents, latents_of(0, dtype))


def plain_ddim(latents: Tensor, denoise: Callable[..., Tensor], schedule: DDIMSchedule) -> Tensor:
    """Each step as it is written down, in new tensors."""
    for index, (timestep, weights) in enumerate(
        zip(schedule.timesteps(STEPS).tolist(), schedule.sampling_coefficients(STEPS), strict=True)
    ):
        latents = weights[0] * latents + weights[1] * denoise(latents, index, timestep)
    return latents


def plain_dpmpp(latents: Tensor, denoise: Callable[..., Tensor], schedule: DPMSchedule) -> Tensor:
    before = torch.zeros_like(latents)
    for index, (timestep, (to_clean, weights)) in enumerate(
        zip(schedule.timesteps(STEPS).tolist(), dpmpp_terms(schedule, STEPS), strict=True)
    ):
        clean = to_clean[0] * latents + to_clean[1] * denoise(latents, index, timestep)
        latents = weights[0] * latents + weights[1] * clean + weights[2] * before
        before = clean
    return latents


@pytest.mark.parametrize(("sample", "plain", "kind"), [
    (ddim_sample, plain_ddim, DDIMSchedule), (dpmpp_sample, plain_dpmpp, DPMSchedule),
])  # fmt: skip
def test_the_steps_are_those_that_are_written_down(
    sample: Callable[..., Tensor], plain: Callable[..., Tensor], kind: type[DDIMSchedule]
) -> None:
    schedule = kind.from_config(SD15)
    latents, toy = latents_of(0, torch.float64), toy_denoiser(schedule)
    expected = plain(latents, toy, schedule)
    torch.testing.assert_close(sample(toy, latents, schedule, STEPS), expected, rtol=1e-12, atol=1e-12)

"""DPM-Solver++: parity with diffusers, order of convergence, restarts, and what its timesteps are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method import DDIMSchedule, DPMSchedule, ddim_sample, dpmpp_sample
from tests.method.test_ddim import SD15, SPACINGS, latents_of, toy_denoiser

EMBEDDED = {**SD15, "prediction_type": "v_prediction"}
CONFIGS = [
    *({**SD15, "timestep_spacing": spacing} for spacing in SPACINGS),
    *({**EMBEDDED, "timestep_spacing": spacing} for spacing in SPACINGS),
    {**EMBEDDED, "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"},
    {**SD15, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
]


DPMPP = {"algorithm_type": "dpmsolver++", "euler_at_final": True}


def diffusers_sample(name, options, config, denoise, latents, steps, start_step):
    """That of diffusers' scheduler `name`, from `start_step` on; returns the latents and all timesteps."""
    diffusers = pytest.importorskip("diffusers")
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    final = "zero" if config["set_alpha_to_one"] else "sigma_min"
    scheduler = getattr(diffusers, name).from_config(known, solver_order=2, final_sigmas_type=final, **options)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start_step)
    for index, timestep in enumerate(scheduler.timesteps[start_step:], start_step):
        latents = scheduler.step(denoise(latents, index, int(timestep)), timestep, latents).prev_sample
    return latents, scheduler.timesteps.tolist()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.get('timestep_spacing')}-{c.get('prediction_type')}")
@pytest.mark.parametrize(("steps", "start_step"), [(1, 0), (2, 0), (5, 2), (10, 0), (10, 4), (25, 10), (50, 20)])
def test_sampling_agrees_with_diffusers(config, steps, start_step):
    schedule = DPMSchedule.from_config(config)
    denoise = toy_denoiser(schedule)
    expected, timesteps = diffusers_sample(
        "DPMSolverMultistepScheduler", DPMPP, config, denoise, latents_of(0), steps, start_step
    )
    assert schedule.timesteps(steps).tolist() == timesteps
    sampled = dpmpp_sample(denoise, latents_of(0), schedule, steps, start_step=start_step)
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SD15, EMBEDDED], ids=["epsilon", "v_prediction"])
def test_fewer_steps_come_nearer_than_ddims(config):
    schedule = DPMSchedule.from_config(config)
    ddim = DDIMSchedule.from_config(config)
    denoise = toy_denoiser(schedule)
    latents = latents_of(5, torch.float64)
    fine = ddim_sample(denoise, latents, ddim, 999, start_step=0)
    errors = {steps: (dpmpp_sample(denoise, latents, schedule, steps) - fine).abs().mean().item() for steps in (10, 40)}
    errors_ddim = (ddim_sample(denoise, latents, ddim, 40) - fine).abs().mean().item()
    assert errors[40] < errors[10] / 3
    assert errors[40] < errors_ddim / 3


def test_a_restart_forgets_what_was_predicted_before():
    schedule = DPMSchedule.from_config(EMBEDDED)
    denoise, new = toy_denoiser(schedule), latents_of(7)

    def replace(index, latents):
        return new if index == 3 else latents

    restarted = dpmpp_sample(denoise, latents_of(6), schedule, 8, restart_step=3, before_step=replace)
    afresh = dpmpp_sample(denoise, new, schedule, 8, start_step=3)
    torch.testing.assert_close(restarted, afresh)
    assert not torch.allclose(dpmpp_sample(denoise, latents_of(6), schedule, 8, before_step=replace), afresh)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_inversion_ends_where_this_sampler_starts(spacing):
    schedule = DPMSchedule.from_config({**EMBEDDED, "timestep_spacing": spacing})
    for steps in (1, 2, 5, 10, 33):
        starts, pairs = schedule.timesteps(steps), schedule.inversion_pairs(steps, 4)
        assert pairs[-1, 1] == starts[0] and pairs[0, 0] == -1
        assert (pairs[1:, 0] == pairs[:-1, 1]).all() and (np.diff(pairs[:, 1]) > 0).all()
        assert set(starts.tolist()) <= set(pairs[:, 1].tolist())
        assert len(pairs) == 4 * steps  # the step from the clean end is divided, too
    assert starts[-1] > 10  # no step is spent where nothing is left to do


def test_the_latents_given_are_left_alone():
    schedule = DPMSchedule.from_config(EMBEDDED)
    latents = latents_of(0)
    kept = latents.clone()
    dpmpp_sample(toy_denoiser(schedule), latents, schedule, 3, before_step=lambda i, x: x.add_(1))
    assert torch.equal(latents, kept)


@pytest.mark.parametrize("steps", [0, 1000])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(PoseCrafterError, match="denoising steps"):
        DPMSchedule.from_config(SD15).timesteps(steps)


@pytest.mark.parametrize(("change", "last"), [
    ({}, 998), ({"steps_offset": 0}, 999), ({"steps_offset": 2}, 997), ({"timestep_spacing": "linspace"}, 999)])  # fmt: skip
def test_the_most_steps_that_a_refusal_names_can_be_taken(change, last):
    schedule = DPMSchedule.from_config({**SD15, **change})
    assert len(schedule.timesteps(last)) == last and schedule.timesteps(last)[0] == 999
    with pytest.raises(PoseCrafterError, match=f"{last + 1} denoising steps were asked for") as caught:
        schedule.timesteps(last + 1)
    assert caught.value.hint == f"give 1 to {last}"

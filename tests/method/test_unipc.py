"""UniPC: parity with diffusers, how near few steps come, and restarts."""

from __future__ import annotations

import pytest
import torch

from posecrafter_rt.method import DPMSchedule, ddim_sample, dpmpp_sample, unipc_sample
from tests.method.test_ddim import SD15, latents_of, toy_denoiser
from tests.method.test_dpmpp import CONFIGS, EMBEDDED, diffusers_sample

UNIPC = {"solver_type": "bh2", "predict_x0": True}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.get('timestep_spacing')}-{c.get('prediction_type')}")
@pytest.mark.parametrize(
    ("steps", "start_step"), [(1, 0), (2, 0), (3, 0), (5, 2), (10, 0), (10, 4), (25, 10), (50, 20)]
)
def test_sampling_agrees_with_diffusers(config, steps, start_step):
    schedule = DPMSchedule.from_config(config)
    denoise = toy_denoiser(schedule)
    expected, timesteps = diffusers_sample(
        "UniPCMultistepScheduler", UNIPC, config, denoise, latents_of(0), steps, start_step
    )
    assert schedule.timesteps(steps).tolist() == timesteps
    sampled = unipc_sample(denoise, latents_of(0), schedule, steps, start_step=start_step)
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SD15, EMBEDDED], ids=["epsilon", "v_prediction"])
def test_few_steps_come_nearer_than_those_of_the_other_samplers(config):
    schedule = DPMSchedule.from_config(config)
    denoise = toy_denoiser(schedule)
    latents = latents_of(5, torch.float64)
    fine = dpmpp_sample(denoise, latents, schedule, 900)

    def error(sample, steps):
        return (sample(denoise, latents, schedule, steps) - fine).abs().mean().item()

    assert error(unipc_sample, 10) < error(dpmpp_sample, 10)
    assert error(unipc_sample, 40) < error(unipc_sample, 10) / 3
    assert error(unipc_sample, 40) < error(ddim_sample, 40) / 3


def test_a_restart_forgets_what_was_predicted_before():
    schedule = DPMSchedule.from_config(EMBEDDED)
    denoise, new = toy_denoiser(schedule), latents_of(7)

    def replace(index, latents):
        return new if index == 3 else latents

    restarted = unipc_sample(denoise, latents_of(6), schedule, 8, restart_step=3, before_step=replace)
    afresh = unipc_sample(denoise, new, schedule, 8, start_step=3)
    torch.testing.assert_close(restarted, afresh)
    assert not torch.allclose(unipc_sample(denoise, latents_of(6), schedule, 8, before_step=replace), afresh)


def test_the_latents_given_are_left_alone():
    schedule = DPMSchedule.from_config(EMBEDDED)
    latents = latents_of(0)
    kept = latents.clone()
    unipc_sample(toy_denoiser(schedule), latents, schedule, 3, before_step=lambda i, x: x.add_(1))
    assert torch.equal(latents, kept)

"""DDIM: parity with diffusers, the mirror between inversion and sampling, hooks and refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from posecrafter_rt.errors import ModelError, PoseCrafterError, ShapeError
from posecrafter_rt.method import DDIMSchedule, ddim_invert, ddim_sample, ddim_step

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}
SPACINGS = ("leading", "trailing", "linspace")
STEPS = (1, 2, 7, 10, 50)


CONFIGS = [
    *({**SD15, "timestep_spacing": spacing} for spacing in SPACINGS),
    *({**SD15, "timestep_spacing": spacing, "set_alpha_to_one": True, "steps_offset": 0} for spacing in SPACINGS),
    {**SD15, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {**SD15, "beta_schedule": "squaredcos_cap_v2"},
    {**SD15, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
]


def name(config):
    return "-".join(
        str(config.get(key, "")) for key in ("timestep_spacing", "beta_schedule", "steps_offset", "prediction_type")
    )


def toy_denoiser(schedule):
    """The exact answer for pixels drawn from two narrow bumps at -0.5 and 0.7: smooth, nonlinear, of the right size."""
    levels = schedule.alphas_cumprod.double()

    def denoise(latents, index, timestep):
        a = levels[timestep].item()
        x = latents.double()
        centres, variance = torch.tensor([-0.5, 0.7], dtype=torch.float64), 0.2
        spread = a * variance + 1 - a
        offsets = x.unsqueeze(-1) - a**0.5 * centres
        share = torch.softmax(-(offsets**2) / (2 * spread), dim=-1)
        noise = (1 - a) ** 0.5 * (share * offsets).sum(-1) / spread
        if schedule.prediction_type == "v_prediction":
            original = (x - (1 - a) ** 0.5 * noise) / a**0.5
            noise = a**0.5 * noise - (1 - a) ** 0.5 * original
        return noise.to(latents.dtype)

    return denoise


def latents_of(seed, dtype=torch.float32):
    return (torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(seed)) * 0.6).to(dtype)


def diffusers_scheduler(config, inverse):
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.DDIMInverseScheduler if inverse else diffusers.DDIMScheduler
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def run_diffusers(scheduler, denoise, latents, steps):
    scheduler.set_timesteps(steps)
    for index, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(denoise(latents, index, int(timestep)), timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_sampling_agrees_with_diffusers(config, steps):
    schedule = DDIMSchedule.from_config(config)
    scheduler = diffusers_scheduler(config, inverse=False)
    scheduler.set_timesteps(steps)
    assert schedule.timesteps(steps).tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=0)
    denoise = toy_denoiser(schedule)
    expected = run_diffusers(scheduler, denoise, latents_of(0), steps)
    torch.testing.assert_close(ddim_sample(denoise, latents_of(0), schedule, steps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.get("timestep_spacing") != "linspace"], ids=name)
def test_inversion_agrees_with_diffusers(config, steps):
    schedule = DDIMSchedule.from_config(config)
    scheduler = diffusers_scheduler(config, inverse=True)
    denoise = toy_denoiser(schedule)
    expected = run_diffusers(scheduler, denoise, latents_of(1), steps)
    assert schedule.inversion_pairs(steps)[:, 1].tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(ddim_invert(denoise, latents_of(1), schedule, steps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_inversion_ends_at_the_samplers_first_timestep_whatever_the_step_count(config):
    schedule = DDIMSchedule.from_config(config)
    for steps in [*range(1, 130), 200, 250, 333, 499, 500, 777, 998, 999]:
        timesteps = schedule.timesteps(steps)
        assert timesteps.shape == (steps,) and timesteps.dtype == np.int64
        assert (np.diff(timesteps) < 0).all() and timesteps[-1] >= 0 and timesteps[0] < 1000
        pairs = schedule.inversion_pairs(steps)
        assert pairs[-1, 1] == timesteps[0]
        np.testing.assert_array_equal(pairs[::-1, ::-1], schedule.sampling_pairs(steps))


@pytest.mark.parametrize("steps", [1, 3, 50, 999])
def test_the_inverted_latent_has_the_noise_level_of_the_first_timestep(steps):
    # Where no noise is predicted the latents only shrink, so the level that inversion ends at can be read from them.
    schedule = DDIMSchedule.from_config({**SD15, "set_alpha_to_one": True})
    latents = ddim_invert(lambda x, i, t: torch.zeros_like(x), torch.ones(1, 4, 2, 2), schedule, steps)
    start = schedule.sampling_pairs(steps)[-1, 1]
    clean = schedule.alphas_cumprod[start] if start >= 0 else torch.tensor(1.0)
    level = (schedule.alphas_cumprod[schedule.timesteps(steps)[0]] / clean).sqrt()
    torch.testing.assert_close(latents, level.expand_as(latents))


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.get("prediction_type") != "v_prediction"], ids=name)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_round_trip_is_exact_for_a_constant_prediction(config, steps):
    schedule = DDIMSchedule.from_config(config)
    prediction = latents_of(5, torch.float64)
    noise = ddim_invert(lambda x, i, t: prediction, latents_of(2, torch.float64), schedule, steps)
    back = ddim_sample(lambda x, i, t: prediction, noise, schedule, steps)
    torch.testing.assert_close(back, latents_of(2, torch.float64), rtol=1e-6, atol=1e-6)


def test_round_trip_returns_near_the_start_and_nearer_with_more_steps():
    schedule = DDIMSchedule.from_config(SD15)
    denoise = toy_denoiser(schedule)
    errors = []
    for steps in (10, 50, 150):
        back = ddim_sample(denoise, ddim_invert(denoise, latents_of(3), schedule, steps), schedule, steps)
        errors.append((back - latents_of(3)).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.01 and errors[2] < 0.004


def test_the_denoiser_gets_index_and_timestep():
    schedule = DDIMSchedule.from_config(SD15)
    calls = []

    def denoise(latents, index, timestep):
        calls.append((index, timestep))
        return torch.zeros_like(latents)

    ddim_sample(denoise, latents_of(0), schedule, 4)
    assert calls == [(0, 751), (1, 501), (2, 251), (3, 1)]
    calls.clear()
    ddim_invert(denoise, latents_of(0), schedule, 4)
    assert calls == [(3, 1), (2, 251), (1, 501), (0, 751)]


def test_the_hook_runs_before_each_step_and_replaces_the_latents():
    schedule = DDIMSchedule.from_config(SD15)
    denoise = toy_denoiser(schedule)
    seen = []

    def edit(step, latents):
        seen.append(step)
        return latents + 0.25 if step == 2 else latents

    edited = ddim_sample(denoise, latents_of(0), schedule, 5, before_step=edit)
    assert seen == [0, 1, 2, 3, 4]
    states = []
    ddim_sample(denoise, latents_of(0), schedule, 5, before_step=lambda i, x: states.append(x.clone()) or x)
    resumed = ddim_sample(denoise, states[2] + 0.25, schedule, 5, start_step=2)
    torch.testing.assert_close(edited, resumed, rtol=0, atol=0)


def test_a_start_at_the_end_changes_nothing():
    schedule = DDIMSchedule.from_config(SD15)
    latents = latents_of(0)
    torch.testing.assert_close(ddim_sample(toy_denoiser(schedule), latents, schedule, 5, start_step=5), latents)


def test_progress_counts_every_step():
    seen = []
    schedule = DDIMSchedule.from_config(SD15)
    ddim_invert(toy_denoiser(schedule), latents_of(0), schedule, 3, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [ddim_invert, ddim_sample])
def test_half_precision_latents_are_stepped_in_full_precision(dtype, run):
    schedule = DDIMSchedule.from_config(SD15)
    dtypes = []

    def denoise(latents, index, timestep):
        dtypes.append(latents.dtype)
        return torch.full_like(latents, 0.1)

    start = latents_of(0, dtype)
    result = run(denoise, start, schedule, 50)
    assert set(dtypes) == {dtype} and result.dtype == dtype
    weight = torch.full((), 0.1, dtype=dtype).float().item()
    exact = run(lambda x, i, t: torch.full_like(x, weight), start.float(), schedule, 50)
    torch.testing.assert_close(result, exact.to(dtype), rtol=0, atol=0)


def test_the_callers_latents_are_left_alone():
    schedule = DDIMSchedule.from_config(SD15)
    latents = latents_of(0)
    ddim_invert(toy_denoiser(schedule), latents, schedule, 2)
    ddim_sample(toy_denoiser(schedule), latents, schedule, 2, before_step=lambda i, x: x.add_(1))
    torch.testing.assert_close(latents, latents_of(0), rtol=0, atol=0)


def test_trailing_spacing_has_as_many_steps_as_asked():
    schedule = DDIMSchedule.from_config({**SD15, "timestep_spacing": "trailing"})
    for steps in (61, 103, 499, 998):  # at these, rounding makes the naive table one entry too long
        timesteps = schedule.timesteps(steps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50, 100, 200, 250, 333, 500, 999])
def test_a_schedule_that_starts_at_nearly_all_of_the_noise_is_not_warned_of(steps, caplog):
    for spacing in SPACINGS:
        DDIMSchedule.from_config({**SD15, "timestep_spacing": spacing}).warn_of_less_noise(steps)
    assert not caplog.records


@pytest.mark.parametrize(("steps", "first"), [(143, 853), (334, 667), (501, 501)])
def test_a_schedule_that_starts_at_much_less_noise_than_one_of_fewer_steps_is_warned_of(steps, first, caplog):
    schedule = DDIMSchedule.from_config(SD15)
    schedule.warn_of_less_noise(steps)
    assert f"a schedule of {steps} steps starts at timestep {first} of 1000" in caplog.text
    assert schedule.timesteps(steps)[0] == first < schedule.timesteps(steps - 1)[0]


def test_absent_keys_take_the_usual_defaults():
    schedule = DDIMSchedule.from_config({})
    assert schedule == DDIMSchedule() and schedule.set_alpha_to_one and schedule.timestep_spacing == "leading"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rescale_betas_zero_snr", True),
        ("clip_sample", True),
        ("thresholding", True),
        ("trained_betas", [0.1, 0.2]),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "karras"),
    ],
)
def test_refuses_settings_it_does_not_have(key, value):
    with pytest.raises(ModelError, match=key) as caught:
        DDIMSchedule.from_config({**SD15, key: value})
    assert caught.value.hint


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_refuses_step_counts_out_of_range(steps):
    with pytest.raises(PoseCrafterError, match=str(steps)):
        DDIMSchedule.from_config(SD15).timesteps(steps)


def test_refuses_a_table_that_starts_past_the_models_timesteps():
    with pytest.raises(PoseCrafterError, match="1000"):
        DDIMSchedule.from_config(SD15).timesteps(1000)


def test_refuses_a_start_outside_the_schedule():
    with pytest.raises(PoseCrafterError, match="step 6 of 5"):
        ddim_sample(lambda x, i, t: x, latents_of(0), DDIMSchedule.from_config(SD15), 5, start_step=6)


def test_refuses_a_prediction_of_another_shape():
    with pytest.raises(ShapeError, match="denoiser"):
        ddim_step(torch.zeros(2, 4, 3, 3), torch.zeros(1, 4, 3, 3), (1.0, 0.0))


def test_importing_the_method_does_not_import_torch():
    code = "import sys, posecrafter_rt.method as m; assert 'torch' not in sys.modules; m.ddim_invert"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_finer_inversion_passes_through_the_samplers_timesteps(spacing: str) -> None:
    schedule = DDIMSchedule.from_config({**SD15, "timestep_spacing": spacing})
    plain, fine = schedule.inversion_pairs(20), schedule.inversion_pairs(20, 4)
    assert np.array_equal(plain, schedule.sampling_pairs(20)[::-1, ::-1])
    first = 4 if spacing == "trailing" else 1  # the others have no timesteps between the clean end and the last one
    assert len(fine) == first + 19 * 4 and fine[0, 0] == plain[0, 0] and fine[first - 1, 1] == plain[0, 1]
    assert np.array_equal(fine[first::4, 0], plain[1:, 0]) and np.array_equal(fine[first + 3 :: 4, 1], plain[1:, 1])
    assert (np.diff(fine) > 0).all() and (np.diff(fine[:, 1]) > 0).all()
    assert np.array_equal(schedule.inversion_timesteps(20, 4), fine[::-1, 1])
    assert len(schedule.inversion_pairs(20, 10**6)) <= 1000  # no finer than the timesteps are
    with pytest.raises(PoseCrafterError, match="substeps"):
        schedule.inversion_pairs(20, 0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("start_step", [0, 7, 19])
def test_a_partial_inversion_ends_where_sampling_starts(spacing: str, start_step: int) -> None:
    schedule = DDIMSchedule.from_config({**SD15, "timestep_spacing": spacing})
    whole, part = schedule.inversion_pairs(20), schedule.inversion_pairs(20, 1, start_step)
    assert np.array_equal(part, whole[: 20 - start_step])
    assert schedule.inversion_timesteps(20, 3, start_step)[0] == schedule.timesteps(20)[start_step]
    for beyond in (-1, 20):
        with pytest.raises(PoseCrafterError, match="start at step"):
            schedule.inversion_pairs(20, 1, beyond)


def test_a_partial_inversion_and_its_sampling_come_back() -> None:
    schedule = DDIMSchedule.from_config(SD15)
    latents = latents_of(4, torch.float64)

    def denoise(state: torch.Tensor, index: int, timestep: int) -> torch.Tensor:
        return torch.full_like(state, 0.3)  # the same wherever it is asked: then inversion and sampling are exact

    noise = ddim_invert(denoise, latents, schedule, 20, substeps=3, start_step=8)
    assert not torch.allclose(noise, ddim_invert(denoise, latents, schedule, 20, substeps=3))
    torch.testing.assert_close(ddim_sample(denoise, noise, schedule, 20, start_step=8), latents)


def test_a_finer_inversion_comes_back_nearer() -> None:
    schedule = DDIMSchedule.from_config(SD15)
    denoise, latents = toy_denoiser(schedule), latents_of(4, torch.float64)
    errors = []
    for substeps in (1, 4):
        noise = ddim_invert(denoise, latents, schedule, 20, substeps=substeps)
        exact = ddim_invert(denoise, latents, schedule, 20, substeps=1000)
        errors.append((noise - exact).abs().max().item())
    assert errors[1] < 0.5 * errors[0]

import pytest
import torch

from posecrafter_rt.method.noise import shared_noise

LATENTS = torch.empty(64, 4, 4, 16, 16)


def test_it_is_the_same_whatever_type_a_program_has_made_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shared_noise(LATENTS[:2], 0.5, torch.Generator().manual_seed(1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        noise = shared_noise(LATENTS[:2], 0.5, torch.Generator().manual_seed(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32 and torch.equal(noise, expected)


def test_it_is_the_same_whatever_device_a_program_has_made_the_default() -> None:
    latents = LATENTS[:2]
    expected = shared_noise(latents, 0.5, torch.Generator().manual_seed(1))
    torch.set_default_device("meta")
    try:
        noise = shared_noise(latents, 0.5, torch.Generator().manual_seed(1))
    finally:
        torch.set_default_device(None)
    assert torch.equal(noise, expected)


def correlation(noise: torch.Tensor) -> torch.Tensor:
    """Of the first two frames of every clip, (G,)."""
    return (noise[:, 0] * noise[:, 1]).flatten(1).mean(1)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_is_standard_normal_whatever_is_shared(probability: float) -> None:
    noise = shared_noise(LATENTS, probability, torch.Generator().manual_seed(1))
    assert noise.shape == LATENTS.shape and noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.02 and abs(noise.var().item() - 1) < 0.02


def test_frames_share_noise_in_a_random_proportion_of_the_chosen_clips() -> None:
    none, all_clips, half = (shared_noise(LATENTS, p, torch.Generator().manual_seed(2)) for p in (0.0, 1.0, 0.5))
    assert correlation(none).abs().max() < 0.15
    shared = correlation(all_clips)
    assert 0.35 < shared.mean() < 0.65 and shared.min() < 0.15 and shared.max() > 0.85
    unshared = (correlation(half).abs() < 0.1).float().mean()
    assert 0.35 < unshared < 0.8


def test_clips_share_nothing_with_each_other_and_a_seed_repeats() -> None:
    noise = shared_noise(LATENTS, 1.0, torch.Generator().manual_seed(3))
    assert (noise[:-1, 0] * noise[1:, 0]).flatten(1).mean(1).abs().max() < 0.15
    assert torch.equal(noise, shared_noise(LATENTS, 1.0, torch.Generator().manual_seed(3)))

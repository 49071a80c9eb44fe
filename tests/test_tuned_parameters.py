"""How many parameters an identity is made of once a model is folded, and that a refit replaces no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from posecrafter_rt.engines.refit import changed_weights
from posecrafter_rt.engines.tensorrt import in_types_of
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser
from posecrafter_rt.models.loading import PoseModel, load_base, named_parameters
from posecrafter_rt.models.settings import BaseSettings
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.tuning_losses import decoder_parameters

TUNED = "|".join(BaseSettings().trainable)
FOLDED = rf"{TUNED}|\.temporal_out\."  # conv_temp ∘ attn_temp.to_out has become that


def test_61_million_are_left_of_stable_diffusion_15s_72_million() -> None:
    """The tuned parameters of tests/models/test_unet.py, less the `attn_temp.to_out` that folding multiplies away."""
    configs = {name: json.loads((SD15_FOLDER / name / "config.json").read_text()) for name in ("unet", "controlnet")}
    with torch.device("meta"):
        unet = VideoUNet(UNet2DConditionModel.from_config(configs["unet"]))
        controlnet = VideoControlNet(ControlNetModel.from_config(configs["controlnet"]))

    def count(pattern: str) -> int:
        named = [*unet.named_parameters(prefix="unet"), *controlnet.named_parameters(prefix="controlnet")]
        return sum(parameter.numel() for name, parameter in named if re.search(pattern, name))

    before, multiplied = count(TUNED), count(r"\.attn_temp\.to_out\.")
    fold_denoiser(unet)
    assert (before, multiplied, count(FOLDED)) == (72_130_240, 10_763_200, 61_367_040)
    assert count(r"\.conv_temp\.|\.attn_temp\.to_out\.") == 0
    assert all(parameter.is_meta for parameter in unet.parameters())  # counted, not computed


def tuned(base: Path, seed: int, with_decoder: bool) -> PoseModel:
    """A model in which all that tuning may touch has values of its own for each seed, folded."""
    model, generator = load_base(str(base)), torch.Generator().manual_seed(seed)
    touched = {name for name, _ in named_parameters(model) if re.search(TUNED, name)}
    if with_decoder:
        touched |= set(decoder_parameters(model.vae))
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if name in touched:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.tuned = frozenset(touched)
    model.fold()
    return model


@pytest.mark.parametrize("with_decoder", [False, True], ids=["denoiser", "decoder too"])
def test_a_refit_replaces_them_and_what_was_tuned_of_the_decoder(tiny_base: Path, with_decoder: bool) -> None:
    source, other = (tuned(tiny_base, seed, with_decoder) for seed in (1, 2))
    networks, replaced = source.networks(), set()
    for name, network in other.networks().items():
        stored = {key: parameter.detach() for key, parameter in networks[name].named_parameters()}
        replaced |= set(changed_weights(in_types_of(stored, network), stored))
    of_decoder = set(decoder_parameters(other.vae)) if with_decoder else set()
    assert replaced == {name for name, _ in named_parameters(other) if re.search(FOLDED, name)} | of_decoder
    assert replaced == other.tuned  # which lies apart from the base's weights, where a backend does that

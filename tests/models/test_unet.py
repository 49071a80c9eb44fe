"""The inflated U-Net: diffusers' own for one frame, and every identity that lets the runtime compute things once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from posecrafter_rt.errors import ModelError, ShapeError
from posecrafter_rt.method import DDIMSchedule, ddim_invert, ddim_sample
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.models.settings import BaseSettings
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.models.unet import VideoUNet

EXACT = {"rtol": 1e-4, "atol": 1e-5}  # one computation in another order, in float32


@pytest.fixture
def diffusers_unet(tiny_base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval()


@pytest.fixture
def diffusers_controlnet(tiny_base: Path) -> ControlNetModel:
    return ControlNetModel.from_pretrained(tiny_base / "controlnet").eval()


@pytest.mark.parametrize("norm_scope", ["clip", "frame"])
@torch.no_grad()
def test_one_frame_equals_diffusers(norm_scope, tiny_base, diffusers_unet, diffusers_controlnet, clip, predict) -> None:
    model = load_base(str(tiny_base), norm_scope=norm_scope)  # conv_temp is zero
    inputs = clip(1)
    down, mid = diffusers_controlnet(
        inputs["latents"], 500, inputs["encoder_hidden_states"], inputs["controlnet_cond"], return_dict=False
    )
    expected = diffusers_unet(
        inputs["latents"], 500, inputs["encoder_hidden_states"],
        down_block_additional_residuals=down, mid_block_additional_residual=mid).sample  # fmt: skip
    torch.testing.assert_close(predict(model, **inputs), expected, **EXACT)


@torch.no_grad()
def test_one_frame_without_controlnet_equals_diffusers(tiny_base, diffusers_unet, clip) -> None:
    unet, inputs = load_base(str(tiny_base)).unet, clip(1)
    text = inputs["encoder_hidden_states"]
    found = unet(inputs["latents"], unet.time_projections(torch.tensor([3])), unet.text_kv(text))
    torch.testing.assert_close(found, diffusers_unet(inputs["latents"], 3, text).sample, **EXACT)


@torch.no_grad()
def test_the_key_frame_alone_is_diffusers_image(tiny_base, diffusers_unet, clip) -> None:
    """With zero conv_temp the key frame does not see the others, and they see it instead of themselves."""
    unet, inputs = load_base(str(tiny_base)).unet, clip(3)
    text = inputs["encoder_hidden_states"]
    found = unet(inputs["latents"], unet.time_projections(torch.tensor([3])), unet.text_kv(text))
    expected = diffusers_unet(inputs["latents"], 3, text.expand(3, -1, -1)).sample
    torch.testing.assert_close(found[:1], expected[:1], **EXACT)
    assert not torch.allclose(found[1:], expected[1:], atol=1e-3)


@torch.no_grad()
def test_sampling_equals_the_diffusers_pipeline(tiny_base, diffusers_unet, diffusers_controlnet, clip, predict) -> None:
    model, inputs = load_base(str(tiny_base)), clip(1)
    scheduler = DDIMScheduler(**{key: value for key, value in model.scheduler_config.items() if key[0] != "_"})
    pipeline = StableDiffusionControlNetPipeline(
        vae=AutoencoderKL.from_pretrained(tiny_base / "vae"), unet=diffusers_unet, controlnet=diffusers_controlnet,
        text_encoder=CLIPTextModel.from_pretrained(tiny_base / "text_encoder"), scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_base / "tokenizer"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a person waving", image=inputs["controlnet_cond"], latents=inputs["latents"],
        num_inference_steps=5, guidance_scale=1.0, output_type="np").images  # fmt: skip
    networks = model.networks()
    (text,) = networks["text_encoder"](model.tokenize(["a person waving"]))

    def denoise(latents, index, timestep):
        return predict(model, latents, inputs["controlnet_cond"], text, timestep)

    latents = ddim_sample(denoise, inputs["latents"], DDIMSchedule.from_config(model.scheduler_config), 5)
    pixels = networks["vae_decoder"](latents)[0].div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels, expected, atol=2e-4)


@pytest.mark.parametrize("norm_scope", ["clip", "frame"])
@torch.no_grad()
def test_inverting_identical_frames_equals_inverting_one(norm_scope, make_tiny_model, clip, predict) -> None:
    model, inputs = make_tiny_model(norm_scope), clip(1)
    schedule = DDIMSchedule.from_config(model.scheduler_config)

    def invert(frames: int) -> torch.Tensor:
        poses = inputs["controlnet_cond"].expand(frames, -1, -1, -1)

        def denoise(latents, index, timestep):
            return predict(model, latents, poses, inputs["encoder_hidden_states"], timestep)

        return ddim_invert(denoise, inputs["latents"].expand(frames, -1, -1, -1), schedule, 4)

    torch.testing.assert_close(invert(3), invert(1).expand(3, -1, -1, -1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_norm_scopes_agree_on_one_frame_and_differ_on_several(make_tiny_model, clip, predict) -> None:
    models = [make_tiny_model(scope) for scope in ("clip", "frame")]
    one, several = ([predict(model, **clip(frames)) for model in models] for frames in (1, 3))
    torch.testing.assert_close(*one, **EXACT)
    assert not torch.allclose(*several, atol=1e-3)


@pytest.mark.parametrize("norm_scope", ["clip", "frame"])
@torch.no_grad()
def test_groups_do_not_mix(norm_scope, make_tiny_model, clip, predict) -> None:
    """Two guidance passes in one batch equal two batches."""
    model, first, second = make_tiny_model(norm_scope), clip(3, seed=1), clip(3, seed=2)
    together = {name: torch.cat([first[name], second[name]]) for name in first}
    expected = torch.cat([predict(model, **first), predict(model, **second)])
    torch.testing.assert_close(predict(model, **together), expected, **EXACT)


@torch.no_grad()
def test_a_shared_pose_may_be_given_once_a_frame_or_expanded(tiny_model, clip, predict) -> None:
    inputs = clip(2)
    inputs["controlnet_cond"] = inputs["controlnet_cond"][:1].expand(2, -1, -1, -1)
    broadcast = {**inputs, "controlnet_cond": inputs["controlnet_cond"][:1]}
    torch.testing.assert_close(predict(tiny_model, **broadcast), predict(tiny_model, **inputs), **EXACT)


@torch.no_grad()
def test_time_tables_equal_one_timestep_at_a_time(tiny_model) -> None:
    timesteps = torch.tensor([981, 501, 1])
    for network in (tiny_model.unet, tiny_model.controlnet):
        table = network.time_projections(timesteps)
        assert table.shape == (3, network.time_width)
        rows = [network.time_projections(timestep[None]) for timestep in timesteps]
        torch.testing.assert_close(table, torch.cat(rows), rtol=1e-5, atol=1e-6)
        embedding = torch.nn.functional.silu(network.time_embedding(network.time_proj(timesteps)))
        for resnet in network.resnets():  # what diffusers' block computes in its own forward
            torch.testing.assert_close(table[:, resnet.time_slice], resnet.time_emb_proj(embedding))


@torch.no_grad()
def test_text_tables_hold_every_layers_keys_and_values(tiny_model, clip) -> None:
    text = clip(1)["encoder_hidden_states"]
    for network in (tiny_model.unet, tiny_model.controlnet):
        table = network.text_kv(text)
        assert table.shape == (1, 77, network.kv_width)
        for block in network.transformer_blocks():
            key, value = table[..., block.kv_slice].chunk(2, dim=-1)
            torch.testing.assert_close(key, block.attn2.to_k(text))
            torch.testing.assert_close(value, block.attn2.to_v(text))


@pytest.mark.parametrize("norm_scope", ["clip", "frame"])
def test_gradient_checkpointing_changes_no_gradient(norm_scope, make_tiny_model, clip, predict) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_tiny_model(norm_scope)
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.controlnet.enable_gradient_checkpointing()
        tuned = [parameter for name, parameter in named_parameters(model)
                 if re.search("|".join(model.settings.trainable), name)]  # fmt: skip
        for parameter in tuned:
            parameter.requires_grad_(True)
        predict(model, **clip(2)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuned)
        gradients.append([parameter.grad for parameter in tuned])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


def test_temporal_attention_is_in_down_and_up_blocks_only_and_starts_as_attn1(tiny_base: Path) -> None:
    model = load_base(str(tiny_base))
    names = {name.rsplit(".attn_temp", 1)[0] for name, _ in named_parameters(model) if ".attn_temp." in name}
    blocks = {name.rsplit(".attn2", 1)[0] for name, _ in named_parameters(model) if ".attn2." in name}
    assert names == {name for name in blocks if re.match(r"unet\.(down|up)_blocks", name)}
    for block in model.unet.transformer_blocks():
        if hasattr(block, "attn_temp"):
            for name, tensor in block.attn1.state_dict().items():
                assert torch.equal(tensor, block.attn_temp.state_dict()[name])
            assert not block.conv_temp.weight.any() and not block.conv_temp.bias.any()


def test_frames_that_do_not_divide_into_groups(tiny_model, clip) -> None:
    unet, inputs = tiny_model.unet, clip(3)
    text = inputs["encoder_hidden_states"].expand(2, -1, -1)
    with pytest.raises(ShapeError, match="3 frames do not divide into 2"):
        unet(inputs["latents"], unet.time_projections(torch.tensor([1])), unet.text_kv(text))


@torch.no_grad()
def test_residuals_are_those_of_a_whole_controlnet_or_none(tiny_model, clip) -> None:
    unet, inputs = tiny_model.unet, clip(1)
    latents, text_kv = inputs["latents"], unet.text_kv(inputs["encoder_hidden_states"])
    time_projections = unet.time_projections(torch.tensor([1]))
    *down, mid = tiny_model.networks()["controlnet"](
        latents, tiny_model.controlnet.time_projections(torch.tensor([1])),
        tiny_model.controlnet.text_kv(inputs["encoder_hidden_states"]),
        tiny_model.controlnet.pose_embedding(inputs["controlnet_cond"]), torch.ones(1))  # fmt: skip
    assert unet(latents, time_projections, text_kv, down, mid).shape == latents.shape
    for given in ((down,), ((), mid), (down[1:], mid), ([*down, mid], mid)):
        with pytest.raises(ShapeError, match=rf"\d+ residuals .* of {len(down) + 1}$"):
            unet(latents, time_projections, text_kv, *given)


def test_a_network_of_another_kind_is_refused() -> None:
    with torch.device("meta"):
        other = UNet2DConditionModel(
            block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), norm_num_groups=8,
            up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, attention_head_dim=2, cross_attention_dim=8,
            class_embed_type="timestep")  # fmt: skip
    with pytest.raises(ModelError, match="class_embed_type"):
        VideoUNet(other)


def test_parameter_counts_at_stable_diffusion_15_size() -> None:
    """The paper's 68.79M (of 2 ** 20) trainable and 1.48e9 parameters in all."""
    configs = {
        name: json.loads((SD15_FOLDER / name / "config.json").read_text()) for name in ("unet", "controlnet", "vae")
    }
    with torch.device("meta"):
        unet = VideoUNet(UNet2DConditionModel.from_config(configs["unet"]))
        controlnet = VideoControlNet(ControlNetModel.from_config(configs["controlnet"]))
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15_FOLDER / "text_encoder"))
    counts = [sum(p.numel() for p in m.parameters()) for m in (unet, controlnet, vae, text_encoder)]
    assert counts == [913_303_364, 361_279_120, 83_653_863, 123_060_480]
    assert round(sum(counts) / 1e9, 2) == 1.48
    patterns = "|".join(BaseSettings().trainable)
    named = [*((f"unet.{n}", p) for n, p in unet.named_parameters()),
             *((f"controlnet.{n}", p) for n, p in controlnet.named_parameters())]  # fmt: skip
    assert sum(parameter.numel() for name, parameter in named if re.search(patterns, name)) == 72_130_240

"""Every network keeps the contract of `spec`, and computes what diffusers' and transformers' modules do."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextModel

from posecrafter_rt.models.doubling import fold_doubling
from posecrafter_rt.models.folding import NormSilu, fold_pair, fuse_norms
from posecrafter_rt.models.networks import UNetShallowStream, UNetStream, attention_layers, residual_layers
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.spec import Architecture, network_specs
from tests.conftest import TINY_UNET
from tests.tiny import NETWORKS

EXACT = {"rtol": 1e-4, "atol": 1e-5}
DTYPES = {"int64": torch.int64, "bool": torch.bool}
SIZES = {"frames": 3, "groups": 1, "steps": 5, "window": 3, "height": 32, "width": 48}


def _size(dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    name, _, divisor = dim.partition("/")
    return SIZES[name] // int(divisor or 1)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_forward_takes_and_returns_what_the_spec_lists(name: str, tiny_model) -> None:
    spec, generator = network_specs(tiny_model.architecture())[name], torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 2 if tensor.dtype == "bool" else 500, shape, generator=generator).to(DTYPES[tensor.dtype])
        if tensor.dtype in DTYPES else torch.randn(shape, generator=generator)
        for tensor in spec.inputs for shape in [tuple(map(_size, tensor.dims))]
    ]  # fmt: skip
    outputs = tiny_model.networks()[name](*inputs)
    assert [tuple(output.shape) for output in outputs] == [tuple(map(_size, tensor.dims)) for tensor in spec.outputs]
    assert all(output.dtype == torch.float32 and output.isfinite().all() for output in outputs)


def test_networks_have_the_specs_names_and_share_their_weights(tiny_model) -> None:
    networks = tiny_model.networks()
    assert tuple(networks) == NETWORKS
    unet = dict(networks["unet"].named_parameters())
    assert all(unet[name] is tensor for name, tensor in networks["prompt_kv"].named_parameters() if name in unet)
    assert {name.split(".")[0] for network in networks.values() for name, _ in network.named_parameters()} == {
        "unet", "controlnet", "vae", "text_encoder"}  # fmt: skip


def test_architecture_reads_the_sizes_and_survives_json(tiny_model) -> None:
    architecture = tiny_model.architecture()
    assert architecture.vae_scale_factor == 2 and architecture.size_multiple == 4
    assert (architecture.text_tokens, architecture.text_channels, architecture.latent_channels) == (77, 32, 4)
    assert architecture.residuals == ((32, 1), (32, 1), (32, 2), (64, 2)) and architecture.mid_residual == (64, 2)
    assert architecture.keyframe_layers == (((32, 1), (64, 2), (32, 1), (32, 1)), ((32, 1), (64, 2)))
    assert architecture.temporal_layers == ((32, 1), (32, 1), (32, 1))
    assert Architecture.from_json(architecture.to_json()) == architecture


@torch.no_grad()
def test_vae_equals_diffusers_and_takes_the_mode(tiny_base, tiny_model) -> None:
    vae, networks = AutoencoderKL.from_pretrained(tiny_base / "vae").eval(), tiny_model.networks()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (latents,) = networks["vae_encoder"](pixels)
    torch.testing.assert_close(latents, vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor, **EXACT)
    (decoded,) = networks["vae_decoder"](latents)
    torch.testing.assert_close(decoded, vae.decode(latents / vae.config.scaling_factor).sample, **EXACT)


@torch.no_grad()
def test_text_encoder_equals_transformers(tiny_base, tiny_model) -> None:
    input_ids = tiny_model.tokenize(["a person waving", "a red hat"])
    assert input_ids.shape == (2, 77) and input_ids.dtype == torch.int64
    expected = CLIPTextModel.from_pretrained(tiny_base / "text_encoder").eval()(input_ids).last_hidden_state
    (found,) = tiny_model.networks()["text_encoder"](input_ids)
    torch.testing.assert_close(found, expected, **EXACT)


def test_long_prompts_are_cut(tiny_model) -> None:
    assert tiny_model.tokenize(["person " * 200]).shape == (1, 77)


@torch.no_grad()
def test_folding_keeps_the_dtype(tiny_model) -> None:
    model = tiny_model.to(dtype=torch.bfloat16)
    model.fold()
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_the_feed_forward_in_parts_is_the_whole(tiny_model, clip, predict, monkeypatch) -> None:
    inputs = clip(5)
    expected = predict(tiny_model, **inputs)
    monkeypatch.setattr("posecrafter_rt.models.blocks.FEED_FORWARD_TOKENS", 2 * inputs["latents"][0, 0].numel())
    torch.testing.assert_close(predict(tiny_model, **inputs), expected, **EXACT)


@torch.no_grad()
def test_folding_the_temporal_output_changes_nothing(tiny_model, clip, predict) -> None:
    model, inputs = tiny_model, clip(3)
    expected = predict(model, **inputs)
    names = {name for name, _ in model.unet.named_parameters()}
    model.fold()
    torch.testing.assert_close(predict(model, **inputs), expected, **EXACT)
    folded = {name for name, _ in model.unet.named_parameters()}
    assert not any(".conv_temp." in name or ".attn_temp.to_out." in name for name in folded)
    assert {name.replace(".temporal_out.", ".conv_temp.") for name in folded} <= names
    assert any(isinstance(module, torch.nn.ConvTranspose2d) for module in model.unet.modules())
    once = deepcopy(model.unet.state_dict())
    model.fold()  # nothing is left to fold
    assert once.keys() == model.unet.state_dict().keys()


@torch.no_grad()
def test_folding_the_upsamplers_changes_nothing(tiny_model) -> None:
    networks, latents = tiny_model.networks(), torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    (expected,) = networks["vae_decoder"](latents)
    convolutions = [m for m in tiny_model.vae.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    tiny_model.fold()
    torch.testing.assert_close(networks["vae_decoder"](latents)[0], expected, **EXACT)
    folded = [m for part in (tiny_model.vae, tiny_model.unet) for m in part.modules()
              if isinstance(m, torch.nn.ConvTranspose2d)]  # fmt: skip
    assert not convolutions and [tuple(m.weight.shape[2:]) for m in folded] == [(4, 4)] * 2


@torch.no_grad()
def test_fusing_the_norms_of_the_vae_changes_nothing(tiny_model) -> None:
    networks, generator = tiny_model.networks(), torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 48, generator=generator)
    for parameter in tiny_model.vae.parameters():  # norms that do something
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    names = set(tiny_model.vae.state_dict())
    (expected,) = networks["vae_encoder"](pixels)
    fuse_norms(tiny_model.vae)
    torch.testing.assert_close(networks["vae_encoder"](pixels)[0], expected, **EXACT)
    assert set(tiny_model.vae.state_dict()) == names
    assert sum(isinstance(module, NormSilu) for module in tiny_model.vae.modules()) == 2 * sum(
        isinstance(module, ResnetBlock2D) for module in tiny_model.vae.modules()) + 2  # fmt: skip


def test_fold_doubling_is_the_composition_at_the_borders_too() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    for height, width in ((1, 1), (1, 4), (6, 3)):
        picture = torch.randn(2, 3, height, width, generator=generator)
        doubled = torch.nn.functional.interpolate(picture, scale_factor=2.0, mode="nearest")
        expected = torch.nn.functional.conv2d(doubled, weight, padding=1)
        found = torch.nn.functional.conv_transpose2d(picture, fold_doubling(weight), stride=2, padding=1)
        torch.testing.assert_close(found, expected, **EXACT)


def test_fold_pair_is_the_composition() -> None:
    generator = torch.Generator().manual_seed(0)
    outer, inner = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
    weight, bias = fold_pair(outer.weight, outer.bias, inner.weight, inner.bias)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(x @ weight.T + bias, outer(inner(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attends", [True, False])
@torch.no_grad()
def test_a_streams_last_layer_alone_is_the_whole_on_features_of_the_same_step(attends: bool) -> None:
    """Also in a base whose last layer attends to nothing."""
    kinds = ("down_block_types", "up_block_types")
    types = {name: TINY_UNET[name] if attends else TINY_UNET[name][::-1] for name in kinds}
    torch.manual_seed(0)
    unet = VideoUNet(UNet2DConditionModel.from_config({**TINY_UNET, **types})).eval()
    unet.gives_deep_features = True
    layers, sides = attention_layers(unet), lambda scale: (16 // scale, 16 // scale)
    assert (layers[-1][1] == 1) == attends
    latents, mask = torch.randn(2, 4, 16, 16), torch.rand(2, 3) < 0.5
    time, text_kv = torch.randn(2, unet.time_width), torch.randn(1, 77, unet.kv_width)
    residuals = [torch.randn(2, channels, *sides(scale)) for channels, scale in (*residual_layers(unet), (64, 2))]
    keyframe = [torch.randn(2, *sides(scale), 2 * channels) for channels, scale, _ in layers]
    temporal = [
        torch.randn(2, 3, *sides(scale), 2 * channels) for channels, scale, is_temporal in layers if is_temporal
    ]
    told = (torch.zeros(2, dtype=torch.bool), mask)  # neither is the reference
    noise_pred, deep, *new = UNetStream(unet)(latents, time, text_kv, *told, *residuals, *keyframe, *temporal)
    attended = (mask, keyframe[-1], temporal[-1]) if attends else ()
    found, *kept = UNetShallowStream(unet=unet)(latents, time, text_kv, deep, residuals[0], *attended)
    assert torch.equal(found, noise_pred) and len(kept) == attends
    assert all(map(torch.equal, kept, new[-1:]))
    others = UNetShallowStream(unet=unet)(latents, time, text_kv, deep.flip(0), residuals[0], *attended)[0]
    assert not torch.allclose(others, noise_pred, atol=1e-2)

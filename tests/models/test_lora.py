"""LoRA files under every family of names, fused to exactly W + delta; and what is refused, before anything changes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.untrained import shapes_only
from posecrafter_rt.errors import CheckpointError
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.lora import Lora, _weights, fuse_loras, read_lora
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.models.unet import VideoUNet

Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]
RESNET = "down_blocks.0.resnets.0.conv1"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def kohya(role: str, layer: str) -> tuple[str, str, str]:
    prefix = "lora_unet_" if role == "unet" else "lora_te_text_model_"
    name = prefix + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(role: str, layer: str) -> tuple[str, str, str]:
    name = f"{role}.{layer}" if role == "unet" else f"{role}.text_model.{layer}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def diffusers(role: str, layer: str) -> tuple[str, str, str]:
    name = peft(role, layer)[0].removesuffix(".lora_A.weight")
    inner = "lora" if role == "unet" else "lora_linear_layer"
    return f"{name}.{inner}.down.weight", f"{name}.{inner}.up.weight", f"{name}.alpha"


FAMILIES = [kohya, peft, diffusers]


def tensors_of(factors: Factors, family: Callable = kohya, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {}
    for place, pair in factors.items():
        down, up, scalar = family(*place)
        tensors |= dict(zip((down, up), pair, strict=True))
        if alpha is not None:
            tensors[scalar] = torch.tensor(alpha)
    return tensors


def weights_of(model: PoseModel) -> dict[tuple[str, str], Tensor]:
    """Copies of every parameter of all four networks."""
    return {(role, name.removeprefix("text_model.")): parameter.clone()
            for role, module in model.modules().items() for name, parameter in module.named_parameters()}  # fmt: skip


def fuse(model: PoseModel, path: Path, scale: float = 1.0) -> None:
    fuse_loras(model, [read_lora(Lora(path, scale))])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(tensors, header=None) -> a .safetensors file."""

    def save(tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
        save_file(tensors, tmp_path / "style.safetensors", header)
        return tmp_path / "style.safetensors"

    return save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_every_weight_is_exactly_the_sum(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path], family: Callable, alpha: float | None
) -> None:
    before = weights_of(tiny_model)
    fuse(tiny_model, write(tensors_of(tiny_factors, family, alpha)), 0.7)
    factor = 0.7 * (2 if alpha is None else alpha) / 2
    changed = {(role, f"{layer}.weight"): pair for (role, layer), pair in tiny_factors.items()}
    for place, weight in weights_of(tiny_model).items():
        expected = before[place]
        if place in changed:
            down, up = (tensor.flatten(1) for tensor in changed[place])
            expected = expected + factor * (up @ down).reshape(expected.shape)
            assert not torch.equal(weight, before[place])
        assert torch.equal(weight, expected), place  # the ControlNet, the VAE and attn_temp among them


def test_diffusers_own_converter_means_the_same_layers(
    tiny_model: PoseModel, make_tiny_model: Callable[..., PoseModel], tiny_factors: Factors, write: Callable[..., Path]
) -> None:
    """It turns kohya-ss' names into those of diffusers' first attention processors; both are read alike."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    tensors, other = tensors_of(tiny_factors), make_tiny_model()
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert not alphas and any(".processor.to_q_lora." in name for name in converted)
    assert any(".self_attn.to_q_lora." in name for name in converted)
    fuse(tiny_model, write(tensors))
    fuse(other, write(converted))
    ours, theirs = weights_of(tiny_model), weights_of(other)
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)


@torch.no_grad()
@pytest.mark.parametrize("layer", [RESNET, "down_blocks.0.downsamplers.0.conv", "down_blocks.0.attentions.0.proj_in"])
def test_a_fused_convolution_is_the_three_convolutions(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path], layer: str
) -> None:
    module = tiny_model.unet.get_submodule(layer)
    assert isinstance(module, nn.Conv2d)
    pixels = torch.randn(1, module.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    down, up = tiny_factors["unet", layer]
    low = nn.functional.conv2d(pixels, down, None, module.stride, module.padding)
    expected = module(pixels) + 0.5 * nn.functional.conv2d(low, up)
    fuse(tiny_model, write(tensors_of({("unet", layer): (down, up)})), 0.5)
    assert torch.allclose(module(pixels), expected, atol=1e-5)


def test_a_linear_layers_factors_may_be_written_as_convolutions(
    tiny_model: PoseModel, make_tiny_model: Callable[..., PoseModel], tiny_factors: Factors, write: Callable[..., Path]
) -> None:
    pair, other = tiny_factors["unet", QUERY], make_tiny_model()
    fuse(tiny_model, write(tensors_of({("unet", QUERY): pair})))
    fuse(other, write(tensors_of({("unet", QUERY): (pair[0][:, :, None, None], pair[1][:, :, None, None])})))
    assert torch.equal(tiny_model.unet.get_submodule(QUERY).weight, other.unet.get_submodule(QUERY).weight)


def test_16_bit_factors_are_multiplied_in_float32(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path]
) -> None:
    down, up = (factor.half() for factor in tiny_factors["unet", QUERY])
    weight = tiny_model.unet.get_submodule(QUERY).weight
    expected = weight + up.float() @ down.float()
    fuse(tiny_model, write(tensors_of({("unet", QUERY): (down, up)})))
    assert torch.equal(weight, expected) and not torch.equal(expected, expected.half())


def test_the_order_of_several_changes_rounding_alone(
    make_tiny_model: Callable[..., PoseModel], tiny_factors: Factors, tmp_path: Path
) -> None:
    files = []
    for index, scale in enumerate((1.0, -0.5)):
        path = tmp_path / f"{index}.safetensors"
        save_file({name: tensor * (index + 1) for name, tensor in tensors_of(tiny_factors).items()}, path)
        files.append(read_lora(Lora(path, scale)))
    first, second, start = make_tiny_model(), make_tiny_model(), weights_of(make_tiny_model())
    fuse_loras(first, files)
    fuse_loras(second, files[::-1])
    ours, theirs = weights_of(first), weights_of(second)
    assert all(torch.allclose(ours[place], theirs[place], atol=1e-5) for place in ours)
    # (1)² · 1 + 2² · (-0.5) = -1: neither is left out.
    down, up = tiny_factors["unet", QUERY]
    place = ("unet", f"{QUERY}.weight")
    assert torch.allclose(ours[place], start[place] - up @ down, atol=1e-5)


def test_pefts_alpha_in_the_header_counts(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path]
) -> None:
    """diffusers writes peft's configuration there, and no alpha beside the factors."""
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.use_dora": False, "unet.r": 2})}
    down, up = tiny_factors["unet", QUERY]
    weight = tiny_model.unet.get_submodule(QUERY).weight
    expected = weight + 3.0 * (up @ down)
    fuse(tiny_model, write(tensors_of({("unet", QUERY): (down, up)}, peft), header))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    "setting", [{"unet.use_dora": True}, {"unet.use_rslora": True}, {"unet.alpha_pattern": {"a": 1}}]
)
def test_a_scaling_of_another_kind_is_refused(
    tiny_factors: Factors, write: Callable[..., Path], setting: dict[str, Any]
) -> None:
    path = write(tensors_of(tiny_factors, peft), {"lora_adapter_metadata": json.dumps(setting)})
    refused(lambda: read_lora(Lora(path)), f"needs {next(iter(setting))}, which is not supported")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
def test_the_header_counts_whatever_the_file_is_called(
    tiny_factors: Factors, write: Callable[..., Path], suffix: str
) -> None:
    tensors = tensors_of(tiny_factors, peft)
    for name, value in (("lora_alpha", 6), ("use_dora", True)):
        path = write(tensors, {"lora_adapter_metadata": json.dumps({f"unet.{name}": value})})
        renamed = path.rename(path.with_suffix(suffix))
        if name == "lora_alpha":
            layers = read_lora(Lora(renamed)).layers.items()
            assert {layer.alpha for place, layer in layers if place.startswith("unet.")} == {6}
        else:
            refused(lambda renamed=renamed: read_lora(Lora(renamed)), "needs unet.use_dora, which is not supported")


def refused(act: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        act()
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "lora_te2_text_model_encoder_layers_0_mlp_fc1",  # SDXL's second text encoder, and its U-Net under both names
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_q",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn_temp_to_q",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_conv_temp",
    "unet.down_blocks.0.resnets.0.norm1", "controlnet.conv_in", "vae.decoder.conv_in", "transformer.blocks.0.q",
])  # fmt: skip
def test_a_layer_that_the_model_lacks_is_refused(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path], name: str
) -> None:
    before, sides = weights_of(tiny_model), ("down", "up")
    unknown = {f"{name}.lora_{side}.weight": torch.ones(2, 2) for side in sides}
    path = write({**tensors_of(tiny_factors), **unknown})
    refused(lambda: fuse(tiny_model, path), rf"style\.safetensors addresses {re.escape(name)}, which the model lacks$")
    more = {f"{name}_more.lora_{side}.weight": torch.ones(2, 2) for side in sides}
    path = write({**tensors_of(tiny_factors), **unknown, **more})
    refused(lambda: fuse(tiny_model, path), rf"{re.escape(name)}, which the model lacks \(2 such in all\)$")
    assert all(torch.equal(weight, before[place]) for place, weight in weights_of(tiny_model).items())


@pytest.mark.parametrize(("layer", "down", "up"), [
    ("up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k", (2, 64), (32, 2)),  # another text encoder's width
    (QUERY, (2, 32), (64, 2)), (QUERY, (2, 32), (32, 3)), (QUERY, (0, 32), (32, 0)), (QUERY, (32,), (32, 2)),
    (QUERY, (2, 32, 3, 3), (32, 2, 1, 1)), (RESNET, (2, 32), (32, 2)), (RESNET, (2, 32, 3, 3), (32, 2, 3, 3)),
])  # fmt: skip
def test_another_shape_is_refused(
    tiny_model: PoseModel, tiny_factors: Factors, write: Callable[..., Path], layer: str, down: tuple, up: tuple
) -> None:
    before = weights_of(tiny_model)
    path = write(tensors_of({**tiny_factors, ("unet", layer): (torch.ones(down), torch.ones(up))}))
    name = kohya("unet", layer)[2].removesuffix(".alpha")
    refused(lambda: fuse(tiny_model, path), rf"style\.safetensors has {name} as \(.*, the model as \(")
    assert all(torch.equal(weight, before[place]) for place, weight in weights_of(tiny_model).items())


def test_no_file_is_fused_when_a_later_one_is_refused(
    tiny_model: PoseModel, tiny_lora: Path, write: Callable[..., Path]
) -> None:
    before = weights_of(tiny_model)
    path = write({"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)})
    refused(
        lambda: fuse_loras(tiny_model, [read_lora(Lora(tiny_lora)), read_lora(Lora(path))]), "which the model lacks"
    )
    assert all(torch.equal(weight, before[place]) for place, weight in weights_of(tiny_model).items())


@pytest.mark.parametrize("extra", [
    "weight", "lora_unet_conv_in.alpha", "lora_unet_conv_in.diff", "unet.conv_in.lora_A.default.weight",
    "lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora_B.weight", "unet.conv_in.lora_B.bias",
])  # fmt: skip
def test_what_is_no_part_of_a_lora_is_refused(tiny_factors: Factors, write: Callable[..., Path], extra: str) -> None:
    path = write({**tensors_of(tiny_factors), extra: torch.ones(1)})
    refused(lambda: read_lora(Lora(path)), rf"holds \S*{extra.rpartition('.lora_')[0]}.*, which is no part of a LoRA$")


@pytest.mark.parametrize(("extra", "kind"), [
    ("lora_unet_conv_in.dora_scale", "DoRA"), ("unet.conv_in.lora_magnitude_vector", "DoRA"),
    ("lora_unet_conv_in.hada_w1_a", "LoHa"), ("lora_unet_conv_in.lokr_w1", "LoKr"),
    ("lora_unet_conv_in.lora_mid.weight", "LoCon with a Tucker core"),
])  # fmt: skip
def test_another_kind_of_file_is_named(
    tiny_factors: Factors, write: Callable[..., Path], extra: str, kind: str
) -> None:
    path = write({**tensors_of(tiny_factors), extra: torch.ones(1)})
    refused(lambda: read_lora(Lora(path)), rf"is a {kind}, which is not supported: it holds {re.escape(extra)}$")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", range(3))
def test_numbers_that_are_not_finite_are_refused(
    tiny_factors: Factors, write: Callable[..., Path], value: float, part: int
) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(tiny_factors, alpha=1.0).items()}
    tensors[kohya("unet", QUERY)[part]].view(-1)[0] = value
    name = re.escape(kohya("unet", QUERY)[2].removesuffix(".alpha"))
    refused(lambda: read_lora(Lora(write(tensors))), f"has numbers that are not finite in {name}$")


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_torch_files_are_read_and_pickles_do_not_run(
    tiny_model: PoseModel, tiny_factors: Factors, tmp_path: Path
) -> None:
    path, before = tmp_path / "style.pt", weights_of(tiny_model)
    torch.save({"state_dict": tensors_of(tiny_factors)}, path)
    fuse(tiny_model, path)
    assert not torch.equal(weights_of(tiny_model)["unet", f"{QUERY}.weight"], before["unet", f"{QUERY}.weight"])
    torch.save({**tensors_of(tiny_factors), "harm": _Harm(tmp_path / "trace")}, path)
    refused(lambda: read_lora(Lora(path)), "could run code")
    assert not (tmp_path / "trace").exists()


def test_files_of_something_else_are_one_line(write: Callable[..., Path], tmp_path: Path) -> None:
    refused(lambda: read_lora(Lora(tmp_path / "absent.safetensors")), "there is no file")
    refused(lambda: read_lora(Lora(write({}))), "holds no LoRA")
    for content in (b"", b"text"):
        (tmp_path / "odd.safetensors").write_bytes(content)
        refused(lambda: read_lora(Lora(tmp_path / "odd.safetensors")), "truncated or no weight file")
    refused(
        lambda: read_lora(Lora(write({"a.lora_A.weight": torch.ones(1)}, {"lora_adapter_metadata": "{"}))), "header"
    )


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_must_be_finite(scale: float) -> None:
    refused(lambda: Lora(Path("style.safetensors"), scale), f"the scale of style.safetensors is {scale}")


def transformer_of_sd15(at: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{at}.proj_in": (width, width, 1, 1), f"{at}.proj_out": (width, width, 1, 1)}
    block = f"{at}.transformer_blocks.0"
    shapes |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    for attention, source in (("attn1", width), ("attn2", 768)):
        shapes |= {f"{block}.{attention}.{layer}": (width, columns) for layer, columns in
                   (("to_q", width), ("to_k", source), ("to_v", source), ("to_out.0", width))}  # fmt: skip
    return shapes


def resnet_of_sd15(at: str, source: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{at}.time_emb_proj": (width, 1280)}
    shapes |= {f"{at}.conv1": (width, source, 3, 3), f"{at}.conv2": (width, width, 3, 3)}
    return shapes if source == width else {**shapes, f"{at}.conv_shortcut": (width, source, 1, 1)}


def layers_of_sd15() -> dict[tuple[str, str], tuple[int, ...]]:
    """(rows, columns and kernel) of all that is trained for Stable Diffusion 1.5, by (network, layer); from its structure."""
    unet = transformer_of_sd15("mid_block.attentions.0", 1280)
    unet |= resnet_of_sd15("mid_block.resnets.0", 1280, 1280) | resnet_of_sd15("mid_block.resnets.1", 1280, 1280)
    before, skips = 320, [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]
    sides = [("down", index, 2, width) for index, width in enumerate((320, 640, 1280, 1280))]
    sides += [("up", index, 3, width) for index, width in enumerate((1280, 1280, 640, 320))]
    for side, index, count, width in sides:
        block = f"{side}_blocks.{index}"
        for number in range(count):
            unet |= resnet_of_sd15(f"{block}.resnets.{number}", before + (skips.pop() if side == "up" else 0), width)
            before = width
            if (side, index) not in (("down", 3), ("up", 0)):
                unet |= transformer_of_sd15(f"{block}.attentions.{number}", width)
        if index < 3:
            unet[f"{block}.{side}samplers.0.conv"] = (width, width, 3, 3)
    layer = {f"self_attn.{name}_proj": (768, 768) for name in ("q", "k", "v", "out")}
    layer |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    text = {f"encoder.layers.{index}.{name}": shape for index in range(12) for name, shape in layer.items()}
    return {(role, name): shape for role, shapes in (("unet", unet), ("text_encoder", text))
            for name, shape in shapes.items()}  # fmt: skip


def test_every_layer_of_stable_diffusion_15_is_found_under_every_familys_name(write: Callable[..., Path]) -> None:
    """kohya-ss' trainer makes 192 of the U-Net and 72 of the text encoder, LoCon and LCM-LoRA 278 of the U-Net."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    shapes = layers_of_sd15()
    assert sum(role == "text_encoder" for role, _ in shapes) == 72 and len(shapes) == 72 + 278
    assert sum("transformer" in layer or ".proj_" in layer for role, layer in shapes if role == "unet") == 192
    factors = {place: (torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *(1 for _ in shape[2:])))
               for place, shape in shapes.items()}  # fmt: skip
    networks = shapes_only(SD15_FOLDER)
    with torch.device("meta"):
        networks["unet"] = VideoUNet(networks["unet"], "frame")
    weights = _weights(SimpleNamespace(**networks))
    files = {family.__name__: tensors_of(factors, family, alpha=1.0) for family in FAMILIES}
    files["by diffusers"], _ = _convert_non_diffusers_lora_to_diffusers(tensors_of(factors, alpha=1.0))
    unet = {name: tensor for name, tensor in files["by diffusers"].items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in files["by diffusers"].items() if name not in unet}
    files["by diffusers, for peft"] = {**convert_unet_state_dict_to_peft(unet), **convert_state_dict_to_peft(text)}
    for name, tensors in files.items():
        layers = read_lora(Lora(write(tensors))).layers
        assert len(layers) == len(shapes), name
        assert not [
            layer for layer in layers if layer not in weights or not layers[layer].fits(weights[layer].shape)
        ], name
        assert len({id(weights[layer]) for layer in layers}) == len(shapes), name

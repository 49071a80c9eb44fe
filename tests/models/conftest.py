"""Writers of the original one-file layout, so that its reader can be tested at a tiny size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_FIXED = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}  # fmt: skip


def _denoiser_name(name: str, layers: int, has_attention: Callable[[int], bool]) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        side, block, kind, index, rest = match.groups()
        first = 1 + int(block) * (layers + 1) if side == "down" else int(block) * (layers + 1)
        place = f"{'input' if side == 'down' else 'output'}_blocks"
        if kind == "resnets":
            inner, _, leaf = rest.partition(".")
            return f"{place}.{first + int(index)}.0.{_RESNET[inner]}.{leaf}"
        if kind == "attentions":
            return f"{place}.{first + int(index)}.1.{rest}"
        if kind == "downsamplers":
            return f"{place}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"{place}.{first + layers}.{2 if has_attention(int(block)) else 1}.{rest}"
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    old = next(old for old in _FIXED if name.startswith(old + "."))
    rest = name[len(old) + 1 :]
    if ".resnets." in old:
        inner, _, leaf = rest.partition(".")
        rest = f"{_RESNET[inner]}.{leaf}"
    return f"{_FIXED[old]}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for old, new in (
        ("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."), ("mid_block.attentions.0.", "mid.attn_1."), ("group_norm", "norm"),
        ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def _denoiser(model: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    config = model.config
    blocks = getattr(config, "up_block_types", ())
    return {
        prefix + _denoiser_name(name, config.layers_per_block, lambda index: "CrossAttn" in blocks[index]): tensor
        for name, tensor in model.state_dict().items()
    }


def _vae(model: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    levels = len(model.config.block_out_channels)
    tensors = {_vae_name(name, levels): tensor for name, tensor in model.state_dict().items()}
    return {  # the original's attention is made of 1 × 1 convolutions
        prefix + name: tensor[:, :, None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def _text(model: torch.nn.Module) -> dict[str, Tensor]:
    prefix = "cond_stage_model.transformer.text_model."
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    return {**tensors, prefix + "embeddings.position_ids": torch.arange(77)[None]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def original_layout() -> Callable[..., dict[str, Tensor]]:
    """original_layout(name, diffusers model, prefix=the usual one) -> tensors as the original code names them."""
    prefixes = {"unet": "model.diffusion_model.", "controlnet": "control_model.", "vae": "first_stage_model."}

    def convert(name: str, model: torch.nn.Module, prefix: str | None = None) -> dict[str, Tensor]:
        if name == "text_encoder":
            return _text(model)
        write = _vae if name == "vae" else _denoiser
        tensors = write(model, prefixes[name] if prefix is None else prefix)
        return {key: tensor.contiguous() for key, tensor in tensors.items()}

    return convert


@pytest.fixture
def clip() -> Callable[..., dict[str, Tensor]]:
    """clip(frames, seed=0) -> random latents (f, 4, 16, 16), controlnet_cond (f, 3, 32, 32) and text (1, 77, 32)."""

    def make(frames: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "latents": torch.randn(frames, 4, 16, 16, generator=generator),
            "controlnet_cond": torch.rand(frames, 3, 32, 32, generator=generator),
            "encoder_hidden_states": torch.randn(1, 77, 32, generator=generator),
        }

    return make


@pytest.fixture
def predict() -> Callable[..., Tensor]:
    """predict(model, **clip(frames), timestep=500) -> noise_pred of our U-Net with our ControlNet's residuals."""

    def run(model, latents, controlnet_cond, encoder_hidden_states, timestep=500) -> Tensor:
        timesteps = torch.tensor([timestep])
        controlnet, unet = model.controlnet, model.unet
        down, mid = controlnet(
            latents, controlnet.time_projections(timesteps), controlnet.text_kv(encoder_hidden_states),
            controlnet.pose_embedding(controlnet_cond), torch.ones(1))  # fmt: skip
        return unet(latents, unet.time_projections(timesteps), unet.text_kv(encoder_hidden_states), down, mid)

    return run

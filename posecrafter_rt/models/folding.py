"""Fold pairs of linear maps into one: the first thing that inference does with a tuned model's weights.

Layer 3: exact except for rounding. Training and baselines keep the model unfolded.
"""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from posecrafter_rt import ops
from posecrafter_rt.models.doubling import fold_doubling
from posecrafter_rt.models.unet import VideoUNet

_TEMPORAL_OUTPUT = re.compile(r"\.(conv_temp|attn_temp\.to_out\.0)\.")


@torch.no_grad()
def fold_denoiser(unet: VideoUNet) -> None:
    """Fold a U-Net in place: `fold_temporal_output` and `fold_upsamplers`. Folding again changes nothing."""
    fold_temporal_output(unet)
    fold_upsamplers(unet)


@torch.no_grad()
def fold_vae(vae: AutoencoderKL) -> None:
    """Fold a VAE in place: `fold_upsamplers` on its decoder, then `fuse_norms`."""
    fold_upsamplers(vae.decoder)
    fuse_norms(vae)


class NormSilu(nn.GroupNorm):
    """GroupNorm and SiLU as one call of `ops.group_norm`, which has a fast path on GPUs. (N, C, h, w) → the same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.group_norm(hidden_states, self.num_groups, self.weight, self.bias, self.eps, silu=True)


def fuse_norms(vae: AutoencoderKL) -> None:
    """Replace each GroupNorm before a SiLU by a `NormSilu` with the same parameters, and the SiLU by an identity."""

    def fuse(module: nn.Module, activation: str, *norms: str) -> None:
        for name in norms:
            norm = getattr(module, name)
            fused = NormSilu(norm.num_groups, norm.num_channels, norm.eps, device="meta")
            fused.weight, fused.bias = norm.weight, norm.bias
            setattr(module, name, fused)
        setattr(module, activation, nn.Identity())

    for half in (vae.encoder, vae.decoder):
        fuse(half, "conv_act", "conv_norm_out")
        for module in half.modules():
            if isinstance(module, ResnetBlock2D):
                fuse(module, "nonlinearity", "norm1", "norm2")


def fold_temporal_output(unet: VideoUNet) -> None:
    """Replace conv_temp ∘ attn_temp.to_out by one linear map, `temporal_out`."""
    for block in unet.transformer_blocks():
        if not hasattr(block, "conv_temp"):
            continue
        weight, bias = fold_pair(
            block.conv_temp.weight,
            block.conv_temp.bias,
            block.attn_temp.to_out[0].weight,
            block.attn_temp.to_out[0].bias,
        )
        block.temporal_out = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        block.temporal_out.weight.copy_(weight)
        block.temporal_out.bias.copy_(bias)
        del block.conv_temp, block.attn_temp.to_out


def folded_name(name: str) -> str:
    """Return the name of the parameter that `fold_temporal_output` makes of the one of this name, or the name itself."""
    return _TEMPORAL_OUTPUT.sub(".temporal_out.", name)


def fold_pair(conv_weight: Tensor, conv_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of x ↦ conv(out(x)), multiplied in float32."""
    weight = conv_weight.float() @ out_weight.float()
    bias = conv_weight.float() @ out_bias.float() + conv_bias.float()
    return weight.to(conv_weight.dtype), bias.to(conv_bias.dtype)


def fold_upsamplers(network: nn.Module) -> None:
    """Replace nearest-neighbour doubling and the 3×3 convolution after it by one transposed convolution.

    This takes 16 products per input pixel instead of 36, and the doubled picture is never written. A folded upsampler
    always doubles, whatever output size it is given.
    """
    for module in network.modules():
        if isinstance(module, Upsample2D) and module.use_conv and not module.use_conv_transpose:
            module.conv = fold_doubled(module.conv)
            module.use_conv_transpose = True


def fold_doubled(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Return the transposed convolution that equals doubling and then `conv` (3×3, padding 1, with or without bias)."""
    weight = fold_doubling(conv.weight)
    folded = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, bias=conv.bias is not None,
                                device=weight.device, dtype=weight.dtype)  # fmt: skip
    folded.weight.copy_(weight)
    if conv.bias is not None and folded.bias is not None:
        folded.bias.copy_(conv.bias)
    return folded

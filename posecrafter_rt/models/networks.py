"""The networks as engines see them: modules whose forward takes and returns exactly what `spec` lists.

Layer 3: the torch engine runs them, export traces them. Parameter names are `unet.…`, `controlnet.…`, `vae.…` and
`text_encoder.…` in all of them, so one dictionary of tensors can be swapped into every network that holds some of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel

from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.spec import Architecture


class TextEncoder(nn.Module):
    """input_ids (G, 77) → encoder_hidden_states (G, 77, D)."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids).last_hidden_state,)


class PromptKV(nn.Module):
    """encoder_hidden_states → every cross-attention's keys and values, packed, of the U-Net and of the ControlNet."""

    def __init__(self, unet: VideoUNet, controlnet: VideoControlNet) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet.text_kv(encoder_hidden_states), self.controlnet.text_kv(encoder_hidden_states)


class TimeTables(nn.Module):
    """timesteps (S,) → every resnet's projection of them, packed, of the U-Net and of the ControlNet."""

    def __init__(self, unet: VideoUNet, controlnet: VideoControlNet) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet.time_projections(timesteps), self.controlnet.time_projections(timesteps)


class PoseEmbedding(nn.Module):
    """controlnet_cond (F, 3, H, W) in [0, 1] → pose_embeddings (F, C, h, w)."""

    def __init__(self, controlnet: VideoControlNet) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(self, controlnet_cond: Tensor) -> tuple[Tensor]:
        return (self.controlnet.pose_embedding(controlnet_cond),)


class VaeEncoder(nn.Module):
    """pixels (F, 3, H, W) in [-1, 1] → latents: the posterior's mode, scaled; never a random sample."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        moments = self.vae.encoder(pixels)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return (moments.chunk(2, dim=1)[0] * self.vae.config.scaling_factor,)


class VaeDecoder(nn.Module):
    """latents → pixels (F, 3, H, W), about [-1, 1], not clipped."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        latents = latents / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return (self.vae.decoder(latents),)


class ControlNetStep(nn.Module):
    """One ControlNet evaluation on a clip, tables in, residuals out."""

    def __init__(self, controlnet: VideoControlNet) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        pose_embeddings: Tensor,
        conditioning_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        down, mid = self.controlnet(latents, time_projections, text_kv, pose_embeddings, conditioning_scale)
        return (*down, mid)


class UNetStep(nn.Module):
    """One U-Net evaluation on a clip: tables and ControlNet residuals in, noise_pred out."""

    def __init__(self, unet: VideoUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, time_projections: Tensor, text_kv: Tensor, *residuals: Tensor) -> tuple[Tensor]:
        return (self.unet(latents, time_projections, text_kv, residuals[:-1], residuals[-1]),)


def build_networks(
    unet: VideoUNet, controlnet: VideoControlNet, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> dict[str, nn.Module]:
    """Every network under its name in `spec.NETWORK_NAMES`; they share the given modules' weights."""
    factories: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: TextEncoder(text_encoder),
        "prompt_kv": lambda: PromptKV(unet, controlnet),
        "time_tables": lambda: TimeTables(unet, controlnet),
        "pose_embedding": lambda: PoseEmbedding(controlnet),
        "vae_encoder": lambda: VaeEncoder(vae),
        "vae_decoder": lambda: VaeDecoder(vae),
        "controlnet": lambda: ControlNetStep(controlnet),
        "unet": lambda: UNetStep(unet),
    }
    return {name: make().eval() for name, make in factories.items()}


def describe_architecture(
    unet: VideoUNet, controlnet: VideoControlNet, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> Architecture:
    """Read the tensor sizes off the modules themselves."""
    residuals, downscale = [(controlnet.conv_in.out_channels, 1)], 1
    for block in controlnet.down_blocks:
        residuals += [(resnet.out_channels, downscale) for resnet in block.resnets]
        for downsampler in block.downsamplers or ():
            downscale *= 2
            residuals.append((downsampler.out_channels, downscale))
    return Architecture(
        latent_channels=unet.conv_in.in_channels,
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        text_tokens=text_encoder.config.max_position_embeddings,
        text_channels=text_encoder.config.hidden_size,
        pose_channels=controlnet.conv_in.out_channels,
        time_widths=(unet.time_width, controlnet.time_width),
        kv_widths=(unet.kv_width, controlnet.kv_width),
        residuals=tuple(residuals),
        mid_residual=(controlnet.mid_block.resnets[-1].out_channels, downscale),
    )


@torch.no_grad()
def fold_temporal_output(unet: VideoUNet) -> None:
    """Replace conv_temp ∘ attn_temp.to_out by the one linear map it is, `temporal_out`; for inference only."""
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


def fold_pair(conv_weight: Tensor, conv_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of x ↦ conv(out(x)), multiplied in float32."""
    weight = conv_weight.float() @ out_weight.float()
    bias = conv_weight.float() @ out_bias.float() + conv_bias.float()
    return weight.to(conv_weight.dtype), bias.to(conv_bias.dtype)

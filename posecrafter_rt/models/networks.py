"""The networks as engines see them: modules whose forward takes and returns exactly what `spec` lists.

Layer 3: the torch engine runs them, export traces them. In all of them parameter names begin with `unet.`,
`controlnet.`, `vae.`, `text_encoder.` or `small_decoder.`, so one dictionary of tensors can be swapped into every one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel

from posecrafter_rt.models.blocks import StreamMemory
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.small_decoder import decode_small
from posecrafter_rt.models.unet import ClipDenoiser, VideoUNet
from posecrafter_rt.spec import SHALLOW_STREAM, SHALLOW_UNET, SMALL_DECODER, Architecture


class _Network(nn.Module):
    """Takes its modules by name: a parameter's name begins with that of the module that has it."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class TextEncoder(_Network):
    """input_ids (G, 77) → encoder_hidden_states (G, 77, D)."""

    text_encoder: CLIPTextModel

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids).last_hidden_state,)


class PromptKV(_Network):
    """encoder_hidden_states → packed keys and values of every cross-attention, of the U-Net and of the ControlNet."""

    unet: VideoUNet
    controlnet: VideoControlNet

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet.text_kv(encoder_hidden_states), self.controlnet.text_kv(encoder_hidden_states)


class TimeTables(_Network):
    """timesteps (S,) → packed timestep projections of every resnet, of the U-Net and of the ControlNet."""

    unet: VideoUNet
    controlnet: VideoControlNet

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet.time_projections(timesteps), self.controlnet.time_projections(timesteps)


class PoseEmbedding(_Network):
    """controlnet_cond (F, 3, H, W) in [0, 1] → pose_embeddings (F, C, h, w)."""

    controlnet: VideoControlNet

    def forward(self, controlnet_cond: Tensor) -> tuple[Tensor]:
        return (self.controlnet.pose_embedding(controlnet_cond),)


class VaeEncoder(_Network):
    """pixels (F, 3, H, W) in [-1, 1] → latents: the posterior's mode, scaled; never a random sample."""

    vae: AutoencoderKL

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        moments = self.vae.encoder(pixels)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return (moments.chunk(2, dim=1)[0] * self.vae.config.scaling_factor,)


class VaeDecoder(_Network):
    """latents → pixels (F, 3, H, W), about [-1, 1], not clipped."""

    vae: AutoencoderKL

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        latents = latents / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return (self.vae.decoder(latents),)


class SmallVaeDecoder(_Network):
    """latents → pixels (F, 3, H, W), about [-1, 1], not clipped, by the small decoder."""

    small_decoder: nn.Module

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (decode_small(self.small_decoder, latents),)


class ControlNetStep(_Network):
    """One ControlNet evaluation on a clip: it takes the tables and returns the residuals."""

    controlnet: VideoControlNet

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


class UNetStep(_Network):
    """One U-Net evaluation on a clip: tables and ControlNet residuals → noise_pred and, if enabled, deep_features."""

    unet: VideoUNet

    def forward(
        self, latents: Tensor, time_projections: Tensor, text_kv: Tensor, *residuals: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = self.unet.predict(latents, time_projections, text_kv, residuals[:-1], residuals[-1])
        return tuple(output for output in outputs if output is not None)


class UNetShallow(_Network):
    """The U-Net's first and last layer on a clip: it takes deep_features of an earlier step and returns noise_pred."""

    unet: VideoUNet

    def forward(
        self, latents: Tensor, time_projections: Tensor, text_kv: Tensor, deep_features: Tensor, residual: Tensor
    ) -> tuple[Tensor]:
        return (self.unet.predict_shallow(latents, time_projections, text_kv, deep_features, residual),)


class ControlNetStream(_Network):
    """`ControlNetStep` for frames of a stream: also takes the reference's keys and values and returns the frames'."""

    controlnet: VideoControlNet

    def forward(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        pose_embeddings: Tensor,
        conditioning_scale: Tensor,
        is_reference: Tensor,
        *keyframe_kv: Tensor,
    ) -> tuple[Tensor, ...]:
        nothing = is_reference[:, None]  # in place of window_mask: the ControlNet has no temporal attention
        memory = StreamMemory(is_reference, nothing, keyframe_kv, ())
        down, mid = self.controlnet(
            latents, time_projections, text_kv, pose_embeddings, conditioning_scale, memory=memory
        )
        return (*down, mid, *memory.new_keyframe_kv)


class UNetStream(_Network):
    """`UNetStep` for frames of a stream: also takes keys and values of other frames and returns the frames' own.

    tensors: the ControlNet residuals, then each layer's key-frame keys and values, then the temporal ones.
    """

    unet: VideoUNet

    def __init__(self, unet: VideoUNet) -> None:
        super().__init__(unet=unet)
        self.num_residuals = len(residual_layers(unet)) + 1
        self.num_keyframe = len(attention_layers(unet))

    def forward(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        is_reference: Tensor,
        window_mask: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        residuals, kept = tensors[: self.num_residuals], tensors[self.num_residuals :]
        memory = StreamMemory(is_reference, window_mask, kept[: self.num_keyframe], kept[self.num_keyframe :])
        predicted = self.unet.predict(latents, time_projections, text_kv, residuals[:-1], residuals[-1], memory=memory)
        outputs = (output for output in predicted if output is not None)
        return (*outputs, *memory.new_keyframe_kv, *memory.new_temporal_kv)


class UNetShallowStream(_Network):
    """`UNetShallow` for frames of a stream, none of which is the reference.

    attended: window_mask, then the last layer's key-frame and temporal keys and values; empty if it has no attention.
    """

    unet: VideoUNet

    def forward(
        self, latents: Tensor, time_projections: Tensor, text_kv: Tensor, deep_features: Tensor, residual: Tensor,
        *attended: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        memory = None
        if attended:
            window_mask, keyframe_kv, temporal_kv = attended
            memory = StreamMemory(None, window_mask, (keyframe_kv,), (temporal_kv,))
        noise_pred = self.unet.predict_shallow(
            latents, time_projections, text_kv, deep_features, residual, memory=memory
        )
        return (noise_pred,) if memory is None else (noise_pred, *memory.new_temporal_kv)


def build_networks(
    unet: VideoUNet,
    controlnet: VideoControlNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    small_decoder: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """Return every network by its name in `spec.ALL_NETWORKS`, the optional ones if they exist. They share weights."""
    factories: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: TextEncoder(text_encoder=text_encoder),
        "prompt_kv": lambda: PromptKV(unet=unet, controlnet=controlnet),
        "time_tables": lambda: TimeTables(unet=unet, controlnet=controlnet),
        "pose_embedding": lambda: PoseEmbedding(controlnet=controlnet),
        "vae_encoder": lambda: VaeEncoder(vae=vae),
        "vae_decoder": lambda: VaeDecoder(vae=vae),
        "controlnet": lambda: ControlNetStep(controlnet=controlnet),
        "unet": lambda: UNetStep(unet=unet),
        "controlnet_stream": lambda: ControlNetStream(controlnet=controlnet),
        "unet_stream": lambda: UNetStream(unet=unet),
    }
    if small_decoder is not None:
        factories[SMALL_DECODER] = lambda: SmallVaeDecoder(small_decoder=small_decoder)
    if unet.gives_deep_features:
        factories[SHALLOW_UNET] = lambda: UNetShallow(unet=unet)
        factories[SHALLOW_STREAM] = lambda: UNetShallowStream(unet=unet)
    return {name: make().eval() for name, make in factories.items()}


def describe_architecture(
    unet: VideoUNet,
    controlnet: VideoControlNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    small_decoder: nn.Module | None = None,
) -> Architecture:
    """Read the tensor sizes from the modules themselves."""
    residuals = residual_layers(controlnet)
    layers = attention_layers(unet)
    return Architecture(
        latent_channels=unet.conv_in.in_channels,
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        text_tokens=text_encoder.config.max_position_embeddings,
        text_channels=text_encoder.config.hidden_size,
        pose_channels=controlnet.conv_in.out_channels,
        time_widths=(unet.time_width, controlnet.time_width),
        kv_widths=(unet.kv_width, controlnet.kv_width),
        residuals=tuple(residuals),
        mid_residual=(controlnet.mid_block.resnets[-1].out_channels, residuals[-1][1]),
        keyframe_layers=(
            tuple(layer[:2] for layer in layers),
            tuple(layer[:2] for layer in attention_layers(controlnet)),
        ),
        temporal_layers=tuple(layer[:2] for layer in layers if layer[2]),
        has_small_decoder=small_decoder is not None,
        deep_channels=unet.deep_channels if unet.gives_deep_features else None,
    )


def residual_layers(network: ClipDenoiser) -> list[tuple[int, int]]:
    """Return (channels, downscale) of the outputs of `conv_in` and every layer of the down blocks, in forward order."""
    layers, downscale = [(network.conv_in.out_channels, 1)], 1
    for block in network.down_blocks:
        layers += [(resnet.out_channels, downscale) for resnet in block.resnets]
        for downsampler in block.downsamplers or ():
            downscale *= 2
            layers.append((downsampler.out_channels, downscale))
    return layers


def attention_layers(network: ClipDenoiser) -> list[tuple[int, int, bool]]:
    """Return (channels, downscale, has temporal attention) of every transformer block, in forward order."""
    layers, downscale = [], 1

    def add(block: Any) -> None:
        for attention in getattr(block, "attentions", ()):
            for inner in attention.transformer_blocks:
                layers.append((inner.attn1.inner_dim, downscale, hasattr(inner, "attn_temp")))

    for block in network.down_blocks:
        add(block)
        downscale *= 2 ** len(block.downsamplers or ())
    add(network.mid_block)
    for block in getattr(network, "up_blocks", ()):
        add(block)
        downscale //= 2 ** len(block.upsamplers or ())
    return layers

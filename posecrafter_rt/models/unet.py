"""The inflated U-Net: SD 1.5's image U-Net over a clip, with key-frame and temporal attention.

Layer 3: weights and names are diffusers'; the path of a clip through them is here and in `blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from posecrafter_rt.errors import ModelError, ShapeError
from posecrafter_rt.models.blocks import (
    BlockForward,
    ClipContext,
    NormScope,
    StreamMemory,
    assign_slices,
    checkpointed,
    group_norm,
    resnet_forward,
    transformer_forward,
)

UNSUPPORTED_OPTIONS = (
    "class_embed_type",
    "addition_embed_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
    "dual_cross_attention",
)


def check_options(config: Mapping[str, Any]) -> None:
    """Raise ModelError if a U-Net or ControlNet of this configuration is not computed here, such as SDXL's."""
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise ModelError(f"the network uses {option}, which no Stable Diffusion 1.x model does",
                             "use a Stable Diffusion 1.5 base and a ControlNet 1.1 for it")  # fmt: skip


UpLayer = tuple[ResnetBlock2D, Any, Any]  # a resnet, its attention or None, its upsampler or None


class ClipDenoiser(nn.Module):
    """The parts that the U-Net and the ControlNet share: tables, down blocks and mid block over a clip.

    The children of the diffusers model become this module's children, so every parameter keeps its diffusers name.
    """

    # The diffusers modules that forward walks through; torch types every child as Tensor | Module.
    conv_in: nn.Conv2d
    down_blocks: Any
    mid_block: Any
    config: Any

    def __init__(self, image_model: Any, norm_scope: NormScope) -> None:
        super().__init__()
        check_options(image_model.config)
        for name, child in image_model.named_children():
            self.add_module(name, child)
        self.config = image_model.config
        self.norm_scope: NormScope = norm_scope
        self.time_width, self.kv_width = assign_slices(self.resnets(), self.transformer_blocks())

    def resnets(self) -> Iterator[ResnetBlock2D]:
        """Every residual block, in the order of the packed timestep table."""
        return (module for module in self.modules() if isinstance(module, ResnetBlock2D))

    def transformer_blocks(self) -> Iterator[BasicTransformerBlock]:
        """Every transformer block, in the order of the packed text keys and values."""
        return (module for module in self.modules() if isinstance(module, BasicTransformerBlock))

    def time_projections(self, timesteps: Tensor) -> Tensor:
        """Compute all that depends on the timestep alone. timesteps: (S,) → (S, T), one row per timestep."""
        dtype = self.conv_in.bias.dtype  # not a weight's, which may be kept in 16 bits
        embedding = nn.functional.silu(self.time_embedding(self.time_proj(timesteps).to(dtype)))
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in self.resnets()], dim=-1)

    def text_kv(self, encoder_hidden_states: Tensor) -> Tensor:
        """Compute all that depends on the prompt alone. (G, tokens, D) → (G, tokens, K), per layer keys then values."""
        return torch.cat(
            [project(encoder_hidden_states) for block in self.transformer_blocks()
             for project in (block.attn2.to_k, block.attn2.to_v)], dim=-1)  # fmt: skip

    def enable_gradient_checkpointing(self) -> None:
        """Recompute residual and transformer blocks in the backward pass instead of keeping their activations."""
        for module in (self, *self.modules()):
            if not isinstance(module, (Attention, ResnetBlock2D)):
                module.gradient_checkpointing = True  # type: ignore[assignment]

    def _run(self, function: BlockForward, module: nn.Module, hidden_states: Tensor, context: ClipContext) -> Tensor:
        return checkpointed(self, function, module, hidden_states, context)

    def _down(self, hidden_states: Tensor, context: ClipContext) -> list[Tensor]:
        samples = [hidden_states]
        for block in self.down_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                hidden_states = self._run(resnet_forward, resnet, hidden_states, context)
                if attention is not None:
                    hidden_states = transformer_forward(attention, hidden_states, context)
                samples.append(hidden_states)
            for downsampler in block.downsamplers or ():
                hidden_states = downsampler(hidden_states)
                samples.append(hidden_states)
        return samples

    def _mid(self, hidden_states: Tensor, context: ClipContext) -> Tensor:
        first, *rest = self.mid_block.resnets
        hidden_states = self._run(resnet_forward, first, hidden_states, context)
        for attention, resnet in zip(self.mid_block.attentions, rest, strict=True):
            hidden_states = transformer_forward(attention, hidden_states, context)
            hidden_states = self._run(resnet_forward, resnet, hidden_states, context)
        return hidden_states

    def _context(
        self, latents: Tensor, time_projections: Tensor, text_kv: Tensor, memory: StreamMemory | None
    ) -> ClipContext:
        if latents.shape[0] % text_kv.shape[0]:
            raise ShapeError(f"{latents.shape[0]} frames do not divide into {text_kv.shape[0]} prompts",
                             "give as many frames for each prompt")  # fmt: skip
        return ClipContext(text_kv.shape[0], time_projections, text_kv, self.norm_scope, memory=memory)


class VideoUNet(ClipDenoiser):
    """SD 1.5's U-Net inflated to clips: key-frame attention everywhere, temporal attention in down and up blocks.

    gives_deep_features: whether `predict` also returns the features that `predict_shallow` takes.
    """

    gives_deep_features = False
    up_blocks: Any
    conv_norm_out: nn.GroupNorm

    def __init__(
        self, image_unet: UNet2DConditionModel, norm_scope: NormScope = "frame", *, temporal_attention: bool = True
    ) -> None:
        super().__init__(image_unet, norm_scope)
        for block in (*self.down_blocks, *self.up_blocks) if temporal_attention else ():
            for attention in getattr(block, "attentions", ()):
                for transformer_block in attention.transformer_blocks:
                    _add_temporal_attention(transformer_block)

    def forward(self, *tensors: Any, **named: Any) -> Tensor:
        """Return noise_pred (G·F, 4, h, w), the first output of `predict`."""
        return self.predict(*tensors, **named)[0]

    def predict(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        *,
        temporal_mask: Tensor | None = None,
        memory: StreamMemory | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the noise of a clip; frame 0 of each group is its key frame.

        Args: latents: (G·F, 4, h, w). time_projections: (G·F or G or 1, T), rows of `time_projections`.
            text_kv: (G, tokens, K).
            down_block_additional_residuals, mid_block_additional_residual: what the ControlNet returned; or neither.
            temporal_mask: bool (F, F), which frame attends to which over time; None: each to all.
            memory: what a stream's frames attend to instead of one another; their own keys and values are added to it.
        Returns: noise_pred (G·F, 4, h, w); deep_features (G·F, C, h, w), the last layer's input beside `conv_in`'s
            output, or None without `gives_deep_features`.
        Raises: ShapeError for some of the residuals without the others.
        """
        context = replace(self._context(latents, time_projections, text_kv, memory), temporal_mask=temporal_mask)
        samples = self._down(self.conv_in(latents), context)
        samples.append(self._mid(samples[-1], context))
        mid = () if mid_block_additional_residual is None else (mid_block_additional_residual,)
        residuals = (*down_block_additional_residuals, *mid)
        if residuals and len(residuals) != len(samples):
            raise ShapeError(f"{len(residuals)} residuals of a ControlNet instead of {len(samples)}",
                             "give all that it returned, or none")  # fmt: skip
        for index, residual in enumerate(residuals):  # each sum takes its summand's place
            samples[index] = samples[index] + residual
        layers, deep_features = self._up_layers(), None
        if self.gives_deep_features:
            deep_features = self._up(layers[:-1], samples, context)
            samples.append(deep_features)
            layers = layers[-1:]
        return self._out(self._up(layers, samples, context), context), deep_features

    def predict_shallow(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        deep_features: Tensor,
        down_block_additional_residual: Tensor,
        *,
        memory: StreamMemory | None = None,
    ) -> Tensor:
        """Predict the noise with the first and last layer only; the others' features come from another step.

        With features and residual of the same step the result is that of `predict`. With those of an earlier step it is
        an approximation, the cheapest variant of DeepCache (Ma et al. 2024).
        Args: as in `predict`; deep_features: as it returned them. down_block_additional_residual: the first of the
            ControlNet's. memory: of the last layer only.
        Returns: noise_pred (G·F, 4, h, w).
        """
        context = self._context(latents, time_projections, text_kv, memory)
        samples = [self.conv_in(latents) + down_block_additional_residual, deep_features]
        return self._out(self._up(self._up_layers()[-1:], samples, context), context)

    @property
    def deep_channels(self) -> int:
        """Number of channels of deep_features."""
        channels: int = self._up_layers()[-1][0].in_channels - self.conv_in.out_channels
        return channels

    def _up_layers(self) -> list[UpLayer]:
        layers = []
        for block in self.up_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            upsamplers = [None] * (len(block.resnets) - 1) + list(block.upsamplers or [None])
            layers += list(zip(block.resnets, attentions, upsamplers, strict=True))
        return layers

    def _up(self, layers: list[UpLayer], samples: list[Tensor], context: ClipContext) -> Tensor:
        """Run some up layers. samples: their inputs, the main one last; each is removed when used, to free memory."""
        hidden_states = samples.pop()
        for resnet, attention, upsampler in layers:
            hidden_states = torch.cat([hidden_states, samples.pop()], dim=1)
            hidden_states = self._run(resnet_forward, resnet, hidden_states, context)
            if attention is not None:
                hidden_states = transformer_forward(attention, hidden_states, context)
            if upsampler is not None:
                hidden_states = upsampler(hidden_states, samples[-1].shape[-2:])
        return hidden_states

    def _out(self, hidden_states: Tensor, context: ClipContext) -> Tensor:
        hidden_states = group_norm(self.conv_norm_out, hidden_states, context, silu=True)
        return self.conv_out(hidden_states)


def _add_temporal_attention(block: BasicTransformerBlock) -> None:
    """Add attn_temp, a copy of attn1, and conv_temp, all zero: so the inflated U-Net starts as the image U-Net."""
    attn = block.attn1
    block.attn_temp = Attention(attn.to_q.in_features, heads=attn.heads, dim_head=attn.inner_dim // attn.heads)
    if not attn.to_q.weight.is_meta:
        block.attn_temp.load_state_dict(attn.state_dict())
    block.conv_temp = nn.Linear(attn.to_q.in_features, attn.to_q.in_features)  # a 1×1 convolution over tokens
    nn.init.zeros_(block.conv_temp.weight)
    nn.init.zeros_(block.conv_temp.bias)

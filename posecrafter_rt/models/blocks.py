"""The forward of one residual and one transformer block for a clip, over diffusers' modules.

Layer 3: diffusers' blocks hold the weights (and so keep their names); how a clip of frames passes through them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from posecrafter_rt import ops
from posecrafter_rt.ops import keyframe_attention, temporal_attention

NormScope = Literal["clip", "frame"]
BlockForward = Callable[..., Tensor]  # (module, hidden_states, context) → hidden_states


@dataclass(frozen=True)
class ClipContext:
    """What every block of one forward shares.

    groups: G, guidance passes or pipelined steps; the batch is (G·F) frames, group-major.
    time_projections: (G or 1, T) packed per-resnet projections of the timestep embedding.
    text_kv: (G, tokens, K) packed keys and values of every cross-attention.
    norm_scope: over what the residual blocks' GroupNorm takes its statistics.
    """

    groups: int
    time_projections: Tensor
    text_kv: Tensor
    norm_scope: NormScope


def assign_slices(resnets: Iterable[ResnetBlock2D], blocks: Iterable[BasicTransformerBlock]) -> tuple[int, int]:
    """Give each resnet and each cross-attention its place in the packed tables; returns the tables' widths (T, K)."""
    time_width = kv_width = 0
    for resnet in resnets:
        channels = resnet.time_emb_proj.out_features
        resnet.time_slice = slice(time_width, time_width + channels)
        time_width += channels
    for block in blocks:
        channels = 2 * block.attn2.inner_dim
        block.kv_slice = slice(kv_width, kv_width + channels)
        kv_width += channels
    return time_width, kv_width


def frame_group_norm(norm: nn.GroupNorm, hidden_states: Tensor, *, silu: bool = False) -> Tensor:
    """GroupNorm of (N, C, h, w) with statistics per frame, then SiLU where asked."""
    return ops.group_norm(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def group_norm(norm: nn.GroupNorm, hidden_states: Tensor, context: ClipContext, *, silu: bool = False) -> Tensor:
    """GroupNorm of (G·F, C, h, w), statistics per frame or over all frames of a clip together; SiLU where asked."""
    if context.norm_scope == "frame":
        return frame_group_norm(norm, hidden_states, silu=silu)
    frames = hidden_states.shape[0] // context.groups
    clips = hidden_states.reshape(context.groups, frames, norm.num_groups, -1).float()
    variance, mean = torch.var_mean(clips, dim=(1, 3), keepdim=True, correction=0)
    normalised = ((clips - mean) * torch.rsqrt(variance + norm.eps)).to(hidden_states.dtype)
    out = normalised.reshape(hidden_states.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return F.silu(out) if silu else out


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out convolution weights as CPUs and GPUs have them fastest, in place; returns the module."""
    return nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]


def per_frame(values: Tensor, num_frames: int) -> Tensor:
    """(G or 1, …) → (G·F or 1, …): one entry for each frame of its group; a single entry broadcasts."""
    return values if values.shape[0] == 1 else values.repeat_interleave(num_frames // values.shape[0], dim=0)


def resnet_forward(resnet: ResnetBlock2D, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """diffusers' ResnetBlock2D with the timestep projection read from the table. (G·F, C, h, w) → (G·F, C', h, w)."""
    shift = context.time_projections[:, resnet.time_slice, None, None]
    out = resnet.conv1(group_norm(resnet.norm1, hidden_states, context, silu=True))
    out = out + per_frame(shift, out.shape[0])
    out = resnet.conv2(group_norm(resnet.norm2, out, context, silu=True))
    if resnet.conv_shortcut is not None:
        hidden_states = resnet.conv_shortcut(hidden_states)
    return (hidden_states + out) / resnet.output_scale_factor


def _keyframe(attn: Attention, hidden_states: Tensor, groups: int) -> Tensor:
    frames, tokens, channels = hidden_states.shape
    keyframe = hidden_states.reshape(groups, -1, tokens, channels)[:, 0]  # K, V of one frame a group, not of all
    out = keyframe_attention(attn.to_q(hidden_states), attn.to_k(keyframe), attn.to_v(keyframe), attn.heads)
    return attn.to_out[0](out)


def _temporal(block: BasicTransformerBlock, hidden_states: Tensor, groups: int) -> Tensor:
    attn = block.attn_temp
    frames, tokens, _ = hidden_states.shape
    clip = (groups, -1, tokens, attn.inner_dim)
    q, k, v = (project(hidden_states).reshape(clip) for project in (attn.to_q, attn.to_k, attn.to_v))
    out = temporal_attention(q, k, v, attn.heads).reshape(frames, tokens, -1)
    if hasattr(block, "temporal_out"):  # conv_temp ∘ to_out, folded for inference
        return block.temporal_out(out)
    return block.conv_temp(attn.to_out[0](out))


def _text(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    attn = block.attn2
    key, value = context.text_kv[..., block.kv_slice].chunk(2, dim=-1)
    return attn.to_out[0](keyframe_attention(attn.to_q(hidden_states), key, value, attn.heads))


def transformer_block_forward(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """Key-frame, temporal and text attention, then the feed-forward. (G·F, L, C) → (G·F, L, C)."""
    normalised = block.norm1(hidden_states)
    out = hidden_states + _keyframe(block.attn1, normalised, context.groups)
    if hasattr(block, "attn_temp"):
        out = out + _temporal(block, normalised, context.groups)  # in parallel with attn1, on the same input
    out = out + _text(block, block.norm2(out), context)
    return out + block.ff(block.norm3(out))


def transformer_forward(model: Transformer2DModel, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """diffusers' Transformer2DModel for a clip; its own GroupNorm is always per frame. (G·F, C, h, w) → same."""
    frames, channels, height, width = hidden_states.shape
    tokens = frame_group_norm(model.norm, hidden_states)
    if not model.use_linear_projection:
        tokens = model.proj_in(tokens)
    tokens = tokens.flatten(2).transpose(1, 2)
    if model.use_linear_projection:
        tokens = model.proj_in(tokens)
    for block in model.transformer_blocks:
        tokens = checkpointed(model, transformer_block_forward, block, tokens, context)
    if model.use_linear_projection:
        tokens = model.proj_out(tokens)
    tokens = tokens.transpose(1, 2).reshape(frames, -1, height, width)
    if not model.use_linear_projection:
        tokens = model.proj_out(tokens)
    return hidden_states + tokens


def checkpointed(
    owner: nn.Module, function: BlockForward, module: nn.Module, hidden_states: Tensor, context: ClipContext
) -> Tensor:
    """Run a block; recompute it in the backward pass when `owner` has gradient checkpointing on."""
    if getattr(owner, "gradient_checkpointing", False) and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, module, hidden_states, context, use_reentrant=False)
    return function(module, hidden_states, context)

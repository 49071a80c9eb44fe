"""The forward passes of a residual block and a transformer block for a clip, over diffusers' modules.

Layer 3: diffusers' blocks hold the weights and keep their names. This file says how a clip passes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from posecrafter_rt import ops
from posecrafter_rt.errors import ModelError
from posecrafter_rt.ops import keyframe_attention, temporal_attention
from posecrafter_rt.spec import FEED_FORWARD_TOKENS

NormScope = Literal["clip", "frame"]
BlockForward = Callable[..., Tensor]  # (module, hidden_states, context) → hidden_states


def check_norm_scope(scope: str) -> None:
    """Raise ModelError unless it is one of `NormScope`."""
    if scope not in get_args(NormScope):
        raise ModelError(f"there is no norm_scope {scope!r}", f"choose {' or '.join(get_args(NormScope))}")


@dataclass(frozen=True)
class StreamMemory:
    """The keys and values that a stream's frames attend to, and those that later frames will need (docs/streaming.md).

    is_reference: bool (F,), True for frames that are the reference; their own keys and values are the key frame's.
        None: no frame is the reference, and the frames' own key-frame keys and values are not computed.
    keyframe_kv: per self-attention, in order, (F, h, w, 2C): the reference's keys and values at each frame's step.
    temporal_kv: per temporal attention, (F, M, h, w, 2C): those of the reference and of past frames at that step.
    window_mask: bool (F, M), True where there is such a frame. Each frame also attends to itself.
    new_keyframe_kv, new_temporal_kv: the frames' own, (F, h, w, 2C). Each layer appends its own during a forward.
    """

    is_reference: Tensor | None
    window_mask: Tensor
    keyframe_kv: Sequence[Tensor]
    temporal_kv: Sequence[Tensor]
    new_keyframe_kv: list[Tensor] = field(default_factory=list)
    new_temporal_kv: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ClipContext:
    """The inputs that all blocks of one forward share.

    groups: G, the number of prompts (guidance passes); the batch is (G·F) frames, group-major.
    time_projections: (G·F or G or 1, T), packed per-resnet projections of the timestep embedding.
    text_kv: (G, tokens, K) packed keys and values of every cross-attention.
    norm_scope: whether the residual blocks' GroupNorm takes its statistics per frame or over the clip.
    temporal_mask: bool (F, F), which frame attends to which; None: each to all.
    memory: of a stream. None: the frames are a clip; they attend to one another, and the first is the key frame.
    """

    groups: int
    time_projections: Tensor
    text_kv: Tensor
    norm_scope: NormScope
    temporal_mask: Tensor | None = None
    memory: StreamMemory | None = None


def assign_slices(resnets: Iterable[ResnetBlock2D], blocks: Iterable[BasicTransformerBlock]) -> tuple[int, int]:
    """Give each resnet and each cross-attention its slice of the packed tables; return the tables' widths (T, K)."""
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


def do_in_parts(denoiser: nn.Module, tokens_at_once: int) -> None:
    """Limit how many tokens (positions of frames) feed-forward, attention and convolutions process at once.

    This saves memory. Results change only by rounding, because the matrix products have other shapes. A token needs no
    more than the keys and values of its key frame and prompt, and the other frames at its position. In a residual block
    with statistics per frame, a frame needs no other frame.
    """
    for module in denoiser.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.tokens_at_once = tokens_at_once


def frame_group_norm(norm: nn.GroupNorm, hidden_states: Tensor, *, silu: bool = False) -> Tensor:
    """Apply GroupNorm to (N, C, h, w) with statistics per frame, then SiLU if `silu`."""
    return ops.group_norm(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def group_norm(norm: nn.GroupNorm, hidden_states: Tensor, context: ClipContext, *, silu: bool = False) -> Tensor:
    """Apply GroupNorm to (G·F, C, h, w), with statistics per frame or over all frames of a clip; SiLU if `silu`."""
    if context.norm_scope == "frame":
        return frame_group_norm(norm, hidden_states, silu=silu)
    frames = hidden_states.shape[0] // context.groups
    clips = hidden_states.reshape(context.groups, frames, norm.num_groups, -1).float()
    variance, mean = torch.var_mean(clips, dim=(1, 3), keepdim=True, correction=0)
    normalised = ((clips - mean) * torch.rsqrt(variance + norm.eps)).to(hidden_states.dtype)
    out = normalised.reshape(hidden_states.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return F.silu(out) if silu else out


def channels_last(module: nn.Module) -> nn.Module:
    """Convert convolution weights to channels-last, the fastest layout on CPUs and GPUs, in place; return `module`."""
    return nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]


def per_frame(values: Tensor, num_frames: int) -> Tensor:
    """(G·F or G or 1, …) → (G·F or 1, …): repeat a group's entry for each of its frames; a single entry broadcasts."""
    return (
        values if values.shape[0] in (num_frames, 1) else values.repeat_interleave(num_frames // values.shape[0], dim=0)
    )


def resnet_forward(resnet: ResnetBlock2D, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """Run diffusers' ResnetBlock2D with the timestep projection from the table. (G·F, C, h, w) → (G·F, C', h, w)."""
    at_once = _tokens_at_once(resnet)
    is_of_frames = context.norm_scope == "frame" and context.time_projections.shape[0] == 1
    if at_once is None or not is_of_frames:
        return _resnet(resnet, hidden_states, context)
    frames_at_once = at_once // hidden_states[0, 0].numel()
    return _in_parts(partial(_resnet, resnet, context=context), hidden_states, 0, frames_at_once)


def _resnet(resnet: ResnetBlock2D, hidden_states: Tensor, context: ClipContext) -> Tensor:
    shift = context.time_projections[:, resnet.time_slice, None, None]
    out = resnet.conv1(group_norm(resnet.norm1, hidden_states, context, silu=True))
    out = out + per_frame(shift, out.shape[0])
    out = resnet.conv2(group_norm(resnet.norm2, out, context, silu=True))
    if resnet.conv_shortcut is not None:
        hidden_states = resnet.conv_shortcut(hidden_states)
    return (hidden_states + out) / resnet.output_scale_factor


def _keyframe(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    attn, (_, tokens, channels) = block.attn1, hidden_states.shape
    if context.memory is None:
        keyframe = hidden_states.reshape(context.groups, -1, tokens, channels)[:, 0]  # K and V of one frame per group
        k, v = attn.to_k(keyframe), attn.to_v(keyframe)
    else:
        k, v = _remembered_keyframe(attn, hidden_states, context.memory)
    return _attend(block, attn, hidden_states, k, v)


def _remembered_keyframe(attn: Attention, hidden_states: Tensor, memory: StreamMemory) -> tuple[Tensor, Tensor]:
    """Return K and V (F, L, C) of each frame's key frame: the remembered ones, or its own if it is the reference."""
    if memory.is_reference is None:
        (kept,) = memory.keyframe_kv  # `predict_shallow` runs one layer only
        k, v = kept.flatten(1, 2).chunk(2, dim=-1)
        return k, v
    own = torch.cat([attn.to_k(hidden_states), attn.to_v(hidden_states)], dim=-1)
    kept = memory.keyframe_kv[len(memory.new_keyframe_kv)]
    memory.new_keyframe_kv.append(own.reshape(kept.shape))
    k, v = torch.where(memory.is_reference[:, None, None], own, kept.flatten(1, 2)).chunk(2, dim=-1)
    return k, v


def _temporal(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    attn = block.attn_temp
    frames, tokens, _ = hidden_states.shape
    clip = (context.groups if context.memory is None else frames, -1, tokens, attn.inner_dim)
    q, k, v = (project(hidden_states).reshape(clip) for project in (attn.to_q, attn.to_k, attn.to_v))
    mask = context.temporal_mask
    if context.memory is not None:
        k, v, mask = _remembered_frames(k, v, context.memory)
    out = temporal_attention(q, k, v, attn.heads, mask).reshape(frames, tokens, -1)
    if hasattr(block, "temporal_out"):  # conv_temp ∘ to_out, folded for inference
        return block.temporal_out(out)
    return block.conv_temp(attn.to_out[0](out))


def _remembered_frames(k: Tensor, v: Tensor, memory: StreamMemory) -> tuple[Tensor, Tensor, Tensor]:
    """Return K and V (F, M + 1, L, C) of what each frame attends to, itself last, and the mask (F, 1, M + 1)."""
    own = torch.cat([k, v], dim=-1)  # (F, 1, L, 2C)
    kept = memory.temporal_kv[len(memory.new_temporal_kv)]  # (F, M, h, w, 2C)
    memory.new_temporal_kv.append(own.reshape(kept.shape[0], *kept.shape[2:]))
    k, v = torch.cat([kept.flatten(2, 3), own], dim=1).chunk(2, dim=-1)
    itself = torch.ones_like(memory.window_mask[:, :1])
    mask = torch.cat([memory.window_mask, itself], dim=1)
    return k, v, mask[:, None]


def _text(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    key, value = context.text_kv[..., block.kv_slice].chunk(2, dim=-1)
    return _attend(block, block.attn2, hidden_states, key, value)


def _attend(block: BasicTransformerBlock, attn: Attention, hidden_states: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from (G·F, L, C) to keys and values (G, L', C) → (G·F, L, C), in parts if the block has a token limit."""

    def attend(queries: Tensor) -> Tensor:
        return attn.to_out[0](keyframe_attention(attn.to_q(queries), k, v, attn.heads))

    at_once = _tokens_at_once(block)
    if at_once is None:
        return attend(hidden_states)
    groups = k.shape[0]
    queries = hidden_states.reshape(groups, -1, hidden_states.shape[-1])
    return _in_parts(attend, queries, 1, at_once // groups).reshape(hidden_states.shape)


def transformer_block_forward(block: BasicTransformerBlock, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """Run key-frame, temporal and text attention, then the feed-forward. (G·F, L, C) → (G·F, L, C)."""
    normalised = block.norm1(hidden_states)
    out = hidden_states + _keyframe(block, normalised, context)
    if hasattr(block, "attn_temp"):  # in parallel with attn1, on the same input
        at_once = _tokens_at_once(block) if context.memory is None else None  # a stream has few frames
        temporal = partial(_temporal, block, context=context)
        out = out + _in_parts(temporal, normalised, 1, None if at_once is None else at_once // len(normalised))
    out = out + _text(block, block.norm2(out), context)
    return out + _feed_forward(block, block.norm3(out))


def _feed_forward(block: BasicTransformerBlock, hidden_states: Tensor) -> Tensor:
    """Run the feed-forward on parts of (G·F, L, C), so that its inner tensors, twelve times as wide, stay small."""
    at_once = _tokens_at_once(block, FEED_FORWARD_TOKENS)
    if at_once is None:
        return block.ff(hidden_states)
    return _in_parts(block.ff, hidden_states.flatten(0, 1), 0, at_once).reshape(hidden_states.shape)


def _tokens_at_once(block: nn.Module, default: int | None = None) -> int | None:
    """Return how many tokens a block may process at once; None: all, as while tracing and with gradients enabled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    at_once: int | None = getattr(block, "tokens_at_once", default)
    return at_once


def _in_parts(function: Callable[[Tensor], Tensor], tensor: Tensor, dim: int, at_once: int | None) -> Tensor:
    """Return function(tensor), computed on at most `at_once` entries of a dimension at a time; None: on all at once."""
    if at_once is None or tensor.shape[dim] <= at_once:
        return function(tensor)
    return torch.cat([function(part) for part in tensor.split(max(1, at_once), dim)], dim)


def transformer_forward(model: Transformer2DModel, hidden_states: Tensor, context: ClipContext) -> Tensor:
    """Run diffusers' Transformer2DModel on a clip; its own GroupNorm is always per frame. (G·F, C, h, w) → same."""
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

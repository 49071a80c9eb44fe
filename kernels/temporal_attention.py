"""`temporal_attention` in Triton: attention across frames at each position, without transposed copies.

Layer 2: device code and its launcher; `posecrafter_rt.ops` checks the arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posecrafter_rt.kernels.configs import (
    EAGER_OPTIONS,
    SCALE_LOG2E,
    TemporalConfig,
    on_device_of,
    split_head,
    temporal_config,
)
from posecrafter_rt.kernels.tiles import load_chunk, load_columns, store_columns

# Traced code has one tile for any number of frames, that of a typical clip: while tracing, the number of frames is a
# symbol, by which no tile can be chosen.
TRACED_FRAMES = 32


@triton.jit
def temporal_attention_kernel(  # noqa: PLR0913 - a kernel's arguments are its interface
    q_ptr, k_ptr, v_ptr, mask_ptr, num_queries, num_keys, tokens,
    q_group_stride, q_frame_stride, q_row_stride, k_group_stride, k_frame_stride, k_row_stride, channels, out_ptr,
    SCALE: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, GROUP_MASKS: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_P positions × BLOCK_Q query frames. Grid: (heads × query blocks, position blocks, groups).

    Heads are the fastest axis, so that programs that share 128-byte lines of a row run side by side. The frame axis is
    strided, so nothing is transposed before or after. v has k's strides; out is (G, Fq, L, C) contiguous;
    mask: (Fq, Fk) bytes, contiguous, or None; with GROUP_MASKS (G, Fq, Fk). A query without an allowed key yields 0.
    CHUNK: 0 keeps q in registers. Else scores are summed over CHUNK columns of q and k at a time, and q is read again
    (from cache) for each tile of keys, because large heads would spill.
    """
    heads = channels // HEAD_SIZE
    head = tl.program_id(0) % heads
    queries = (tl.program_id(0) // heads) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    positions = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = tl.program_id(2).to(tl.int64)
    column = head * HEAD_SIZE
    position_mask = (positions < tokens)[:, None, None]
    row_mask = position_mask & (queries < num_queries)[None, :, None]  # (P, Q, 1)
    q_frames = queries.to(tl.int64)[None, :, None]  # 64 bits: frame × stride may pass 2³¹ elements
    q_base = q_ptr + group * q_group_stride + column
    q_rows = q_base + q_frames * q_frame_stride + positions[:, None, None] * q_row_stride
    if CHUNK == 0:
        q_main = load_columns(q_rows, row_mask, 0, DIM_MAIN, HEAD_SIZE, True)
        q_tail = load_columns(q_rows, row_mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, True) if DIM_TAIL > 0 else q_main
    k_offset = group * k_group_stride + column + positions[:, None, None] * k_row_stride  # (P, 1, 1)

    acc_main = tl.zeros((BLOCK_P, BLOCK_Q, DIM_MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_P, BLOCK_Q, DIM_TAIL if DIM_TAIL > 0 else 16), tl.float32)
    peak = tl.full((BLOCK_P, BLOCK_Q), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    if GROUP_MASKS:
        mask_ptr += group * num_queries * num_keys
    for start in range(0, num_keys, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        key_mask = position_mask & (keys < num_keys)[None, :, None]  # (P, K, 1)
        offsets = k_offset + keys.to(tl.int64)[None, :, None] * k_frame_stride
        if CHUNK > 0:
            scores = tl.zeros((BLOCK_P, BLOCK_Q, BLOCK_K), tl.float32)
            for first in range(0, HEAD_SIZE, CHUNK):
                q_part = load_chunk(q_rows, row_mask, first, CHUNK, HEAD_SIZE)
                k_part = load_chunk(k_ptr + offsets, key_mask, first, CHUNK, HEAD_SIZE)
                scores = tl.dot(q_part, tl.permute(k_part, (0, 2, 1)), scores, input_precision=PRECISION)
        else:
            k_main = load_columns(k_ptr + offsets, key_mask, 0, DIM_MAIN, HEAD_SIZE, True)
            scores = tl.dot(q_main, tl.permute(k_main, (0, 2, 1)), input_precision=PRECISION)  # (P, Q, K)
            if DIM_TAIL > 0:
                k_tail = load_columns(k_ptr + offsets, key_mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, True)
                scores = tl.dot(q_tail, tl.permute(k_tail, (0, 2, 1)), scores, input_precision=PRECISION)
        allowed = (keys < num_keys)[None, :]
        if mask_ptr is not None:
            allowed = tl.load(
                mask_ptr + queries[:, None] * num_keys + keys[None, :],
                mask=(queries < num_queries)[:, None] & allowed, other=0,
            ) != 0  # fmt: skip
        scores = tl.where(allowed[None, :, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 2) * SCALE)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no allowed key so far: exp2(-inf - 0) = 0
        weights = tl.exp2(scores * SCALE - shift[:, :, None])
        correction = tl.exp2(peak - shift)
        total = total * correction + tl.sum(weights, 2)
        peak = new_peak
        v_main = load_columns(v_ptr + offsets, key_mask, 0, DIM_MAIN, HEAD_SIZE, True)
        weights = weights.to(v_main.dtype)
        acc_main = tl.dot(weights, v_main, acc_main * correction[:, :, None], input_precision=PRECISION)
        if DIM_TAIL > 0:
            v_tail = load_columns(v_ptr + offsets, key_mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, True)
            acc_tail = tl.dot(weights, v_tail, acc_tail * correction[:, :, None], input_precision=PRECISION)
    inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, :, None]  # total 0: no key allowed, the sums are 0 too
    out_frames = (group * num_queries + q_frames) * tokens
    out_rows = out_ptr + (out_frames + positions[:, None, None]) * channels + column
    store_columns(out_rows, row_mask, acc_main * inverse, 0, DIM_MAIN, HEAD_SIZE)
    if DIM_TAIL > 0:
        store_columns(out_rows, row_mask, acc_tail * inverse, DIM_MAIN, DIM_TAIL, HEAD_SIZE)


def constants(head_size: int, config: TemporalConfig, *, group_masks: bool = False) -> dict[str, int | float | str]:
    """Return the kernel's compile-time arguments. group_masks: whether each group has a mask of its own."""
    main, tail = split_head(head_size)
    return {
        "SCALE": SCALE_LOG2E * head_size**-0.5,
        "HEAD_SIZE": head_size,
        "DIM_MAIN": main,
        "DIM_TAIL": tail,
        "BLOCK_P": config.block_p,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "PRECISION": config.precision,
        "CHUNK": config.chunk,
        "GROUP_MASKS": group_masks,
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, *,
    config: TemporalConfig | None = None, is_traced: bool = False,
) -> Tensor:  # fmt: skip
    """Run the kernel. q: (G, Fq, L, C); k, v: (G, Fk, L, C), any strides but channels contiguous → (G, Fq, L, C).

    mask: bool (Fq, Fk), (G, Fq, Fk) or None. config: None: the table's. is_traced: emit a traceable launch.
    """
    groups, num_queries, tokens, channels = q.shape
    num_keys = k.shape[1]
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    out = q.new_empty(groups, num_queries, tokens, channels)
    head_size = channels // heads
    if config is None:
        frames = (TRACED_FRAMES, TRACED_FRAMES) if is_traced else (num_queries, num_keys)
        config = temporal_config(torch.cuda.get_device_capability(q.device), q.dtype, head_size, *frames)
    mask_bytes = None if mask is None else mask.contiguous().view(torch.uint8)
    kernel = torch.library.wrap_triton(temporal_attention_kernel) if is_traced else temporal_attention_kernel
    grid = (heads * triton.cdiv(num_queries, config.block_q), triton.cdiv(tokens, config.block_p), groups)
    with on_device_of(q, is_traced=is_traced):
        kernel[grid](
            q, k, v, mask_bytes, num_queries, num_keys, tokens, *q.stride()[:3], *k.stride()[:3], channels, out,
            **constants(head_size, config, group_masks=mask is not None and mask.ndim == 3), num_warps=config.num_warps, num_stages=config.num_stages,
            **({} if is_traced else EAGER_OPTIONS),
        )  # fmt: skip
    return out

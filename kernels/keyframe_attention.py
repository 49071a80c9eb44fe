"""`keyframe_attention` in Triton: all frames' queries of one head stream over the key frame's keys and values.

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
    TileConfig,
    keyframe_config,
    on_device_of,
    split_head,
)
from posecrafter_rt.kernels.tiles import load_columns, store_columns


@triton.jit
def _step(  # noqa: PLR0913 - a kernel's arguments are its interface
    q_main, q_tail, k_base, v_base, k_row_stride, v_row_stride, start, num_keys, acc_main, acc_tail, peak, total,
    SCALE: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold BLOCK_N keys from `start` into the running softmax; peak and total are in powers of two."""
    keys = start + tl.arange(0, BLOCK_N)
    mask = (keys < num_keys)[:, None]
    k_rows = k_base + keys[:, None] * k_row_stride
    v_rows = v_base + keys[:, None] * v_row_stride
    k_main = load_columns(k_rows, mask, 0, DIM_MAIN, HEAD_SIZE, MASKED)
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if DIM_TAIL > 0:
        k_tail = load_columns(k_rows, mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, MASKED)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where((keys < num_keys)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_peak[:, None])
    correction = tl.exp2(peak - new_peak)
    total = total * correction + tl.sum(weights, 1)
    v_main = load_columns(v_rows, mask, 0, DIM_MAIN, HEAD_SIZE, MASKED)
    weights = weights.to(v_main.dtype)
    acc_main = tl.dot(weights, v_main, acc_main * correction[:, None], input_precision=PRECISION)
    if DIM_TAIL > 0:
        v_tail = load_columns(v_rows, mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, MASKED)
        acc_tail = tl.dot(weights, v_tail, acc_tail * correction[:, None], input_precision=PRECISION)
    return acc_main, acc_tail, new_peak, total


@triton.jit
def keyframe_attention_kernel(  # noqa: PLR0913 - a kernel's arguments are its interface
    q_ptr, k_ptr, v_ptr, num_rows, num_keys, q_row_stride, k_row_stride, v_row_stride,
    k_group_stride, v_group_stride, channels, out_ptr,
    SCALE: tl.constexpr, HEAD_SIZE: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M of a group's F·L query rows, for one head. Grid: (row blocks, heads, groups).

    Neighbouring programs share a head, so its K and V (L' × d) stay in L2. The arguments have an ahead-of-time plugin's
    order: inputs, integers, output. num_rows: F·L of one group; strides in elements; out is contiguous.
    A head's d columns are split into a main power of two and a tail of at least 16 (40 = 32 + 8 of 16, 80 = 64 + 16,
    160 = 128 + 32). Padding d itself to a power of two would multiply zeros in 38 % of the lanes.
    """
    first = tl.program_id(0) * BLOCK_M
    group = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * HEAD_SIZE
    rows = tl.arange(0, BLOCK_M)
    row_mask = (first + rows < num_rows)[:, None]
    first_row = group * num_rows + first  # over all groups: 64 bits, for clips of more than 2³¹ elements
    q_rows = q_ptr + first_row * q_row_stride + column + rows[:, None] * q_row_stride
    q_main = load_columns(q_rows, row_mask, 0, DIM_MAIN, HEAD_SIZE, True)
    q_tail = load_columns(q_rows, row_mask, DIM_MAIN, DIM_TAIL, HEAD_SIZE, True) if DIM_TAIL > 0 else q_main
    k_base = k_ptr + group * k_group_stride + column
    v_base = v_ptr + group * v_group_stride + column

    acc_main = tl.zeros((BLOCK_M, DIM_MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, DIM_TAIL if DIM_TAIL > 0 else 16), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc_main, acc_tail, peak, total = _step(
            q_main, q_tail, k_base, v_base, k_row_stride, v_row_stride, start, num_keys, acc_main, acc_tail, peak,
            total, SCALE, HEAD_SIZE, DIM_MAIN, DIM_TAIL, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    # The keys beyond the last whole tile, 16 at a time, which is one tensor-core operation. If there were several,
    # ptxas 12.8 (of Triton 3.6) would give the second a wrong address in shared memory on sm_90.
    for start in range(whole, num_keys, 16):
        acc_main, acc_tail, peak, total = _step(
            q_main, q_tail, k_base, v_base, k_row_stride, v_row_stride, start, num_keys, acc_main, acc_tail, peak,
            total, SCALE, HEAD_SIZE, DIM_MAIN, DIM_TAIL, 16, PRECISION, True,
        )  # fmt: skip
    out_rows = out_ptr + first_row * channels + column + rows[:, None] * channels
    store_columns(out_rows, row_mask, acc_main / total[:, None], 0, DIM_MAIN, HEAD_SIZE)
    if DIM_TAIL > 0:
        store_columns(out_rows, row_mask, acc_tail / total[:, None], DIM_MAIN, DIM_TAIL, HEAD_SIZE)


def constants(head_size: int, config: TileConfig) -> dict[str, int | float | str]:
    """Return the kernel's compile-time arguments."""
    main, tail = split_head(head_size)
    return {
        "SCALE": SCALE_LOG2E * head_size**-0.5,
        "HEAD_SIZE": head_size,
        "DIM_MAIN": main,
        "DIM_TAIL": tail,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": config.precision,
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, config: TileConfig | None = None, is_traced: bool = False
) -> Tensor:
    """Run the kernel. q: (G·F, L, C), frames dense over rows; k, v: (G, L', C); channels contiguous → (G·F, L, C).

    config: None: the table's for this device. is_traced: emit a traceable launch instead of running.
    """
    frames, tokens, channels = q.shape
    groups, num_keys, _ = k.shape
    if q.stride(0) != tokens * q.stride(1):
        q = q.contiguous()
    out = q.new_empty(frames, tokens, channels)
    num_rows = frames // groups * tokens
    head_size = channels // heads
    config = config or keyframe_config(torch.cuda.get_device_capability(q.device), q.dtype, head_size)
    kernel = torch.library.wrap_triton(keyframe_attention_kernel) if is_traced else keyframe_attention_kernel
    grid = (triton.cdiv(num_rows, config.block_m), heads, groups)
    with on_device_of(q, is_traced=is_traced):
        kernel[grid](
            q, k, v, num_rows, num_keys, q.stride(1), k.stride(1), v.stride(1), k.stride(0), v.stride(0), channels, out,
            **constants(head_size, config), num_warps=config.num_warps, num_stages=config.num_stages,
            **({} if is_traced else EAGER_OPTIONS),
        )  # fmt: skip
    return out

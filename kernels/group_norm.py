"""`group_norm` in Triton: statistics, coefficients and the normalised result of frames with channels contiguous.

Layer 2: device code and its launcher; `posecrafter_rt.ops` checks the arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posecrafter_rt.kernels.configs import EAGER_OPTIONS, NormConfig, norm_config, on_device_of


@triton.jit
def _load_tile(x_ptr, first_row, num_rows, channels, columns, BLOCK_ROWS: tl.constexpr):
    """Load BLOCK_ROWS rows from `first_row` (64 bits) as float32; rows and columns beyond the last read as 0."""
    rows = tl.arange(0, BLOCK_ROWS)
    mask = (rows < num_rows)[:, None] & (columns < channels)[None, :]
    offsets = rows[:, None] * channels + columns[None, :]
    return tl.load(x_ptr + first_row * channels + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr, num_rows, channels, rows_per_block, partials_ptr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Compute mean and sum of squared deviations (M2) of each channel over rows_per_block rows.

    Grid: (row blocks, channel blocks, frames). x: (N, L, C); partials: float32 (N, row blocks, 2, C). It makes two
    passes over a tile in registers and joins a block's tiles by Chan's formula, which never subtracts large squares.
    """
    block = tl.program_id(0)
    frame = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, num_rows)
    rows = tl.arange(0, BLOCK_ROWS)
    mean = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    m2 = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        count = tl.minimum(last - start, BLOCK_ROWS)
        tile = _load_tile(x_ptr, frame * num_rows + start, count, channels, columns, BLOCK_ROWS)
        tile_mean = tl.sum(tile, 0) / count
        centred = tl.where((rows < count)[:, None], tile - tile_mean[None, :], 0.0)
        share = count / (start - first + count).to(tl.float32)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tl.sum(centred * centred, 0) + delta * delta * (share * (start - first))
    partial = partials_ptr + (frame * tl.num_programs(0) + block) * 2 * channels + columns
    tl.store(partial, mean, mask=columns < channels)
    tl.store(partial + channels, m2, mask=columns < channels)


@triton.jit
def group_norm_coefficients_kernel(  # noqa: PLR0913 - a kernel's arguments are its interface
    partials_ptr, weight_ptr, bias_ptr, num_rows, channels, group_channels, num_blocks, rows_per_block, eps,
    coefficients_ptr, BLOCKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Join one group's partial statistics; per channel store scale = weight / σ and shift = bias - mean · scale.

    Grid: (groups, frames). coefficients: float32 (N, 2, C). BLOCKS is at least num_blocks. The partial statistics are
    read twice (from cache): for the mean, then for the deviations from it.
    """
    frame = tl.program_id(1).to(tl.int64)
    first_channel = tl.program_id(0) * group_channels
    blocks = tl.arange(0, BLOCKS)
    columns = tl.arange(0, BLOCK_CHANNELS)
    counts = tl.minimum(num_rows - blocks * rows_per_block, rows_per_block).to(tl.float32)[:, None]
    rows = partials_ptr + frame * num_blocks * 2 * channels + first_channel + blocks[:, None] * (2 * channels)
    size = 1.0 * num_rows * group_channels  # num_rows has no .to() if it is 1: Triton then makes it a constant
    sums = tl.zeros((BLOCKS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, group_channels, BLOCK_CHANNELS):
        mask = (blocks < num_blocks)[:, None] & (start + columns < group_channels)[None, :]
        sums += counts * tl.load(rows + (start + columns)[None, :], mask=mask, other=0.0)
    mean = tl.sum(tl.sum(sums, 1), 0) / size
    squares = tl.zeros((BLOCKS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, group_channels, BLOCK_CHANNELS):
        mask = (blocks < num_blocks)[:, None] & (start + columns < group_channels)[None, :]
        delta = tl.load(rows + (start + columns)[None, :], mask=mask, other=0.0) - mean
        m2 = tl.load(rows + channels + (start + columns)[None, :], mask=mask, other=0.0)
        squares += tl.where(mask, m2 + counts * delta * delta, 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / size + eps)
    for start in range(0, group_channels, BLOCK_CHANNELS):
        mask = start + columns < group_channels
        channel = first_channel + start + columns
        scale = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32) * inverse_deviation
        bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        coefficients = coefficients_ptr + frame * 2 * channels + channel
        tl.store(coefficients, scale, mask=mask)
        tl.store(coefficients + channels, bias - mean * scale, mask=mask)


@triton.jit
def group_norm_apply_kernel(  # noqa: PLR0913 - a kernel's arguments are its interface
    x_ptr, coefficients_ptr, num_rows, channels, out_ptr,
    SILU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = x · scale + shift, then SiLU, rounded once. Grid: (row blocks, channel blocks, frames)."""
    first = tl.program_id(0) * BLOCK_ROWS
    frame = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    rows = tl.arange(0, BLOCK_ROWS)
    mask = columns < channels
    coefficients = coefficients_ptr + frame * 2 * channels + columns
    scale = tl.load(coefficients, mask=mask, other=0.0)
    shift = tl.load(coefficients + channels, mask=mask, other=0.0)
    first_row = frame * num_rows + first  # over all frames: 64 bits, for clips of more than 2³¹ elements
    tile = _load_tile(x_ptr, first_row, num_rows - first, channels, columns, BLOCK_ROWS)
    out = tile * scale[None, :] + shift[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    offsets = rows[:, None] * channels + columns[None, :]
    tl.store(
        out_ptr + first_row * channels + offsets, out.to(out_ptr.dtype.element_ty),
        mask=(rows < num_rows - first)[:, None] & mask[None, :],
    )  # fmt: skip


def launch(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool,
    config: NormConfig | None = None,
) -> Tensor:
    """Run the kernels. x: (N, C, h, w), dense in channels_last → the same shape, dtype and layout.

    config: None takes the one for this number of positions.
    """
    frames, channels, height, width = x.shape
    num_rows = height * width
    config = config or norm_config(num_rows)
    rows_per_block = config.rows_per_block(num_rows)
    num_blocks = triton.cdiv(num_rows, rows_per_block)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    partials = x.new_empty(frames, num_blocks, 2, channels, dtype=torch.float32)
    coefficients = x.new_empty(frames, 2, channels, dtype=torch.float32)
    channel_blocks = triton.cdiv(channels, config.block_channels)
    tile = {"BLOCK_ROWS": config.block_rows, "BLOCK_CHANNELS": config.block_channels}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **EAGER_OPTIONS}
    with on_device_of(x):
        group_norm_statistics_kernel[num_blocks, channel_blocks, frames](
            x, num_rows, channels, rows_per_block, partials, **tile, **options
        )
        group_norm_coefficients_kernel[num_groups, frames](
            partials, weight, bias, num_rows, channels, channels // num_groups, num_blocks, rows_per_block, eps,
            coefficients, BLOCKS=config.max_blocks, BLOCK_CHANNELS=config.group_channels, **options,
        )  # fmt: skip
        group_norm_apply_kernel[triton.cdiv(num_rows, config.block_rows), channel_blocks, frames](
            x, coefficients, num_rows, channels, out, SILU=silu, **tile, **options
        )
    return out

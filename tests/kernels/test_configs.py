"""The table of launch settings: complete, and found for every head size, device and number of frames.

Tests of kernels/configs.py and configs.json.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("posecrafter_rt.kernels") is None:
    pytest.skip("the package is not installed", allow_module_level=True)

from posecrafter_rt.kernels.configs import (
    keyframe_config,
    missing_reason,
    split_head,
    table_capability,
    temporal_config,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("head_size", range(8, 257, 8))
def test_split_head_holds_the_head_in_tiles_that_tensor_cores_take(head_size: int) -> None:
    main, tail = split_head(head_size)
    assert main & (main - 1) == 0 and main >= 16
    assert tail == 0 or (tail & (tail - 1) == 0 and tail >= 16)
    assert head_size <= main + tail < 2 * max(head_size, 16)


def test_split_head_wastes_nothing_on_sd15s_larger_heads() -> None:
    assert split_head(40) == (32, 16)
    assert split_head(80) == (64, 16)
    assert split_head(160) == (128, 32)
    assert split_head(64) == (64, 0)


CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
FRAMES = (1, 9, 16, 17, 101, 256, 1000)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_finds_a_row_or_is_refused(capability: tuple[int, int], dtype: torch.dtype) -> None:
    for head_size in range(8, 257, 8):
        if missing_reason("keyframe_attention", capability, dtype, head_size) is None:
            tile = keyframe_config(capability, dtype, head_size)
            assert tile.block_m >= 16 and tile.block_n >= 16 and tile.num_warps in (1, 2, 4, 8)
        for frames in FRAMES:
            if missing_reason("temporal_attention", capability, dtype, head_size, frames) is None:
                config = temporal_config(capability, dtype, head_size, frames, 1)
                assert config.block_q >= 16 and config.block_k >= 16 and config.block_p >= 1


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_sixteen_bit_heads_of_sd15_have_rows(capability: tuple[int, int], dtype: torch.dtype) -> None:
    for head_size in range(8, 161, 8):
        assert missing_reason("keyframe_attention", capability, dtype, head_size) is None
        assert all(missing_reason("temporal_attention", capability, dtype, head_size, n) is None for n in FRAMES)


@pytest.mark.parametrize(
    ("op", "dtype", "limits"),
    [
        ("keyframe_attention", torch.float16, {86: 160, 90: 256}),
        ("keyframe_attention", torch.float32, {86: 80, 90: 80}),
        ("temporal_attention", torch.bfloat16, {86: 160, 90: 160}),
        ("temporal_attention", torch.float32, {86: 160, 90: 160}),
    ],
)
def test_the_largest_heads_are_those_of_the_documents(op: str, dtype: torch.dtype, limits: dict[int, int]) -> None:
    for capability, largest in limits.items():
        for frames in FRAMES:
            reasons = [
                missing_reason(op, divmod(capability, 10), dtype, size, frames) for size in (largest, largest + 8)
            ]
            assert reasons[0] is None and reasons[1] is not None


def test_a_missing_row_names_the_launch() -> None:
    reason = missing_reason("keyframe_attention", (8, 6), torch.float16, 512)
    assert reason == "no tile for head size 512 in torch.float16 on compute capability 8.6"


def test_blackwell_for_the_desk_has_the_small_shared_memory_again() -> None:
    assert [table_capability(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [86, 86, 90, 90, 86]

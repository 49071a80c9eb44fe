"""Kernels as TensorRT launches them: tiles within 48 KiB, PTX that takes exactly the declared arguments.

Tests of kernels/plugins.py; compiled for GPUs that are not there.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if find_spec("posecrafter_rt.kernels") is None:
    pytest.skip("the package is not installed", allow_module_level=True)

from posecrafter_rt.kernels.configs import TemporalConfig, TileConfig
from posecrafter_rt.kernels.plugins import (
    KERNELS,
    SHARED_BYTES,
    integer_names,
    named_apart,
    plugin_kernel,
    smaller_tiles,
    strip_ptx,
    unsupported_reason,
)

PTX = """.version 8.6
.visible .entry attend(
	.param .u64 .ptr .global .align 1 attend_param_0,
	.param .u32 attend_param_1,
	.param .u64 .ptr .global .align 1 attend_param_2
)
.reqntid 128
{
	.loc	1 49 0                          // attention.py:49:0
	ld.param.b64 	%rd1, [attend_param_0];
	ld.param.b32 	%r1, [attend_param_1];
	ret;
}
	.file	1 "/home/somebody/attention.py"
	.section	.debug_abbrev
	{
.b8 1                                   // Abbreviation Code
	}
	.section	.debug_macinfo	{	}
"""


def test_scratch_parameters_and_debug_information_go() -> None:
    stripped = strip_ptx(PTX, "attend", 2)
    assert "attend_param_1\n)" in stripped and "attend_param_2" not in stripped
    assert not any(word in stripped for word in (".loc", ".file", ".debug", "somebody"))
    assert stripped.count("ld.param") == 2 and ".reqntid 128" in stripped


def test_a_parameter_that_is_read_is_not_dropped() -> None:
    with pytest.raises(ValueError, match="attend reads attend_param_1"):
        strip_ptx(PTX, "attend", 1)
    with pytest.raises(ValueError, match="takes 3 arguments, not 4"):
        strip_ptx(PTX, "attend", 4)
    with pytest.raises(ValueError, match="no entry other"):
        strip_ptx(PTX, "other", 2)


def test_a_kernel_is_named_after_its_ptx() -> None:
    name, ptx = named_apart("attend", PTX)
    assert name.startswith("attend_") and f".entry {name}(" in ptx and ptx.replace(name, "attend") == PTX
    assert [word.removeprefix(name) for word in re.findall(r"attend_\w+", ptx)] == [
        "", *(f"_param_{number}" for number in (0, 1, 2, 0, 1))]  # fmt: skip
    assert named_apart("attend", PTX) == (name, ptx)
    assert named_apart("attend", PTX.replace("128", "256"))[0] != name


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_of_one_plan_have_names_of_their_own(op: str) -> None:
    """TensorRT runs what it was given last under a name for all of that name."""
    kernels = [plugin_kernel(op, (8, 6), torch.float16, head_size, 16)[0] for head_size in (40, 80)]
    assert len({kernel.name for kernel in kernels}) == 2
    for kernel in kernels:
        assert re.findall(r"\.entry (\w+)\(", kernel.ptx) == [kernel.name]


def test_tiles_shrink_to_the_smallest() -> None:
    tile = TileConfig(128, 64, 8, 3)
    tiles = list(smaller_tiles(tile))
    assert tiles[:3] == [tile, replace(tile, num_stages=2), replace(tile, num_stages=2, block_n=32)]
    assert tiles[-1] == TileConfig(16, 16, 8, 1)
    assert list(smaller_tiles(TemporalConfig(2, 16, 32, 4, 1))) == [
        TemporalConfig(2, 16, 32, 4, 1), TemporalConfig(2, 16, 16, 4, 1), TemporalConfig(1, 16, 16, 4, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "heads", "is_served"), [(320, 8, True), (48, 4, False), (24, 3, False), (8, 1, False)]
)
def test_widths_without_a_plugin_are_told(channels: int, heads: int, is_served: bool) -> None:
    reason = unsupported_reason("keyframe_attention", (8, 6), torch.float16, channels, heads)
    assert (reason is None) == is_served


@pytest.mark.parametrize(
    ("op", "capability", "head_size"),
    [
        *((op, (8, 6), head_size) for op in KERNELS for head_size in (40, 80)),
        ("keyframe_attention", (9, 0), 40),  # the table's tile has 54 KiB
        ("temporal_attention", (8, 9), 40),
        *(
            pytest.param(op, capability, 160, marks=pytest.mark.slow)
            for op in KERNELS
            for capability in ((8, 6), (9, 0))
        ),
    ],
)
def test_kernels_take_what_is_declared_and_assemble(
    tmp_path: Path, op: str, capability: tuple[int, int], head_size: int
) -> None:
    kernel, tile = plugin_kernel(op, capability, torch.float16, head_size, 16)
    assert kernel.shared_bytes <= SHARED_BYTES and kernel.spill_bytes == 0
    assert f".reqntid {32 * kernel.num_warps}\n" in kernel.ptx
    kinds = re.findall(rf"\.param \.(u32|u64)(?: \.ptr\S*)?.* {kernel.name}_param_\d+", kernel.ptx)
    assert kinds == ["u64"] * 3 + ["u32"] * len(integer_names(op)) + ["u64"]
    assert str(Path(__file__).parents[2]) not in kernel.ptx
    target = re.search(r"\.target (\S+)", kernel.ptx)
    assert target is not None and target[1].startswith(f"sm_{capability[0]}{capability[1]}")
    (tmp_path / "kernel.ptx").write_text(kernel.ptx)
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-arch", target[1], tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    assembled = subprocess.run(command, capture_output=True, text=True)
    assert assembled.returncode == 0, assembled.stderr

"""Every row of the launch table compiles ahead of time, without spills and within the devices' limits.

Tests of kernels/compile.py, configs.json and the kernels as device code.
"""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if find_spec("posecrafter_rt.kernels") is None:
    pytest.skip("the package is not installed", allow_module_level=True)

from bench.kernel_fits import DTYPES, REPRESENTATIVES, TARGETS
from posecrafter_rt.kernels import keyframe_attention, temporal_attention
from posecrafter_rt.kernels.compile import Compiled, compile_keyframe, compile_temporal
from posecrafter_rt.kernels.configs import TABLE, TemporalConfig, TileConfig

SHARED_LIMITS = {86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes a block may use
KEYS = ("capability", "element_bytes", "max_head_size", "max_frames")


def rows(op: str) -> list[Any]:
    """The table's rows for each target."""
    found = []
    for row in json.loads(TABLE.read_text())[op]:
        for target in TARGETS[row["capability"]]:
            name = f"sm_{target}-{'-'.join(str(row[key]) for key in KEYS[1:] if key in row)}"
            found.append(pytest.param(target, row, id=name))
    return found


def assert_fits(built: Compiled, target: int) -> None:
    assert built.spill_bytes == 0
    assert built.registers <= 255
    assert built.shared_bytes <= SHARED_LIMITS[target]
    assert f".target sm_{target}" in built.ptx


@pytest.mark.parametrize(("target", "row"), rows("keyframe_attention"))
def test_keyframe_attention_compiles(target: int, row: dict[str, Any]) -> None:
    config = TileConfig(**{name: value for name, value in row.items() if name not in KEYS})
    for dtype in DTYPES[row["element_bytes"]]:
        built = compile_keyframe(target, dtype, REPRESENTATIVES[row["max_head_size"]], config)
        assert_fits(built, target)
        if row["element_bytes"] == 2:
            assert ("wgmma" if target == 90 else "mma.sync") in built.ptx
            assert config.num_stages == 1 or "cp.async" in built.ptx  # aligned strides pipeline their loads


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("target", "row"), rows("temporal_attention"))
def test_temporal_attention_compiles(target: int, row: dict[str, Any], has_mask: bool) -> None:
    config = TemporalConfig(**{name: value for name, value in row.items() if name not in KEYS})
    sizes = [REPRESENTATIVES[row["max_head_size"]]]
    if config.chunk:  # chosen with few registers to spare, of which a padded head takes more
        sizes.append(row["max_head_size"] - 8)
    for head_size, dtype in itertools.product(sizes, DTYPES[row["element_bytes"]]):
        assert_fits(compile_temporal(target, dtype, head_size, config, has_mask=has_mask), target)


def test_the_ptx_version_can_be_capped() -> None:
    built = compile_keyframe(90, torch.float16, 40, TileConfig(64, 32, 4, 2), ptx_version=86)
    assert ".version 8.6" in built.ptx


def test_traced_launches_are_graph_nodes_on_a_device_that_is_not_there() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def attend(q: torch.Tensor, k: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tile, block = TileConfig(64, 64, 4, 3), TemporalConfig(4, 16, 16, 4, 1)
        out = keyframe_attention.launch(q, k, k, 2, config=tile, is_traced=True)
        return out, temporal_attention.launch(clip, clip, clip, 2, None, config=block, is_traced=True)

    with FakeTensorMode():
        shapes = ((6, 33, 80), (2, 33, 80), (1, 6, 33, 80))
        inputs = [torch.empty(shape, device="cuda", dtype=torch.float16) for shape in shapes]
        graph = make_fx(attend)(*inputs).graph
    launches = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [node.kwargs["grid"] for node in launches] == [[(2, 2, 2)], [(2, 9, 1)]]

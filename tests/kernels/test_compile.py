"""Every row of the launch table compiles ahead of time, without spills and within the devices' limits.

Tests of kernels/compile.py, configs.json and the kernels as device code.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if find_spec("posecrafter_rt.kernels") is None:
    pytest.skip("the package is not installed", allow_module_level=True)

from bench.kernel_fits import DTYPES, REPRESENTATIVES, TARGETS
from posecrafter_rt.kernels import group_norm, keyframe_attention, temporal_attention
from posecrafter_rt.kernels.compile import Compiled, compile_group_norm, compile_keyframe, compile_temporal, cuobjdump
from posecrafter_rt.kernels.configs import TABLE, TemporalConfig, TileConfig, norm_config

SHARED_LIMITS = {86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes a block may use
MAX_STREAM_FRAMES = 32  # the reference, what a stream remembers, and the frame itself
KEYS = ("capability", "element_bytes", "max_head_size", "max_frames")


def rows(op: str) -> list[Any]:
    """The table's rows for each target. sm_89 has the rows and the limits of sm_86."""
    found = []
    for row in json.loads(TABLE.read_text())[op]:
        for target in TARGETS[row["capability"]]:
            name = f"sm_{target}-{'-'.join(str(row[key]) for key in KEYS[1:] if key in row)}"
            found.append(pytest.param(target, row, id=name, marks=[pytest.mark.slow] if target == 89 else []))
    return found


def assert_fits(built: Compiled, target: int) -> None:
    assert built.spill_bytes == 0
    assert built.registers <= 255
    assert built.shared_bytes <= SHARED_LIMITS[target]
    assert f".target sm_{target}" in built.ptx


def torn_descriptors(cubin: bytes) -> list[str]:
    """Where ptxas computed the high word of a shared-memory descriptor from the low one.

    ptxas 12.8, of Triton 3.6 and 3.7, does so for some of the operations in a branch; on an H100 they read other blocks'
    memory. In assembly: an addition with carry whose first source is that of the addition which made the carry.
    """
    sources: dict[str, str] = {}  # of each carry that is still good, the low word that it came from
    torn = []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?) ;", cuobjdump(cubin, "-sass")):
        high = re.match(r"UIADD3\.X UR\d+, (UR\d+), \S+, URZ, (UP\d), !UPT", line)
        if high and sources.get(high[2]) == high[1]:
            torn.append(line)
        written = re.match(r"(?:@!?U?P\d )?\S+ (UR\d+)", line)
        if written:
            sources = {carry: source for carry, source in sources.items() if source != written[1]}
        low = re.match(r"UIADD3 (UR\d+), (UP\d), (UR\d+), \S+, URZ", line)
        if low and low[1] != low[3]:
            sources[low[2]] = low[3]
    return torn


@pytest.mark.parametrize(("target", "row"), rows("keyframe_attention"))
def test_keyframe_attention_compiles(target: int, row: dict[str, Any]) -> None:
    config = TileConfig(**{name: value for name, value in row.items() if name not in KEYS})
    for dtype in DTYPES[row["element_bytes"]]:
        built = compile_keyframe(target, dtype, REPRESENTATIVES[row["max_head_size"]], config)
        assert_fits(built, target)
        if row["element_bytes"] == 2:
            assert ("wgmma" if target == 90 else "mma.sync") in built.ptx
            assert config.num_stages == 1 or "cp.async" in built.ptx  # aligned strides pipeline their loads
        if target == 90:
            assert not torn_descriptors(built.cubin)


@pytest.mark.parametrize("mask", ["none", "groups"])
@pytest.mark.parametrize(("target", "row"), rows("temporal_attention"))
def test_temporal_attention_compiles(target: int, row: dict[str, Any], mask: Literal["none", "groups"]) -> None:
    if mask == "groups" and row["max_frames"] > MAX_STREAM_FRAMES:
        pytest.skip("only a stream has a mask for each group, and it remembers fewer frames")
    assert_temporal_fits(target, row, mask)


@pytest.mark.parametrize(("target", "row"), [
    pytest.param(*row.values, id=row.id, marks=[] if row.values[0] == 90 else [pytest.mark.slow])
    for row in rows("temporal_attention")
])  # fmt: skip
def test_temporal_attention_compiles_with_one_mask_for_all(target: int, row: dict[str, Any]) -> None:
    """Which no network asks for: callers of the operator do."""
    assert_temporal_fits(target, row, "shared")


def assert_temporal_fits(target: int, row: dict[str, Any], mask: Literal["none", "shared", "groups"]) -> None:
    config = TemporalConfig(**{name: value for name, value in row.items() if name not in KEYS})
    sizes = [REPRESENTATIVES[row["max_head_size"]]]
    if config.chunk:  # chosen with few registers to spare, of which a padded head takes more
        sizes.append(row["max_head_size"] - 8)
    for head_size, dtype in itertools.product(sizes, DTYPES[row["element_bytes"]]):
        assert_fits(compile_temporal(target, dtype, head_size, config, mask=mask), target)


@pytest.mark.parametrize("dtype", [dtype for dtypes in DTYPES.values() for dtype in dtypes], ids=str)
@pytest.mark.parametrize("target", [86, pytest.param(89, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("num_rows", [64, 4096])
def test_group_norm_compiles(num_rows: int, target: int, dtype: torch.dtype) -> None:
    for built in compile_group_norm(target, dtype, norm_config(num_rows), silu=True):
        assert_fits(built, target)
        if "coefficients" not in built.name:  # the others are as fast as memory: 16 bytes a thread at a time
            assert "ld.global.v4.b32" in built.ptx
        if "apply" in built.name:
            assert "st.global.v4.b32" in built.ptx and "st.global.b" not in built.ptx


def test_the_ptx_version_can_be_capped() -> None:
    built = compile_keyframe(90, torch.float16, 40, TileConfig(64, 32, 4, 2), ptx_version=86)
    assert ".version 8.6" in built.ptx


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the thread's current one, where Triton launches."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    current, launched_on = [torch.device("cuda:0")], []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launched_on.append(current[-1])

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    for module in (keyframe_attention, temporal_attention, group_norm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches())
    with FakeTensorMode():
        q, clip, weight = (torch.empty(shape, device="cuda:1") for shape in ((2, 8, 80), (1, 2, 8, 80), (80,)))
        x = torch.empty(1, 80, 4, 4, device="cuda:1", memory_format=torch.channels_last)
        keyframe_attention.launch(q, q, q, 2, config=TileConfig(64, 64, 4, 3))
        temporal_attention.launch(clip, clip, clip, 2, None, config=TemporalConfig(4, 16, 16, 4, 1))
        group_norm.launch(x, 8, weight, weight, 1e-5, silu=True)
    assert launched_on == [torch.device("cuda:1")] * 5


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

"""Launch parameters of the plugins are those that the kernels' own launchers pass.

Tests of engines/tensorrt_plugins.py that need no TensorRT.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posecrafter_rt.engines.tensorrt_plugins import PLUGIN_OPS, check_size, launch_parameters, typical_frames
from posecrafter_rt.export.functions import DOMAIN, function_protos


def ceil_div(length: int, block: int) -> int:
    return -(-length // block)


class Recorder:
    """Stands where a kernel is: keeps the grid and the arguments of a launch instead of launching."""

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.integers = [value for value in arguments if isinstance(value, int)]
        self.order = [
            "tensor" if isinstance(value, torch.Tensor) else "integer" for value in arguments if value is not None
        ]


@pytest.mark.parametrize(("groups", "frames", "tokens", "keys"), [(1, 1, 1, 1), (2, 5, 97, 77), (3, 16, 64, 64)])
def test_keyframe_attention(monkeypatch: pytest.MonkeyPatch, groups: int, frames: int, tokens: int, keys: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from posecrafter_rt.kernels import keyframe_attention
    from posecrafter_rt.kernels.configs import TileConfig
    from posecrafter_rt.kernels.plugins import integer_names

    recorder, tile = Recorder(), TileConfig(64, 32, 4, 2)
    names = integer_names("keyframe_attention")
    monkeypatch.setattr(keyframe_attention, "keyframe_attention_kernel", recorder)
    q, k = torch.zeros(groups * frames, tokens, 48), torch.zeros(groups, keys, 48)
    keyframe_attention.launch(q, k, k, 3, config=tile)
    launch = launch_parameters("keyframe_attention", q.shape, k.shape, 3, tile, ceil_div)
    assert launch.grid == recorder.grid
    assert list(launch.integers) == names and list(launch.integers.values()) == recorder.integers
    assert recorder.order == ["tensor"] * 3 + ["integer"] * len(names) + ["tensor"]  # as TensorRT passes them


@pytest.mark.parametrize(("groups", "queries", "keys", "tokens"), [(1, 1, 1, 1), (2, 5, 9, 31), (1, 16, 16, 64)])
def test_temporal_attention(monkeypatch: pytest.MonkeyPatch, groups: int, queries: int, keys: int, tokens: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from posecrafter_rt.kernels import temporal_attention
    from posecrafter_rt.kernels.configs import TemporalConfig
    from posecrafter_rt.kernels.plugins import integer_names

    recorder, tile = Recorder(), TemporalConfig(2, 8, 16, 4, 1)
    names = integer_names("temporal_attention")
    monkeypatch.setattr(temporal_attention, "temporal_attention_kernel", recorder)
    q, k = torch.zeros(groups, queries, tokens, 48), torch.zeros(groups, keys, tokens, 48)
    temporal_attention.launch(q, k, k, 3, None, config=tile)
    launch = launch_parameters("temporal_attention", q.shape, k.shape, 3, tile, ceil_div)
    assert launch.grid == recorder.grid
    assert list(launch.integers) == names and list(launch.integers.values()) == recorder.integers
    assert recorder.order == ["tensor"] * 3 + ["integer"] * len(names) + ["tensor"]


def test_every_node_of_ours_has_a_plugin_but_a_streams() -> None:
    """TensorRT writes out what has none by its function's body."""
    names = {proto.name for proto in function_protos()}
    assert DOMAIN == "posecrafter" and names - {"MaskedTemporalAttention"} == set(PLUGIN_OPS)


def test_strides_must_fit_32_bits() -> None:
    check_size("temporal_attention", (2, 1600, 4096, 320))
    check_size("keyframe_attention", (64, 4096, 320))
    with pytest.raises(ValueError, match="fewer frames"):
        check_size("temporal_attention", (1, 1700, 4096, 320))


def test_the_temporal_tile_follows_the_usual_number_of_frames() -> None:
    assert typical_frames("temporal_attention", (2, 16, 4096, 320)) == 16
    assert typical_frames("keyframe_attention", (16, 4096, 320)) == 1

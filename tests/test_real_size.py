"""Stable Diffusion 1.5's real size, with random weights: it fits in memory, renders and is exported.

Slow; about 12 GB of disk.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.processes import in_own_process
from bench.untrained import untrained_checkpoint, write_random_base
from tests.real_size import prepare_for_tensorrt, prove_export
from tests.tiny import NETWORKS

pytestmark = pytest.mark.slow
SIZE, MEMORY_LIMIT_BYTES = (256, 256), 12e9
# In a process of its own each, so that the peak is that of the step and of nothing before it.
BUILD = """
import sys
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.machine import peak_rss_bytes
build_engine(sys.argv[1], sys.argv[2], BuildOptions("torch", "auto"))
print(peak_rss_bytes())
"""
RENDER = """
import sys
import numpy as np
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.poses.keypoints import PoseSequence
with Avatar.load(sys.argv[2]) as avatar:
    target = PoseSequence(avatar.poses.keypoints[1:3] + np.float32([3, 2, 0]), avatar.size)
    np.save(sys.argv[3], avatar.render(target, num_inference_steps=2))
print(peak_rss_bytes())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of Stable Diffusion 1.5's configuration."""
    return write_random_base(tmp_path_factory.mktemp("real") / "base")


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    """A checkpoint over it, with temporal layers that do something."""
    path = base.with_name("tuned.ckpt")
    untrained_checkpoint(str(base), SIZE, num_frames=3).save(path)
    return path


def peak_of(script: str, *arguments: Path) -> int:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_two_frames_render_within_twelve_gigabytes(
    checkpoint: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    engine, output = checkpoint.with_suffix(".engine"), checkpoint.with_name("frames.npy")
    build_peak = peak_of(BUILD, checkpoint, engine)
    render_peak = peak_of(RENDER, checkpoint, engine, output)
    frames = np.load(output)
    assert frames.shape == (2, *SIZE, 3) and frames.dtype == np.uint8
    assert frames.std() > 1 and not np.array_equal(frames[0], frames[1])
    record_testsuite_property("peak bytes of two frames", {"build": build_peak, "render": render_peak})
    assert max(build_peak, render_peak) <= MEMORY_LIMIT_BYTES


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_exported_and_proved(
    base: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None], name: str
) -> None:
    """As ONNX, a U-Net's weights in a file beside it; in a process of its own, so that its memory is given back."""
    result = in_own_process(prove_export, base, name, SIZE, tmp_path)
    record_testsuite_property(f"export of {name}", result)
    assert "error" not in result, result["error"]
    # They have 3.4 GB, a ControlNet 1.4.
    assert (tmp_path / f"{name}.onnx.data").exists() == (name in ("unet", "unet_stream"))
    assert result["peak_bytes"] <= MEMORY_LIMIT_BYTES


@pytest.mark.parametrize("name", ["controlnet", "unet"])
def test_every_attention_of_a_denoiser_becomes_a_plugin(
    base: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None], name: str
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = in_own_process(prepare_for_tensorrt, base, name, SIZE, tmp_path)
    record_testsuite_property(f"{name} for TensorRT", result)
    assert "error" not in result, result["error"]
    # A block has its self-attention and the prompt's, and in the U-Net, but for the middle one, that over frames.
    assert result["plugins"] == result["attentions"] == {"controlnet": 7 * 2, "unet": 16 * 2 + 15}[name]
    assert (tmp_path / f"{name}.onnx.data").exists() == (name == "unet")  # 1.7 GB in 16 bits, the other 0.7
    assert result["peak_bytes"] <= MEMORY_LIMIT_BYTES

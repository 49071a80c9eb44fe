"""Stable Diffusion 1.5's real size, with random weights: it fits in memory and renders. Slow; about 6 GB of disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import posecrafter_rt.models
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.poses.keypoints import PoseSequence

pytestmark = pytest.mark.slow
CONFIGS = Path(posecrafter_rt.models.__file__).parent / "sd15"
SIZE, MEMORY_LIMIT_BYTES = (256, 256), 12e9
# In a process of its own each, so that the peak is that of the step and of nothing before it.
BUILD = """
import sys
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.machine import peak_rss_bytes
build_engine(sys.argv[1], sys.argv[2], BuildOptions("torch", "bf16"))
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


def write_component(folder: Path, model: nn.Module, file_name: str) -> None:
    """Give every tensor of a model on the meta device random values, of a size that keeps activations finite."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            values = torch.ones(tensor.shape) if name.endswith("weight") else torch.zeros(tensor.shape)
        else:
            values = torch.randn(tensor.shape, generator=generator) * 0.02
        tensors[name] = values.half() if tensor.is_floating_point() else torch.arange(tensor.numel()).view(tensor.shape)
    save_file(tensors, folder / file_name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint over a random base of Stable Diffusion 1.5's configuration, with temporal layers that do something."""
    folder = tmp_path_factory.mktemp("real")
    base = folder / "base"
    shutil.copytree(CONFIGS, base)
    with torch.device("meta"):
        models = {name: kind.from_config(json.loads((base / name / "config.json").read_text()))
                  for name, kind in (("unet", UNet2DConditionModel), ("controlnet", ControlNetModel), ("vae", AutoencoderKL))}  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder"))
    for name, model in models.items():
        write_component(base / name, model, "diffusion_pytorch_model.safetensors")
    write_component(base / "text_encoder", text_encoder, "model.safetensors")
    model = load_base(str(base), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(parameter.shape, generator=generator) * 0.01
               for name, parameter in named_parameters(model) if ".conv_temp." in name}  # fmt: skip
    random = np.random.default_rng(0)
    keypoints = np.concatenate([random.uniform(20, 236, (1, 134, 2)) + random.normal(0, 3, (3, 134, 2)),
                                np.ones((3, 134, 1))], -1).astype(np.float32)  # fmt: skip
    path = folder / "tuned.ckpt"
    metadata = {
        **model.identity(),
        "prompt": "a person",
        "size": list(SIZE),
        "norm_scope": "frame",
        "seed": 0,
        "steps": 0,
    }
    Checkpoint(tensors, random.integers(0, 256, (3, *SIZE, 3), np.uint8), PoseSequence(keypoints, SIZE), metadata).save(path)  # fmt: skip
    return path


def peak_of(script: str, *arguments: Path) -> int:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_two_frames_render_within_twelve_gigabytes(
    checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    engine, output = checkpoint.with_suffix(".engine"), checkpoint.with_name("frames.npy")
    build_peak = peak_of(BUILD, checkpoint, engine)
    render_peak = peak_of(RENDER, checkpoint, engine, output)
    frames = np.load(output)
    assert frames.shape == (2, *SIZE, 3) and frames.dtype == np.uint8
    assert frames.std() > 1 and not np.array_equal(frames[0], frames[1])
    record_property("peak_bytes", {"build": build_peak, "render": render_peak})
    assert max(build_peak, render_peak) <= MEMORY_LIMIT_BYTES

"""What the long benchmarks share: a stage clock, a render's job as plain data, and a process of its own for each run.

Bench: imported by plain.py and throughput.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.models.small_decoder import describe_config, new_small_decoder
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence


def wait_for_gpu() -> None:
    """Return when the GPU has done all that it was asked for; at once where none is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Stages:
    """Wall seconds by stage, in the order of their first use; waits for a GPU before it reads the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait_for_gpu()
        start = time.perf_counter()
        yield
        wait_for_gpu()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `function` in a fresh process, so that its peak memory is its own; a run that dies is reported, not fatal.

    Returns: what it returned, or {"error": one line}.
    """
    # A process that CUDA's own library was asked for devices in cannot fork ones that use it; the driver's monitor can.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context: Any = multiprocessing.get_context("forkserver")  # forks from one that has imported, but computed nothing
    context.set_forkserver_preload(["bench.contenders"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_attempt, function, *arguments).result()
        except BrokenProcessPool:
            return {"error": "the process died, most likely for lack of memory"}


def _attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Turn what is raised into a line here: many a compiler's exception cannot be sent to another process."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def forget_inversions(avatar: Avatar) -> None:
    """Empty an engine's inversion cache: the next render inverts its reference anew."""
    for file in avatar.folder.inversions.glob("*"):
        file.unlink()


def moving_person(num_frames: int, size: tuple[int, int], phase: float = 0.0) -> PoseSequence:
    """A whole body that sways, turns its head and waves: smooth, deterministic, every keypoint seen.

    Args: size: (height, width) in pixels. phase: where in the movement it begins, in radians.
    """
    rng = np.random.default_rng(0)
    height, width = size
    centres = np.concatenate([
        np.tile([0.5, 0.55], (24, 1)), np.tile([0.5, 0.25], (68, 1)), np.tile([0.3, 0.6], (21, 1)),
        np.tile([0.7, 0.6], (21, 1))])  # fmt: skip
    spread = np.concatenate([np.full(24, 0.25), np.full(68, 0.08), np.full(42, 0.05)])
    rest = centres + rng.uniform(-1, 1, (NUM_KEYPOINTS, 2)) * spread[:, None]
    time_s = phase + np.arange(num_frames)[:, None] / 25
    sway = np.stack([0.03 * np.sin(2 * time_s), 0.01 * np.cos(3 * time_s)], -1)
    wave = 1 + 0.1 * np.sin(4 * time_s)[..., None]
    points = centres + (rest - centres) * wave + sway
    keypoints = np.concatenate([points * (width, height), np.ones((num_frames, NUM_KEYPOINTS, 1))], -1)
    return PoseSequence(keypoints.astype(np.float32), size, 25.0)


def untrained_checkpoint(base: str, size: tuple[int, int] | None = None, num_frames: int = 8) -> Checkpoint:
    """A checkpoint whose temporal attention acts although nothing was tuned, with a small decoder: costs what a tuned one costs.

    Args: base: as `load_base` takes it. size: (height, width); None: the base's own.
    """
    model = load_base(base, dtype=torch.float16)  # of whose weights nothing is kept but names and shapes
    size = size or model.settings.size
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[-1] ** 0.5
               for name, parameter in named_parameters(model) if name.endswith("conv_temp.weight")}  # fmt: skip
    arch = model.architecture()
    small = new_small_decoder(arch.latent_channels, arch.vae_scale_factor, generator)
    tensors |= {f"small_decoder.{name}": parameter.detach() for name, parameter in small.named_parameters()}
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, *(side // 8 for side in size), 3), np.uint8)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2)  # patches: pure noise is no picture to a VAE
    metadata = {**model.identity(), "prompt": model.settings.prompt, "size": list(size),
                "norm_scope": model.unet.norm_scope, "seed": 0, "steps": 0,
                "small_decoder": describe_config(small)}  # fmt: skip
    return Checkpoint(tensors, frames, moving_person(num_frames, size), metadata)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 clips in dB; infinity where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def shapes_only(configs: Path) -> dict[str, Any]:
    """The four networks of a base on the meta device, from the config.json of each in its folder of `configs`."""
    classes = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        networks = {name: cls.from_config(json.loads((configs / name / "config.json").read_text()))
                    for name, cls in classes.items()}  # fmt: skip
        return {**networks, "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))}


def write_random_base(folder: Path) -> Path:
    """A base of Stable Diffusion 1.5's configuration and random weights in fp16, 3 GB: it costs what the real one costs.

    Returns: the folder. One that is complete already is kept.
    """
    if (folder / "complete").exists():
        return folder
    shutil.copytree(SD15_FOLDER, folder, dirs_exist_ok=True)
    generator = torch.Generator(torch_device()).manual_seed(0)
    for name, model in shapes_only(folder).items():
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(_random(model, generator), folder / name / file)
    (folder / "complete").touch()
    return folder


def _random(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Norms as the identity, small weights: activations stay finite, also in 16 bits. Drawn where the generator is."""
    tensors = {}
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            tensors[name] = torch.full(tensor.shape, float("norm" in name and name.endswith("weight"))).half()
        else:
            drawn = torch.randn(tensor.shape, generator=generator, device=generator.device)
            tensors[name] = drawn.mul_(0.02).half().cpu()
    return tensors

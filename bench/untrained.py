"""Untrained bases and checkpoints, for when the real ones are not available: they cost the same.

Bench: imported by everything that measures without --checkpoint, and by tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from bench.runs import moving_person
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.models.small_decoder import describe_config, new_small_decoder
from posecrafter_rt.models.sources import SD15_FOLDER


def untrained_checkpoint(base: str, size: tuple[int, int] | None = None, num_frames: int = 8) -> Checkpoint:
    """Make a checkpoint with active temporal attention and a small decoder. It costs what a tuned one costs.

    Temporal attention begins as a copy of the key-frame attention, and an engine could use that one's products for
    both. So its rows are in another order here.

    Args: base: as `load_base` takes it. size: (height, width); None: the base's own.
    """
    model = load_base(base, dtype=torch.float16)
    size = size or model.settings.size
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[-1] ** 0.5
               for name, parameter in named_parameters(model) if name.endswith("conv_temp.weight")}  # fmt: skip
    tensors |= {name: parameter.detach().float().flip(0) for name, parameter in named_parameters(model)
                if ".attn_temp.to_" in name and name.endswith("weight")}  # fmt: skip
    arch = model.architecture()
    small = new_small_decoder(arch.latent_channels, arch.vae_scale_factor, generator)
    tensors |= {f"small_decoder.{name}": parameter.detach() for name, parameter in small.named_parameters()}
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, *(side // 8 for side in size), 3), np.uint8)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2)  # patches, because pure noise is no picture to a VAE
    metadata = {**model.identity(), "prompt": model.settings.prompt, "size": list(size),
                "norm_scope": model.unet.norm_scope, "seed": 0, "steps": 0,
                "small_decoder": describe_config(small)}  # fmt: skip
    return Checkpoint(tensors, frames, moving_person(num_frames, size), metadata)


def shapes_only(configs: Path) -> dict[str, Any]:
    """Return the four networks of a base on the meta device, from each one's config.json in a folder of `configs`."""
    classes = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        networks = {name: cls.from_config(json.loads((configs / name / "config.json").read_text()))
                    for name, cls in classes.items()}  # fmt: skip
        return {**networks, "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))}


def write_random_base(folder: Path) -> Path:
    """Write a base of Stable Diffusion 1.5's configuration with random fp16 weights (3 GB). It costs the same.

    Returns: the folder. A folder that is complete already is kept.
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
    """Draw small weights where the generator is, with norms as identity: activations stay finite, also in 16 bits."""
    tensors = {}
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            tensors[name] = torch.full(tensor.shape, float("norm" in name and name.endswith("weight"))).half()
        else:
            drawn = torch.randn(tensor.shape, generator=generator, device=generator.device)
            tensors[name] = drawn.mul_(0.02).half().cpu()
    return tensors

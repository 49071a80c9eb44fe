"""Where engines of torch's own run: on the current NVIDIA GPU where torch finds one, else on the processor.

Layer 4.
"""

from __future__ import annotations

import torch

from posecrafter_rt.machine import cpu_device


def torch_device() -> torch.device:
    """The current CUDA device, by its index, or the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gpu_name() -> str:
    """The current GPU with its compute capability, as in "NVIDIA GeForce RTX 3090 (8.6)"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def describe_device() -> dict[str, str]:
    """The device of `torch_device` as an engine's manifest has it."""
    return {"type": "cuda", "name": gpu_name()} if torch.cuda.is_available() else cpu_device()

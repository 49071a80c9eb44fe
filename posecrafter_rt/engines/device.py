"""Where engines of torch's own run: on the current NVIDIA GPU where torch finds one, else on the processor.

Layer 4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from posecrafter_rt.machine import cpu_device, cpu_gains_by_bf16

DRIVER = "cuda_driver"


def torch_device() -> torch.device:
    """The current CUDA device, by its index, or the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def multiplies(precision: str, device: torch.device) -> bool:
    """Whether torch multiplies `fp32`, `bf16` or `fp16` on a device at the device's own speed, and not half or a tenth of it.

    A processor gains by bf16 or does not; its fp16 is one that hardly any has, and that overflows.
    """
    return precision == "fp32" or device.type == "cuda" or (precision == "bf16" and cpu_gains_by_bf16())


def gpu_name() -> str:
    """The current GPU with its compute capability, as in "NVIDIA GeForce RTX 3090 (8.6)"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def cuda_driver() -> str:
    """The newest CUDA that the NVIDIA driver can run, as in "13.0". Raises: OSError where there is no driver."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))  # needs no context, and makes none
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def describe_device() -> dict[str, str]:
    """The device of `torch_device` as an engine's manifest has it."""
    return {"type": "cuda", "name": gpu_name()} if torch.cuda.is_available() else cpu_device()


def describe_compiled_device() -> dict[str, str]:
    """The same for an engine that holds code compiled for the device: a GPU with the CUDA that its driver can run."""
    device = describe_device()
    return {**device, DRIVER: cuda_driver()} if device["type"] == "cuda" else device


def is_driver_older(built: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether what was compiled on one device may ask more of the driver than another device's can do.

    A newer driver runs what was compiled under an older one; the other way round NVIDIA promises it for a part only.
    """
    return _number(here.get(DRIVER)) < _number(built.get(DRIVER))


def _number(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split("."))

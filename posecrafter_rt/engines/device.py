"""The device that torch's engines run on: the current NVIDIA GPU if torch finds one, else the processor.

Layer 4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from posecrafter_rt.machine import cpu_device, cpu_gains_by_bf16

DRIVER = "cuda_driver"


def torch_device() -> torch.device:
    """Return the current CUDA device, with its index, or the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def multiplies(precision: str, device: torch.device) -> bool:
    """Whether torch multiplies `fp32`, `bf16` or `fp16` at the device's full speed, not at half or a tenth of it.

    Only some processors gain by bf16. Hardly any have fp16, and it overflows.
    """
    return precision == "fp32" or device.type == "cuda" or (precision == "bf16" and cpu_gains_by_bf16())


def gpu_name() -> str:
    """Return the current GPU with its compute capability, as in "NVIDIA GeForce RTX 3090 (8.6)"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def cuda_driver() -> str:
    """Return the newest CUDA that the NVIDIA driver can run, as in "13.0". Raises: OSError if there is no driver."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))  # needs no context, and makes none
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def describe_device() -> dict[str, str]:
    """Return the device of `torch_device` as an engine's manifest records it."""
    return {"type": "cuda", "name": gpu_name()} if torch.cuda.is_available() else cpu_device()


def describe_compiled_device() -> dict[str, str]:
    """Return the same for an engine with code compiled for the device: a GPU with the CUDA that its driver can run."""
    device = describe_device()
    return {**device, DRIVER: cuda_driver()} if device["type"] == "cuda" else device


def is_driver_older(built: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether code compiled on one device may need more of the driver than the driver here can do.

    A newer driver runs what was compiled under an older one. NVIDIA promises the reverse only in part.
    """
    return _number(here.get(DRIVER)) < _number(built.get(DRIVER))


def _number(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split("."))

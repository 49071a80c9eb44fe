"""Backends: each says why it cannot run; only `auto` may pick, and it says what it took and why.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from posecrafter_rt.engines.base import Backend, Engine, Precision
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.machine import cpu_gains_by_bf16

# In the order that `auto` tries them. Each answers cheaply where its library is not installed. `torch` runs everywhere,
# so what comes after it is taken by name alone: `inductor` compiles C++ for minutes.
_BACKENDS = {
    "tensorrt": "TensorRTBackend",
    "openvino": "OpenVinoBackend",
    "torch": "TorchBackend",
    "inductor": "InductorBackend",
}
LAST_RESORT = "torch"
ON_CPU = ("openvino",)  # the processor even where there is a GPU
# Their folders can be loaded in fp32 whatever they were built in; the others hold code for one type.
LOADED_WIDER = ("torch", "openvino")
# Those that hold code for so many frames at once, unless told otherwise, at up to 512 × 512; the others take any number.
MAX_FRAMES = {"tensorrt": 64}
# Whose decoders write to no memory that their other networks use, so that a segment can be sampled while the one before is
# decoded. On a processor both would only want the same cores.
SAMPLED_AHEAD = ("tensorrt",)
# Those that can be told how much of a block to do at once (`tokens_at_once`); the others hold code for all.
IN_PARTS = ("torch",)
# Which on a processor divide sums among torch's threads: another number of those rounds otherwise.
ROUNDED_BY_THREADS = ("torch", "inductor")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
# Precisions that one backend alone has: it is the one that `auto` tries.
ONLY_OF = {"int8": "openvino"}

__all__ = [
    "IN_PARTS",
    "LAST_RESORT",
    "LOADED_WIDER",
    "MAX_FRAMES",
    "ONLY_OF",
    "PRECISIONS",
    "ROUNDED_BY_THREADS",
    "SAMPLED_AHEAD",
    "Backend",
    "Engine",
    "Precision",
    "choose_backend",
    "choose_precision",
    "get_backend",
    "names",
    "usual_max_frames",
]


def names() -> list[str]:
    """Every backend's name, the preferred first."""
    return list(_BACKENDS)


def get_backend(name: str, **settings: Any) -> Backend:
    """A backend by name, whether it can run here or not. settings: its own, by the names that its class gives them.

    Raises: BackendUnavailable for a name there is not.
    """
    if name not in _BACKENDS:
        raise BackendUnavailable(f"there is no backend {name!r}", f"choose auto, {', '.join(_BACKENDS)}")
    backend: Backend = getattr(import_module(f"posecrafter_rt.engines.{name}"), _BACKENDS[name])(**settings)
    return backend


def usual_max_frames(backend: str, size: tuple[int, int]) -> int | None:
    """The most frames at once that an engine of this size is built for unless told; None: any number.

    Beyond 512 × 512 pixels they are fewer: no tensor then has more elements than 31 bits can count, with guidance, too.
    """
    if backend not in MAX_FRAMES:
        return None
    height, width = size
    return max(2, min(MAX_FRAMES[backend], MAX_FRAMES[backend] * 512 * 512 // (height * width)))


def choose_precision(precision: str, backend: str = "auto") -> Precision:
    """`auto`: fp16 on a GPU; on a processor bf16 where it gains by that, else fp32; never int8. backend: auto or a name."""
    if precision == "auto":
        if torch_device().type == "cuda" and backend not in ON_CPU:
            return "fp16"
        return "bf16" if cpu_gains_by_bf16() else "fp32"
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"there is no precision {precision!r}", f"choose auto, {', '.join(PRECISIONS)}")
    return precision  # type: ignore[return-value]


def _candidates(precision: Precision) -> list[str]:
    """Backends in the order that `auto` tries them: on a GPU those that use it first."""
    if precision in ONLY_OF:
        return [ONLY_OF[precision]]
    on_gpu = torch_device().type == "cuda"
    return sorted(names(), key=lambda name: on_gpu and name in ON_CPU)


def choose_backend(name: str, precision: Precision, failed: Mapping[str, str] = {}) -> tuple[Backend, str]:
    """The backend to use and why. failed: why `auto` is to pass over others, by name.

    Raises: BackendUnavailable when an explicitly named one cannot run here; the message says why.
    """
    refused: list[str] = []
    for candidate in _candidates(precision) if name == "auto" else [name]:
        backend = get_backend(candidate)
        reason = failed.get(candidate) or backend.unsupported_reason(precision)
        if reason is None:
            first = f"the only one that has {precision}" if precision in ONLY_OF else "the first choice here"
            return backend, "as asked" if name != "auto" else "; ".join(refused) or first
        refused.append(f"{candidate}: {reason}")
    raise BackendUnavailable(f"backend {refused[0]}", "posecrafter-rt doctor says what can run here")

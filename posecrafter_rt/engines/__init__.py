"""The backends and the choice between them: each says why it cannot run; only `auto` picks one, and says why.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from posecrafter_rt.engines.base import Backend, Engine, Precision
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.errors import BackendUnavailable

# The order in which `auto` tries them. Each answers cheaply if its library is not installed. `torch` runs everywhere,
# so what follows it is used only if it is named: `inductor` compiles C++ for minutes.
_BACKENDS = {
    "tensorrt": "TensorRTBackend",
    "openvino": "OpenVinoBackend",
    "torch": "TorchBackend",
    "inductor": "InductorBackend",
}
LAST_RESORT = "torch"
ON_CPU = ("openvino",)  # they run on the processor even if there is a GPU
# Their engines can be loaded in fp32, whatever precision they were built in; the others hold code for one type.
LOADED_WIDER = ("torch", "openvino")
# Those with a limit on frames at once, and its default for up to 512 × 512 pixels; the others take any number.
MAX_FRAMES = {"tensorrt": 64}
# Their decoders write to no memory that their other networks use, so a segment can be sampled while the one before is
# decoded. On a processor both would only compete for the same cores.
SAMPLED_AHEAD = ("tensorrt",)
# Those that can compute a block in parts (`tokens_at_once`); the others hold code for all tokens at once.
IN_PARTS = ("torch",)
# On a processor these divide sums among torch's threads, so the number of threads changes how results are rounded.
ROUNDED_BY_THREADS = ("torch", "inductor")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
# Precisions that only one backend has; `auto` tries only that one.
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
    """Return every backend's name, the preferred one first."""
    return list(_BACKENDS)


def get_backend(name: str, **settings: Any) -> Backend:
    """Return a backend by name, whether or not it can run here. settings: keyword arguments of its class.

    Raises: BackendUnavailable if there is no backend of this name.
    """
    if name not in _BACKENDS:
        raise BackendUnavailable(f"there is no backend {name!r}", f"choose auto, {', '.join(_BACKENDS)}")
    backend: Backend = getattr(import_module(f"posecrafter_rt.engines.{name}"), _BACKENDS[name])(**settings)
    return backend


def usual_max_frames(backend: str, size: tuple[int, int]) -> int | None:
    """Return the default for the most frames at once that an engine of this size is built for; None: any number.

    Above 512 × 512 pixels it is lower, so that 31 bits can count the elements of every tensor, even with guidance.
    """
    if backend not in MAX_FRAMES:
        return None
    height, width = size
    return max(2, min(MAX_FRAMES[backend], MAX_FRAMES[backend] * 512 * 512 // (height * width)))


def choose_precision(precision: str, backend: str = "auto") -> Precision:
    """Return the precision. `auto` is fp16 on a GPU, and for `openvino` on a processor that gains by it; else fp32.

    Args: backend: `auto` or a name. Where the operations of `openvino` decide, they are compiled, which takes seconds.
    Raises: BackendUnavailable for an unknown precision.
    """
    if precision == "auto":
        if torch_device().type == "cuda" and backend not in ON_CPU:
            return "fp16"
        return "fp16" if backend in ("auto", *ON_CPU) and _gains_by_fp16() else "fp32"
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"there is no precision {precision!r}", f"choose auto, {', '.join(PRECISIONS)}")
    return precision  # type: ignore[return-value]


def _gains_by_fp16() -> bool:
    """Return whether `openvino` is faster in fp16 than in float32 here, at all sizes measured: with AMX.

    bf16 is about as fast, but at Stable Diffusion 1.5's size its frames are 29 dB from float32's and fp16's 57. Without a
    compiler that knows AMX, fp16 cannot run or gains little.
    """
    from posecrafter_rt.engines.openvino_operations import has_tiles

    return has_tiles() and get_backend("openvino").unsupported_reason("fp16") is None


def _candidates(precision: Precision) -> list[str]:
    """Return backends in the order in which `auto` tries them; if there is a GPU, those that use it come first."""
    if precision in ONLY_OF:
        return [ONLY_OF[precision]]
    on_gpu = torch_device().type == "cuda"
    return sorted(names(), key=lambda name: on_gpu and name in ON_CPU)


def choose_backend(name: str, precision: Precision, failed: Mapping[str, str] = {}) -> tuple[Backend, str]:
    """Return the backend to use, and why. failed: by name, why `auto` must pass over a backend.

    Raises: BackendUnavailable if a named backend, or every backend for `auto`, cannot run here; the message says why.
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

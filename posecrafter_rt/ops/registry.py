"""Which backends each operator has, and why one cannot run here.

Layer 2: declares constraints beside names; `doctor` lists them, the public operators choose by them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.ops import native, xformers

logger = logging.getLogger(__name__)

MAX_NATIVE_REGIONS = 1024
MIN_CAPABILITY = (8, 0)

Reason = Callable[..., str | None]


def _reference(*tensors: Tensor, **sizes: int) -> str | None:
    return None


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether autograd will need a gradient with respect to one of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _native(*tensors: Tensor, regions: int = 0) -> str | None:
    if native.missing_reason() is not None:
        return native.missing_reason()
    if regions > MAX_NATIVE_REGIONS:
        return f"{regions} regions; at most {MAX_NATIVE_REGIONS}"
    if not tensors:
        return None
    device = tensors[0].device.type
    if device not in ("cpu", "cuda"):
        return f"no path for device {device}"
    if device == "cuda" and native.cuda_missing_reason() is not None:
        return native.cuda_missing_reason()
    return "has no gradient" if needs_grad(*tensors) else None


@cache
def _missing(package: str) -> str | None:
    """Return why nothing of a package for GPUs can run on this machine, or None."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    return None if torch.cuda.is_available() else "no CUDA device"


def _triton_tensors(*tensors: Tensor) -> str | None:
    """Return why no Triton kernel can take these tensors, or None. The first three must have one dtype."""
    if _missing("triton") is not None or not tensors:
        return _missing("triton")
    first = tensors[0]
    if any(tensor.device.type != "cuda" for tensor in tensors):
        return f"needs CUDA tensors, got {first.device.type}"
    if torch.cuda.get_device_capability(first.device) < MIN_CAPABILITY:
        return "needs compute capability 8.0 or newer"
    if any(tensor.dtype != first.dtype for tensor in tensors[:3]) or first.dtype not in native.DTYPES:
        return f"dtypes {', '.join(str(tensor.dtype) for tensor in tensors[:3])}; one of fp32, fp16, bf16 for all"
    return None


def _triton_group_norm(*tensors: Tensor) -> str | None:
    reason = _triton_tensors(*tensors)
    if reason is not None or not tensors:
        return reason
    if not tensors[0].is_contiguous(memory_format=torch.channels_last):
        return "x must be dense in channels_last"
    if not all(tensor.is_contiguous() for tensor in tensors[1:]):
        return "weight and bias must be contiguous"
    if torch.compiler.is_compiling():
        return "is left to the compiler, which fuses the plain operations"
    return "has no gradient" if needs_grad(*tensors) else None


def _triton(op: str, *tensors: Tensor, heads: int = 0) -> str | None:
    reason = _triton_tensors(*tensors)
    if reason is not None or not tensors:
        return reason
    q = tensors[0]
    if q.shape[-1] // heads % 8:
        return f"head size {q.shape[-1] // heads}; must be a multiple of 8"
    from posecrafter_rt.kernels import configs

    frames = max(tensor.shape[1] for tensor in tensors[:2])
    capability = torch.cuda.get_device_capability(q.device)
    reason = configs.missing_reason(op, capability, q.dtype, q.shape[-1] // heads, frames)
    if reason is not None:
        return reason
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return "channels must be contiguous"
    return "has no gradient" if needs_grad(*tensors) else None


def _xformers(*tensors: Tensor, heads: int = 0) -> str | None:
    if _missing("xformers") is not None or not tensors:
        return _missing("xformers")
    q = tensors[0]
    if any(tensor.device.type != "cuda" for tensor in tensors):
        return f"needs CUDA tensors, got {q.device.type}"
    if any(tensor.dtype != q.dtype for tensor in tensors) or q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtypes {', '.join(str(tensor.dtype) for tensor in tensors)}; fp16 or bf16 for all"
    head_size = q.shape[-1] // heads
    if head_size % 8:
        return f"head size {head_size}; must be a multiple of 8"
    if not needs_grad(*tensors):
        return "is for gradients, and none is needed"
    return xformers.failure(q.device, q.dtype, head_size)


BACKENDS: dict[str, dict[str, Reason]] = {  # in order of preference
    "affine_warp_paste": {"native": _native, "reference": _reference},
    "group_norm": {"triton": _triton_group_norm, "reference": _reference},
    "keyframe_attention": {
        "triton": partial(_triton, "keyframe_attention"),
        "xformers": _xformers,
        "reference": _reference,
    },
    "temporal_attention": {"triton": partial(_triton, "temporal_attention"), "reference": _reference},
}


def unsupported_reason(op: str, backend: str, *tensors: Tensor, **sizes: int) -> str | None:
    """Return why `backend` cannot run operator `op`, or None if it can.

    Args:
        op, backend: a name of BACKENDS and one of its entries.
        tensors: the operator's tensors; without them only the machine and the build are checked.
        sizes: numbers that the tensors do not show: `heads` for the attentions, `regions` for affine_warp_paste.
    Raises: BackendUnavailable for an unknown name.
    """
    if backend not in BACKENDS.get(op, {}):
        known = ", ".join(f"{name}: {'/'.join(backends)}" for name, backends in BACKENDS.items())
        raise BackendUnavailable(f"no backend {backend!r} of operator {op!r}", f"known are {known}")
    return BACKENDS[op][backend](*tensors, **sizes)


def choose_backend(op: str, backend: str | None, *tensors: Tensor, **sizes: int) -> str:
    """Return the backend to run: the named one, or for None the first that can run.

    Raises: BackendUnavailable if a named backend cannot run these tensors (message says why).
    """
    if backend is not None:
        reason = unsupported_reason(op, backend, *tensors, **sizes)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {backend!r} cannot run: {reason}", "pass backend=None to choose")
        return backend
    for name in BACKENDS[op]:
        reason = unsupported_reason(op, name, *tensors, **sizes)
        if reason is None:
            return name
        _log_refusal(op, name, reason)
    raise BackendUnavailable(f"{op}: no backend can run")  # never: the reference refuses nothing


@cache
def _log_refusal(op: str, name: str, reason: str) -> None:
    logger.info("%s: backend %s not used: %s", op, name, reason)

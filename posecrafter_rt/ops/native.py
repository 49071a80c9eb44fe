"""The compiled extension, if it is there: `affine_warp_paste` over DLPack.

Layer 2: the only importer of `posecrafter_rt._native`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # documented, but not in its __all__

BYTES_PER_THREAD = 4 << 20  # a thread writes this in about 0.4 ms; waking one for less costs more than it saves
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("posecrafter_rt._native"), None
    except ImportError as error:
        return None, f"the extension posecrafter_rt._native is not built ({error}); install with a C++ compiler present"


def missing_reason() -> str | None:
    """Return why the extension cannot be used at all, or None."""
    return _load()[1]


@cache
def cuda_missing_reason() -> str | None:
    """Return why the extension's CUDA path cannot be used, or None."""
    module, reason = _load()
    if module is None:
        return reason
    error = module.cuda_error()
    return None if error is None else f"the extension's CUDA path: {error}"


def build_info() -> dict[str, Any]:
    """Return what the extension was built with (`cuda`, `openmp`, `cuda_archs`, `compiler`); empty if it is missing."""
    module, _ = _load()
    return {} if module is None else dict(module.build_info())


def paste(source: Tensor, out: Tensor, affines: Tensor, rects: Tensor, mode: str, *, copy: bool) -> None:
    """Write N edited frames as the last N frames of `out`. Frames before them have no edit.

    The extension itself checks shapes, dtypes, devices and memory, as DLPack describes them.
    Args:
        source: (C, h, w), shared by all frames, or (F, C, h, w); contiguous. May be `out` on the CPU, not on CUDA.
        out: (F, C, h, w) contiguous, dtype and device of source, **written**.
        affines, rects: float32 (N, R, 2, 3) and int64 (N, R, 4), contiguous, on the same device.
        copy: write unedited pixels too.
    Raises: ValueError for arrays that do not fit.
    """
    module, reason = _load()
    assert module is not None, reason
    # Capsules, because a tensor would make its own in Python: 6 µs each instead of 0.3.
    capsules = [to_dlpack(tensor) for tensor in (source, out, affines, rects)]
    if out.device.type == "cpu":
        threads = max(1, min(torch.get_num_threads(), out.nbytes // BYTES_PER_THREAD))
        module.affine_warp_paste_cpu(*capsules, mode, copy, threads)
    else:
        module.affine_warp_paste_cuda(*capsules, mode, copy, torch.cuda.current_stream(out.device).cuda_stream)

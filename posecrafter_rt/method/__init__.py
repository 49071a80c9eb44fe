"""The method's mathematics as pure functions of arrays and tensors. Functions of tensors are imported on first use.

Layer 1: imports numpy and the keypoint layout; torch only when a name of `ddim.py`, `dpmpp.py` or `unipc.py` is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from posecrafter_rt.method.affine import fit_affine
from posecrafter_rt.method.editing import REGIONS, EditPlan, SkippedRegion, plan_edits
from posecrafter_rt.method.reference import (
    check_shared_keypoints,
    medoid_reference,
    pose_distances,
    select_reference,
    video_sim,
)
from posecrafter_rt.method.schedule import tuning_steps

if TYPE_CHECKING:
    from posecrafter_rt.method.ddim import DDIMSchedule, ddim_invert, ddim_sample, ddim_step
    from posecrafter_rt.method.dpmpp import DPMSchedule, dpmpp_sample
    from posecrafter_rt.method.unipc import unipc_sample

_NEEDS_TORCH = {
    "ddim": ("DDIMSchedule", "ddim_invert", "ddim_sample", "ddim_step"),
    "dpmpp": ("DPMSchedule", "dpmpp_sample"),
    "unipc": ("unipc_sample",),
}

__all__ = [
    "REGIONS",
    "DDIMSchedule",
    "DPMSchedule",
    "EditPlan",
    "SkippedRegion",
    "check_shared_keypoints",
    "ddim_invert",
    "ddim_sample",
    "ddim_step",
    "dpmpp_sample",
    "fit_affine",
    "medoid_reference",
    "plan_edits",
    "pose_distances",
    "select_reference",
    "tuning_steps",
    "unipc_sample",
    "video_sim",
]


def __getattr__(name: str) -> Any:
    for module, names in _NEEDS_TORCH.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

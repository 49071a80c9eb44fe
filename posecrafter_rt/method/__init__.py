"""The method's mathematics as pure functions of arrays and tensors; those on tensors are resolved on first use.

Layer 1: numpy and the keypoint layout on import; torch only once a name of `ddim.py` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posecrafter_rt.method.affine import fit_affine
from posecrafter_rt.method.editing import REGIONS, EditPlan, SkippedRegion, plan_edits
from posecrafter_rt.method.reference import medoid_reference, pose_distances, select_reference, video_sim
from posecrafter_rt.method.schedule import tuning_steps
from posecrafter_rt.method.sequence import insert_reference

if TYPE_CHECKING:
    from posecrafter_rt.method.ddim import DDIMSchedule, ddim_invert, ddim_sample, ddim_step

_FROM_DDIM = ("DDIMSchedule", "ddim_invert", "ddim_sample", "ddim_step")

__all__ = [
    "REGIONS",
    "DDIMSchedule",
    "EditPlan",
    "SkippedRegion",
    "ddim_invert",
    "ddim_sample",
    "ddim_step",
    "fit_affine",
    "insert_reference",
    "medoid_reference",
    "plan_edits",
    "pose_distances",
    "select_reference",
    "tuning_steps",
    "video_sim",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_DDIM:
        from posecrafter_rt.method import ddim

        return getattr(ddim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

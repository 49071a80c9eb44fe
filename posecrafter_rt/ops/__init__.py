"""The four operators that carry the runtime, each behind one public function.

Layer 2: imported by `models` and `runtime`.
"""

from posecrafter_rt.ops.affine_warp_paste import affine_warp_paste, affine_warp_paste_
from posecrafter_rt.ops.group_norm import group_norm
from posecrafter_rt.ops.keyframe_attention import keyframe_attention
from posecrafter_rt.ops.registry import BACKENDS, unsupported_reason
from posecrafter_rt.ops.temporal_attention import temporal_attention

__all__ = [
    "BACKENDS",
    "affine_warp_paste",
    "affine_warp_paste_",
    "group_norm",
    "keyframe_attention",
    "temporal_attention",
    "unsupported_reason",
]

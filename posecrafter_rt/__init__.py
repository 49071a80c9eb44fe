"""The public names of PoseCrafter's runtime. Each is imported when it is first used.

Top of the package: importing it loads no torch, sets no flag and reads no file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posecrafter_rt import errors as errors
    from posecrafter_rt.avatar import Avatar as Avatar
    from posecrafter_rt.building import build_engine as build_engine
    from posecrafter_rt.errors import PoseCrafterError as PoseCrafterError
    from posecrafter_rt.poses.keypoints import PoseSequence as PoseSequence
    from posecrafter_rt.tuning import tune as tune

__version__ = "0.1.0"

_HOMES = {
    "Avatar": "avatar",
    "PoseCrafterError": "errors",
    "PoseSequence": "poses.keypoints",
    "build_engine": "building",
    "tune": "tuning",
}
__all__ = ["Avatar", "PoseCrafterError", "PoseSequence", "__version__", "build_engine", "errors", "tune"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(f"{__name__}.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next use is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

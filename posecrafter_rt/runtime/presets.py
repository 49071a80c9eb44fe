"""Named bundles of options for renders and streams, and which options make a render an approximation.

Layer 5: plain data. What presets cost and give is measured: for renders by `python -m bench.quality --presets`
(docs/presets.md), for streams by `bench.stream_quality` and `bench.latency` (docs/streaming.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.options import RenderOptions

# The inversion follows the sampler's few wide steps, so each is divided into parts. That is cheap, because it covers
# one frame and is cached, and no sampler brings back what the inversion loses. `balanced` needs an engine with feature
# reuse, which engines have by default.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"num_inference_steps": 25, "unet_every": 3, "inversion_substeps": 3},
    "fast": {"sampler": "dpmpp", "num_inference_steps": 4, "inversion_substeps": 5},
}
# For streams, whose defaults are `balanced`. 2 steps with the full decoder come nearer to the joint render than 4 with
# the small one, so `quality` has 4 steps and the full decoder. No preset keeps features over steps: a pipelined stream
# refuses that, and 4 steps with kept features come no nearer than 2 whole ones and take about as long.
STREAM_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 1},
    "balanced": {},
    "quality": {"steps": 4, "decoder": "full"},
}


def bundle(preset: str, presets: Mapping[str, dict[str, Any]] = PRESETS) -> dict[str, Any]:
    """Return the options of a preset by name. Raises: PoseCrafterError for an unknown preset."""
    if preset not in presets:
        raise PoseCrafterError(f"unknown preset {preset!r}", f"choose one of {', '.join(presets)}")
    return presets[preset]


def preset_options(preset: str, **given: Any) -> RenderOptions:
    """Return the options of a preset; those given override it. Raises: PoseCrafterError for bad options."""
    return RenderOptions(**{**bundle(preset), **given})


def approximations(options: RenderOptions, segment: int | str | None, precision: str) -> dict[str, Any]:
    """Return the options that make a render an approximation of the paper's, with their values; empty if none do.

    Args: options: with nothing left to the base. segment: the most frames that were rendered jointly; None: the whole
        clip, which is exact, whatever was asked for. precision: the engine's. Only int8 counts, because it rounds the
        factors of products; the others are number types.
    """
    is_used = {
        "num_inference_steps": options.num_inference_steps < RenderOptions.num_inference_steps,
        "sampler": options.sampler != RenderOptions.sampler,
        "strength": options.strength != 1,
        "controlnet_every": options.controlnet_every > 1,
        "unet_every": options.unet_every > 1,
        "decoder": options.decoder != "full",
    }
    named = {name: getattr(options, name) for name, used in is_used.items() if used}
    beside = {"segment": (segment, segment is not None), "precision": (precision, precision == "int8")}
    return {**named, **{name: value for name, (value, used) in beside.items() if used}}

"""Named bundles of options of renders and of streams, and what of a render is an approximation.

Layer 5: plain data. What each preset costs and gives is measured: those of a render by `python -m bench.quality --presets`,
see docs/presets.md, those of a stream by `bench.stream_quality` and `bench.latency`, see docs/streaming.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.options import RenderOptions

# The inversion walks the sampler's few and wide steps, in as many parts: it is of one frame, cached, and what is lost there
# no sampler brings back. `balanced` needs an engine with feature reuse, which engines have unless it is declined.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"num_inference_steps": 25, "unet_every": 3, "inversion_substeps": 3},
    "fast": {"sampler": "dpmpp", "num_inference_steps": 4, "inversion_substeps": 5},
}
# Of a stream, whose defaults are `balanced`. To the joint render 2 steps with the full decoder are nearer than 4 with the small
# one, so `quality` takes both. Features kept over steps, which a pipelined stream refuses, are in none: 4 steps with them are
# no nearer than 2 whole ones, and take about as long.
STREAM_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 1},
    "balanced": {},
    "quality": {"steps": 4, "decoder": "full"},
}


def bundle(preset: str, presets: Mapping[str, dict[str, Any]] = PRESETS) -> dict[str, Any]:
    """The options of a preset by name. Raises: PoseCrafterError for a preset that is not there."""
    if preset not in presets:
        raise PoseCrafterError(f"unknown preset {preset!r}", f"choose one of {', '.join(presets)}")
    return presets[preset]


def preset_options(preset: str, **given: Any) -> RenderOptions:
    """The options of a preset, with those that are given in their place. Raises: PoseCrafterError for bad ones."""
    return RenderOptions(**{**bundle(preset), **given})


def approximations(options: RenderOptions, segment: int | str | None, precision: str) -> dict[str, Any]:
    """What a render leaves out of the paper's, as options and their values; empty when nothing.

    Args: options: with nothing left to the base. segment: frames rendered jointly at most; None: all of the clip, which is
        exact, whatever was asked for. precision: the engine's. int8 rounds what products are of; the others are types of
        numbers.
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

"""Building TensorRT plans: optimisation profiles, parser, builder, timing cache.

Layer 4: profiles are pure functions of the spec; the rest needs TensorRT and a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.spec import STREAM_NETWORKS, Architecture, NetworkSpec

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShapeLimits:
    """What an engine is built for; each a (least, usual, most).

    frames: of one group; groups: 2 with guidance; steps: of a schedule; size: (height, width) in pixels, or None for what
    the architecture's smallest to 64 times that allows. stream_frames: of a stream's batch, one or the steps of a
    pipeline; window: frames that it remembers, the reference among them.
    """

    frames: tuple[int, int, int] = (1, 16, 64)
    groups: tuple[int, int, int] = (1, 1, 2)
    steps: tuple[int, int, int] = (1, 30, 1000)
    size: tuple[int, int] | None = None
    stream_frames: tuple[int, int, int] = (1, 1, 8)
    window: tuple[int, int, int] = (1, 3, 31)

    def sizes(self, spec: NetworkSpec, arch: Architecture) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """`resolve_shape`'s sizes of a network at the three points; "frames" counts those of all groups, as `spec` does."""
        unit = arch.size_multiple
        frames = [self.frames[i] * self.groups[i] for i in range(3)]
        if spec.name in STREAM_NETWORKS:
            frames = list(self.stream_frames)
        if self.size is None:
            heights = widths = (unit, 8 * unit, 16 * unit)
        else:
            heights, widths = (self.size[0],) * 3, (self.size[1],) * 3
        least, usual, most = (
            {"frames": frames[i], "groups": self.groups[i], "steps": self.steps[i], "window": self.window[i],
             "height": heights[i], "width": widths[i]}
            for i in range(3)
        )  # fmt: skip
        return least, usual, most


def profile_shapes(spec: NetworkSpec, limits: ShapeLimits, arch: Architecture) -> dict[str, tuple[Shape, Shape, Shape]]:
    """(least, usual, most) shape of every input with a free dimension."""
    points = limits.sizes(spec, arch)
    return {
        tensor.name: tuple(resolve_shape(tensor.dims, sizes) for sizes in points)  # type: ignore[misc]
        for tensor in spec.inputs
        if any(isinstance(dim, str) for dim in tensor.dims)
    }


def make_logger() -> trt.ILogger:
    """TensorRT's messages as this package's log records."""
    import tensorrt as trt

    severities = trt.ILogger.Severity
    levels = {severities.INTERNAL_ERROR: logging.ERROR, severities.ERROR: logging.ERROR,
              severities.WARNING: logging.WARNING, severities.INFO: logging.DEBUG}  # fmt: skip

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in levels:  # not VERBOSE: thousands of lines
                log.log(levels[severity], "TensorRT: %s", message)

    return Logger()


def build_plan(
    path: Path, shapes: Mapping[str, tuple[Shape, Shape, Shape]], timing_cache: bytes, allow_tf32: bool
) -> tuple[bytes, bytes]:
    """Build one network.

    Args: path: its ONNX file, whose types are the network's; shapes: see `profile_shapes`; timing_cache: what an
        earlier build returned, or nothing; allow_tf32: whether float32 products may round their factors to 10 bits.
    Returns: the plan, refittable by the names of the initialisers, and the timing cache for the next build.
    Raises: PoseCrafterError when the network cannot be parsed or built.
    """
    import tensorrt as trt

    logger = make_logger()
    builder: trt.Builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    network: trt.INetworkDefinition = builder.create_network(
        1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    )
    parser: trt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise PoseCrafterError(f"TensorRT cannot parse {path.name}: {errors}", "build with --backend torch")
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT)
    if not allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    cache: trt.ITimingCache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, False)
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PoseCrafterError(f"TensorRT cannot build {path.name}", "run again with --debug; or use --backend torch")
    used: trt.ITimingCache = config.get_timing_cache()
    return bytes(plan), bytes(used.serialize())

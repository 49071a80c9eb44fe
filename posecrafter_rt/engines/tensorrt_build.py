"""Build TensorRT plans: optimisation profiles, parser, builder, timing cache; a build can be watched and interrupted.

Layer 4: profiles are pure functions of the spec; the rest needs TensorRT and a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch

from posecrafter_rt.engines import MAX_FRAMES
from posecrafter_rt.engines.tensorrt_common import DEBUG, failure, make_logger, start, take_errors
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.spec import ONE_FRAME_NETWORKS, STREAM_NETWORKS, Architecture, NetworkSpec

if TYPE_CHECKING:
    import tensorrt as trt

# Each is (least, usual, most). TensorRT chooses kernels for the usual size.
USUAL_FRAMES = 16  # of one group
GROUPS = (1, 1, 2)  # 2 with guidance
STEPS = (1, 30, 1000)  # of a schedule, with the substeps of the inversion
STREAM_FRAMES = (1, 1, 8)  # one, or the steps of a pipelined stream
WINDOW = (1, 3, 31)  # frames that a stream remembers, with the reference

Shape = tuple[int, ...]
Sizes = dict[str, int]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


def profile_sizes(spec: NetworkSpec, arch: Architecture) -> tuple[Sizes, Sizes, Sizes]:
    """Return `resolve_shape`'s (least, usual, most) sizes of a network; "frames" counts all groups', as in `spec`.

    Without a size the architecture gets up to 16 times its smallest one, without a number of frames the default one.
    """
    if spec.name in ONE_FRAME_NETWORKS:
        frames = (1, 1, 1)
    elif spec.name in STREAM_NETWORKS:
        frames = STREAM_FRAMES
    else:
        most = arch.max_frames or MAX_FRAMES["tensorrt"]
        frames = (1, min(USUAL_FRAMES, most) * GROUPS[1], most * GROUPS[2])
    unit = arch.size_multiple
    sides = [arch.size or (units * unit, units * unit) for units in (1, 8, 16)]
    least, usual, most_sizes = (
        {"frames": frames[i], "groups": GROUPS[i], "steps": STEPS[i], "window": WINDOW[i],
         "height": sides[i][0], "width": sides[i][1]}
        for i in range(3)
    )  # fmt: skip
    return least, usual, most_sizes


def profile_shapes(spec: NetworkSpec, arch: Architecture) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return the (least, usual, most) shape of every input with a free dimension."""
    points = profile_sizes(spec, arch)
    return {
        tensor.name: tuple(resolve_shape(tensor.dims, sizes) for sizes in points)  # type: ignore[misc]
        for tensor in spec.inputs
        if any(isinstance(dim, str) for dim in tensor.dims)
    }


def build_plan(
    path: Path, shapes: Mapping[str, tuple[Shape, Shape, Shape]], timings: bytes, allow_tf32: bool,
    tell: Callable[[str], None],
) -> tuple[bytes, bytes]:  # fmt: skip
    """Build one network.

    Args: path: its ONNX file, whose types are the network's; shapes: see `profile_shapes`; timings: what an earlier
        build returned, or empty; allow_tf32: whether float32 products may round their factors to 10 bits; tell: called
        with the name of each phase as it begins; if it raises, the build ends.
    Returns: the plan, refittable by the names of the initialisers, and the timings for the next build, perhaps empty.
    Raises: PoseCrafterError if the network cannot be parsed or built; OutOfMemory, one of these, for want of memory.
    """
    import tensorrt as trt

    logger, name = make_logger(), path.stem
    builder: trt.Builder = start(lambda: trt.Builder(logger))
    network: trt.INetworkDefinition = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)  # and strongly typed, as all are since 11
    )
    parser: trt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise PoseCrafterError(f"TensorRT cannot parse {path.name}: {errors}", "build with --backend torch")
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT)
    # Without it a plan always takes the activation memory of its largest shape.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if not allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    timing_cache = _attach_timings(config, timings)  # it must live until the plan is built
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    for tensor, (least, usual, most) in shapes.items():
        profile.set_shape(tensor, least, usual, most)
    if config.add_optimization_profile(profile) < 0:
        raise failure(f"TensorRT refuses the shapes of {name}, {', '.join(shapes)}")
    phases: SimpleQueue[str | None] = SimpleQueue()
    monitor = make_monitor(phases)
    config.progress_monitor = monitor
    plan = run_watched(lambda: builder.build_serialized_network(network, config), phases, tell, monitor.cancel)
    if plan is None:
        raise failure(f"TensorRT cannot build {name}", f"{DEBUG}, or use --backend torch")
    take_errors()  # forget those of kernels that were tried and not taken
    return bytes(plan), b"" if timing_cache is None else _read_timings(config)


def _attach_timings(config: trt.IBuilderConfig, timings: bytes) -> trt.ITimingCache | None:
    """Give a build what earlier ones measured, or an empty cache if TensorRT refuses that; None if it refuses both."""
    for blob in (timings, b""):
        cache: trt.ITimingCache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    log.warning("TensorRT takes no timing cache: what this build measures is not kept")
    return None


def _read_timings(config: trt.IBuilderConfig) -> bytes:
    cache: trt.ITimingCache = config.get_timing_cache()
    blob = None if cache is None else cache.serialize()
    return b"" if blob is None else bytes(blob)


def make_monitor(phases: SimpleQueue[str | None]) -> trt.IProgressMonitor:
    """Return a monitor that queues the names of a build's outer two levels of phases once; its `cancel` ends the build.

    TensorRT calls it from threads of its own, and swallows what it raises.
    """
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: set[str] = set()
            self.told: set[str] = set()
            self.is_cancelled = False

        def cancel(self) -> None:
            self.is_cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer.add(phase_name)
            if (parent_phase is None or parent_phase in self.outer) and phase_name not in self.told:
                self.told.add(phase_name)
                phases.put(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not self.is_cancelled

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def run_watched(
    work: Callable[[], Result], phases: SimpleQueue[str | None], tell: Callable[[str], None],
    cancel: Callable[[], None],
) -> Result:  # fmt: skip
    """Do `work` in another thread; call `tell` in this one with what it puts into `phases`, so that Ctrl-C is noticed.

    If `tell` or Ctrl-C raises, `cancel` is called, and the exception is passed on once the work has ended.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work_on_the_same_device() -> Result:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own current device
        return work()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work_on_the_same_device)
        running.add_done_callback(lambda done: phases.put(None))
        try:
            for phase in iter(phases.get, None):
                tell(phase)
        except BaseException:
            cancel()
            raise
    return running.result()

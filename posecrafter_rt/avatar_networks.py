"""Load the networks of an engine folder, in its own precision or a wider one, and unload them.

Layer 6: beside `avatar`, because the runtime knows no backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch

from posecrafter_rt import __version__
from posecrafter_rt.engines import IN_PARTS, LOADED_WIDER, ROUNDED_BY_THREADS, Backend, Engine, Precision, get_backend
from posecrafter_rt.engines.base import CACHE_HINT, TORCH_DTYPES
from posecrafter_rt.engines.device import DRIVER, is_driver_older, torch_device
from posecrafter_rt.engines.folder import EngineFolder, in_use
from posecrafter_rt.engines.manifest import rebuild_command, rebuild_hint
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.machine import library_versions
from posecrafter_rt.runtime.memory import (
    COPIES_IN_PARTS,
    USED_SHARE,
    InParts,
    Room,
    explained,
    frame_bytes,
    free_bytes,
    let_go,
)
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.runtime.segments import Adjustment
from posecrafter_rt.spec import FEED_FORWARD_TOKENS, NETWORK_NAMES, SHALLOW_STREAM, STREAM_NETWORKS, Architecture

WIDER: Precision = "fp32"  # what networks run in once their numbers overflow 16 or 8 bits
# The fewest tokens of a block to compute at once: one frame of 64 × 64. Smaller parts would save little, compared to
# the memory of what is not computed in parts.
LEAST_TOKENS = 1 << 12
# Memory that a CPU engine's weights take, relative to its files. OpenVINO reorders them: transformed convolution
# weights are larger, weights in 16 and 8 bits smaller. Measured at Stable Diffusion 1.5's size, for one clip length.
HELD_FOLD: dict[tuple[str, Precision], float] = {
    ("openvino", "fp32"): 1.7, ("openvino", "bf16"): 1.7, ("openvino", "fp16"): 1.1,
    ("openvino", "int8"): 0.7,
}  # fmt: skip
# GPU engines whose networks take GPU memory only when they first run, and the files that are read then.
READ_WHEN_RUN = {"tensorrt": "*.plan"}
# CPU engines that only round their weights to 16 bits: the faster one, and the one that leaves the weights in the file.
LIGHTER: tuple[str, Precision] = ("openvino", "fp16")
LIGHTEST: tuple[str, Precision] = ("torch", "fp16")
LIGHT = (LIGHTEST, ("openvino", "int8"))  # for these no lighter engine is suggested


class Networks:
    """The networks of an engine folder, loaded in at most one precision at a time: memory may not hold two.

    engines: the loaded networks by name; empty before `use` and after `close`. precision, tokens_at_once: those that
    `engines` were loaded with, see `use`. has_run: whether `engines` have denoised, so that memory for their weights
    is already taken. device: that of the first load, on which they stay; None: not loaded yet, or no GPU's engine.
    """

    def __init__(self, folder: EngineFolder) -> None:
        self.folder = folder
        self.engines: dict[str, Engine] = {}
        self.precision: Precision | None = None
        self.tokens_at_once: int | None = None
        self.has_run = False
        self.device: torch.device | None = None
        self._hold: ExitStack | None = None
        self._process = os.getpid()

    @property
    def built(self) -> Precision:
        """The precision that the engine was built in."""
        precision: Precision = self.folder.manifest["precision"]
        return precision

    @property
    def architecture(self) -> Architecture:
        """The sizes of the networks' tensors."""
        return Architecture.from_json(self.folder.manifest["architecture"])

    @property
    def threads(self) -> list[int]:
        """The number of threads of torch, as a list of one; empty if this engine's rounding does not depend on it."""
        manifest = self.folder.manifest
        is_rounded = manifest["device"]["type"] == "cpu" and manifest["backend"] in ROUNDED_BY_THREADS
        return [torch.get_num_threads()] if is_rounded else []

    def on_device(self) -> AbstractContextManager[None]:
        """Make the GPU of the first load current in the block: the program may have made another one current since."""
        if self.device is None and self.folder.manifest["device"]["type"] == "cuda":
            self.device = torch_device()
        is_gpu = self.device is not None and self.device.type == "cuda"
        return torch.cuda.device(self.device) if is_gpu else nullcontext()

    def use(self, precision: Precision, tokens_at_once: int | None = None) -> None:
        """Load the networks in this precision, unless they are. Until `release` no build can replace their folder.

        tokens_at_once: how many tokens of a block to compute at once, if memory does not hold all of them; only for the
            backends of IN_PARTS.
        Raises: EngineFolderError if a build has replaced the folder since it was opened; PoseCrafterError in a process
            forked since then.
        """
        self._refuse_fork()
        if (self.precision, self.tokens_at_once) != (precision, tokens_at_once):
            if self.engines:
                self.close()
            if self._hold is None:
                hold = ExitStack()
                hold.enter_context(in_use(self.folder))
                self._hold = hold
            settings = {} if tokens_at_once is None else {"tokens_at_once": tokens_at_once}
            backend = get_backend(self.folder.manifest["backend"], **settings)
            with self.on_device():
                self.engines = backend.load(self.folder.networks, self.architecture, precision, self.folder.compiled)
            self.precision, self.tokens_at_once = precision, tokens_at_once

    def needed(self, *reports: SegmentReport) -> tuple[Precision, int | None]:
        """Return the precision and tokens at once that the adjustments in these reports ask for: arguments of `use`."""
        adjustments = [adjustment for report in reports for adjustment in report.adjustments]
        at_once = [adjustment["tokens_at_once"] for adjustment in adjustments if "tokens_at_once" in adjustment]
        is_wide = any("precision" in adjustment for adjustment in adjustments)
        return WIDER if is_wide else self.built, at_once[-1] if at_once else None

    def _refuse_fork(self) -> None:
        """Raise PoseCrafterError in a forked process: it has no threads of the libraries, which would wait for them."""
        if os.getpid() != self._process:
            raise PoseCrafterError(f"{self.folder.shown} was loaded before a fork", "load it in each worker")

    def check(self, options: RenderOptions) -> None:
        """Raise PoseCrafterError if the options need a network that the engine was built without, or after a fork."""
        self._refuse_fork()
        if options.decoder == "small" and not self.architecture.has_small_decoder:
            raise PoseCrafterError("this engine has no small decoder", "tune with --small-decoder-steps, or build with "
                                   "--small-decoder")  # fmt: skip
        if options.unet_every > 1 and not self.folder.manifest.get("feature_reuse"):
            raise PoseCrafterError("this engine was built without feature reuse, which unet_every needs",
                                   self._rebuild(feature_reuse=True))  # fmt: skip

    def room(self, options: RenderOptions) -> Room:
        """Return the memory that there is to render in now.

        On a GPU, loaded networks are already in memory, except for the files of READ_WHEN_RUN; what they keep for
        activations counts as free, since the next render has it again. On a CPU they may be loaded when they are first
        called, or be mapped files, whose pages count as free. Activations of 16-bit networks may be float32 there, so 4
        bytes are counted.
        """
        manifest, reserved, element_bytes, lighter, in_parts = self.folder.manifest, 0, 4, None, None
        backend = manifest["backend"]
        if manifest["device"]["type"] == "cuda":
            if not self.engines:
                with explained(options):
                    self.use(self.built)
            element_bytes = TORCH_DTYPES[self.precision or self.built].itemsize
            if backend in READ_WHEN_RUN and not self.has_run:
                reserved = self._stored_bytes(READ_WHEN_RUN[backend])
        else:
            fold, stored = HELD_FOLD.get((backend, self.built), 1), self._stored_bytes("*")
            reserved = int(stored * (min(1, fold) if self.has_run else fold))
            if (backend, self.built) not in LIGHT:
                lighter = partial(self._lighter, stored, options)
        arch, size = self.architecture, tuple(manifest["size"])
        per_frame = frame_bytes(arch, size, options.groups, element_bytes)
        if backend in IN_PARTS and manifest["norm_scope"] == "frame":  # else convolutions are not computed in parts
            frames_at_once = -(-LEAST_TOKENS // self._frame_tokens())  # rounded up
            in_parts = InParts(LEAST_TOKENS, frame_bytes(arch, size, options.groups, element_bytes, COPIES_IN_PARTS),
                               frames_at_once * per_frame)  # fmt: skip
        with self.on_device():
            free = free_bytes(manifest["device"]["type"])
        free = None if free is None else free + self._activation_bytes()
        return Room(free, reserved, per_frame, arch.max_frames, lighter, in_parts)

    def _activation_bytes(self) -> int:
        """Return the bytes that networks keep between renders for their activations; several may share one memory."""
        kept = (getattr(engine, "activations", None) for engine in self.engines.values())
        return sum({memory.data_ptr(): memory.nbytes for memory in kept if memory is not None}.values())

    def _lighter(self, stored: int, options: RenderOptions) -> str:
        """Return the command that builds an engine that takes less memory. stored: bytes of this one's files."""
        free, (backend, precision) = free_bytes("cpu"), LIGHTER
        two_frames = 2 * frame_bytes(self.architecture, tuple(self.folder.manifest["size"]), options.groups, 4)
        fits = free is not None and HELD_FOLD[LIGHTER] * stored + two_frames <= free * USED_SHARE
        is_other = self.folder.manifest["backend"] == backend and HELD_FOLD[backend, self.built] > HELD_FOLD[LIGHTER]
        if not fits or not is_other or get_backend(backend).unsupported_reason(precision) is not None:
            backend, precision = LIGHTEST
        return self._rebuild(backend=backend, precision=precision)

    def _frame_tokens(self) -> int:
        """Return the tokens of a frame at the level of highest resolution that has transformer blocks."""
        arch, (height, width) = self.architecture, self.folder.manifest["size"]
        scale = arch.vae_scale_factor * min(level for layers in arch.keyframe_layers for _, level in layers)
        return int((height // scale) * (width // scale))

    def _stored_bytes(self, pattern: str) -> int:
        """Return the bytes of the network files that match `pattern`, without those of streams: a render reads none."""
        files = (file for file in self.folder.networks.rglob(pattern) if file.is_file())
        return sum(
            file.stat().st_size for file in files if not file.name.startswith((*STREAM_NETWORKS, SHALLOW_STREAM))
        )

    def checked_segment(self, num_frames: int, options: RenderOptions) -> int | None:
        """Return `options.segment` (a number, or None for a joint render) for a clip of `num_frames`, once checked.

        Raises: PoseCrafterError if that is more frames than the engine takes at once.
        """
        assert options.segment != "auto"
        length = num_frames if options.segment is None else min(num_frames, options.segment)
        at_once, most = length + options.inserts, self.architecture.max_frames
        if most is not None and at_once > most:
            hint, longest = self._rebuild(max_frames=at_once), most - options.inserts
            if options.inserts and longest > 0:
                overlap = f" --overlap {longest // 3}" if options.overlap > longest // 3 else ""
                hint = f"render it in segments, --segment {longest}{overlap}, or {hint}"
            raise PoseCrafterError(
                f"{at_once} frames at once{', the reference among them,' if options.inserts else ''} are more than the "
                f"{most} that this engine takes", hint)  # fmt: skip
        return options.segment

    def widening(self, what: str, frame: int, precision: Precision) -> Adjustment:
        """Return the change to make from `frame` of the clip on, because `what` was not finite in `precision`.

        Raises: PoseCrafterError if there is no wider type, or if the backend cannot load these networks in it.
        """
        if precision == WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   "lower --guidance-scale or --control-scale, or tune again with fewer steps")  # fmt: skip
        if self.folder.manifest["backend"] not in LOADED_WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   self._rebuild(precision=WIDER))  # fmt: skip
        return {"frame": frame, "precision": WIDER, "reason": f"{what} was not finite in {precision}"}

    def dividing(self, num_frames: int, at_once: int | None, frame: int, reason: str) -> Adjustment | None:
        """Return the change to make from `frame` of the clip on, because memory ran out: it affects rounding only.

        Blocks then compute half as many tokens at once. None if they already compute few, or if the backend has no
        such setting.
        Args: num_frames: frames that the denoisers get at once, counting the inserted reference, times the prompts.
            at_once: the tokens that blocks computed at once, as `needed` returns it. reason: why memory ran out.
        """
        halved = min(at_once or FEED_FORWARD_TOKENS, num_frames * self._frame_tokens()) // 2
        if self.folder.manifest["backend"] not in IN_PARTS or halved < LEAST_TOKENS:
            return None
        return {"frame": frame, "tokens_at_once": halved, "reason": reason}

    def _rebuild(self, **changes: Any) -> str:
        """Return the command that builds this engine with these entries of its manifest changed."""
        return rebuild_command(self.folder.shown, {**self.folder.manifest, **changes})

    def close(self) -> None:
        """Unload the networks and free all memory that they hold for the shapes that they have run at."""
        self.engines, self.precision, self.tokens_at_once, self.has_run = {}, None, None, False
        let_go()

    def release(self) -> None:
        """Unload the networks as `close` does, and unlock their folder, which may then be replaced."""
        self.close()
        if self._hold is not None:
            self._hold.close()
            self._hold = None


def check_runs_here(folder: EngineFolder) -> None:
    """Raise EngineFolderError if the backend cannot run here, or if device or versions are not those of the build."""
    manifest, path = folder.manifest, folder.shown
    backend, rebuild = get_backend(manifest["backend"]), rebuild_hint(path, manifest)
    reason = backend.unsupported_reason(manifest["precision"])
    if reason is not None:
        reason, cache_hint, _ = reason.partition(CACHE_HINT)  # with a cache this engine runs: no other is needed
        # The hint keeps the other settings, and leaves the choice of a backend that runs here to the build.
        others = {name: value for name, value in manifest.items() if name not in ("backend", "precision", "max_frames")}
        hint = cache_hint or rebuild_hint(path, others)
        raise EngineFolderError(f"{path} needs backend {backend.name}: {reason.removesuffix('; ')}", hint)
    for built, here in _provenance(manifest, backend):
        if built != here:
            raise EngineFolderError(f"{path} was built on {built}, this is {here}", rebuild)
    built_on, this = manifest["device"], backend.device()
    if is_driver_older(built_on, this):
        message = f"{path} was built with a driver for CUDA {built_on[DRIVER]}, this one is for {this.get(DRIVER)}"
        raise EngineFolderError(message, f"update the driver, or {rebuild}")


def _provenance(manifest: dict[str, Any], backend: Backend) -> Iterator[tuple[str, str]]:
    """Yield what an engine is bound to, as pairs of descriptions: where it was built, and here."""
    yield manifest["device"]["name"], backend.device()["name"]
    built, here = (manifest["package"], manifest.get("networks", [])), (__version__, list(NETWORK_NAMES))
    yield tuple(f"posecrafter-rt {version} with {len(names)} networks" for version, names in (built, here))  # type: ignore[misc]
    versions = library_versions(backend.libraries)
    for name in backend.libraries:
        yield f"{name} {manifest['libraries'].get(name)}", f"{name} {versions.get(name)}"

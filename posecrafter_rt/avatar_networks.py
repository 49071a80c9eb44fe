"""The networks of an engine folder as they are loaded: in its own precision or a wider one, or let go of for a while.

Layer 6: beside `avatar`, since the runtime knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from posecrafter_rt import __version__
from posecrafter_rt.engines import IN_PARTS, LOADED_WIDER, ROUNDED_BY_THREADS, Backend, Engine, Precision, get_backend
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.device import DRIVER, is_driver_older
from posecrafter_rt.engines.folder import EngineFolder, in_use, rebuild_command, rebuild_hint
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

WIDER: Precision = "fp32"  # what networks run in once 16 or 8 bits do not hold their numbers
# Of a block, one frame of 64 × 64: what fewer of them take is little beside what is not done in parts.
LEAST_TOKENS = 1 << 12
# What a processor's engines hold of their weights, over the files: OpenVINO orders them anew, convolutions' transformed ones
# are larger, those in 16 and 8 bits smaller. Measured at Stable Diffusion 1.5's size, for one length of a clip.
HELD_FOLD: dict[tuple[str, Precision], float] = {
    ("openvino", "fp32"): 1.7, ("openvino", "bf16"): 1.7, ("openvino", "fp16"): 1.1,
    ("openvino", "int8"): 0.7,
}  # fmt: skip
# Engines of a GPU whose networks take its memory only once they are first run, and which files then do.
READ_WHEN_RUN = {"tensorrt": "*.plan"}
# A processor's engines that only round weights, to 16 bits: the faster one, and the one that leaves them in the file.
LIGHTER: tuple[str, Precision] = ("openvino", "fp16")
LIGHTEST: tuple[str, Precision] = ("torch", "fp16")
LIGHT = (LIGHTEST, ("openvino", "int8"))  # another would not help


class Networks:
    """At most one precision at a time, since memory may not hold two.

    engines: by the networks' names; empty until they are used, and once they are let go of. precision, tokens_at_once: see
    `use`; those of `engines`. has_run: whether these have denoised, so that what they hold of their weights is no longer free.
    """

    def __init__(self, folder: EngineFolder) -> None:
        self.folder = folder
        self.engines: dict[str, Engine] = {}
        self.precision: Precision | None = None
        self.tokens_at_once: int | None = None
        self.has_run = False
        self._hold: ExitStack | None = None

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
        """How many torch computes with now, where rounding depends on that; else none."""
        manifest = self.folder.manifest
        is_rounded = manifest["device"]["type"] == "cpu" and manifest["backend"] in ROUNDED_BY_THREADS
        return [torch.get_num_threads()] if is_rounded else []

    def use(self, precision: Precision, tokens_at_once: int | None = None) -> None:
        """Load the networks in this precision, unless they are. Until `release` no build can replace their folder.

        tokens_at_once: of a block, where memory does not hold all; only for the backends of IN_PARTS.
        Raises: EngineFolderError when a build has replaced the folder since it was opened.
        """
        if (self.precision, self.tokens_at_once) != (precision, tokens_at_once):
            if self.engines:
                self.close()
            if self._hold is None:
                hold = ExitStack()
                hold.enter_context(in_use(self.folder))
                self._hold = hold
            settings = {} if tokens_at_once is None else {"tokens_at_once": tokens_at_once}
            backend = get_backend(self.folder.manifest["backend"], **settings)
            self.engines = backend.load(self.folder.networks, self.architecture, precision, self.folder.compiled)
            self.precision, self.tokens_at_once = precision, tokens_at_once

    def needed(self, *reports: SegmentReport) -> tuple[Precision, int | None]:
        """The precision that a render of these reports has come to, and the tokens at once; as `use` takes them."""
        adjustments = [adjustment for report in reports for adjustment in report.adjustments]
        at_once = [adjustment["tokens_at_once"] for adjustment in adjustments if "tokens_at_once" in adjustment]
        is_wide = any("precision" in adjustment for adjustment in adjustments)
        return WIDER if is_wide else self.built, at_once[-1] if at_once else None

    def check(self, options: RenderOptions) -> None:
        """Raise PoseCrafterError where options need a network which the engine was built without."""
        if options.decoder == "small" and not self.architecture.has_small_decoder:
            raise PoseCrafterError("this engine has no small decoder", "tune with --small-decoder-steps, or build with "
                                   "--small-decoder")  # fmt: skip
        if options.unet_every > 1 and not self.folder.manifest.get("feature_reuse"):
            raise PoseCrafterError("this engine was built without feature reuse, which unet_every needs",
                                   self._rebuild(feature_reuse=True))  # fmt: skip

    def room(self, options: RenderOptions) -> Room:
        """What there is to render in now.

        On a GPU the networks are in memory once they are loaded, but for files of READ_WHEN_RUN. On a processor they may be
        loaded when they are first called, or be files mapped to memory, whose pages count as free; and what runs in 16 bits
        there may be float32 in between.
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
        if backend in IN_PARTS and manifest["norm_scope"] == "frame":  # else convolutions are not
            frames_at_once = -(-LEAST_TOKENS // self._frame_tokens())  # rounded up
            in_parts = InParts(LEAST_TOKENS, frame_bytes(arch, size, options.groups, element_bytes, COPIES_IN_PARTS),
                               frames_at_once * per_frame)  # fmt: skip
        return Room(free_bytes(manifest["device"]["type"]), reserved, per_frame, arch.max_frames, lighter, in_parts)

    def _lighter(self, stored: int, options: RenderOptions) -> str:
        """The command that builds an engine which holds less than this one, whose networks' files have so many bytes."""
        free, (backend, precision) = free_bytes("cpu"), LIGHTER
        two_frames = 2 * frame_bytes(self.architecture, tuple(self.folder.manifest["size"]), options.groups, 4)
        fits = free is not None and HELD_FOLD[LIGHTER] * stored + two_frames <= free * USED_SHARE
        is_other = self.folder.manifest["backend"] == backend and HELD_FOLD[backend, self.built] > HELD_FOLD[LIGHTER]
        if not fits or not is_other or get_backend(backend).unsupported_reason(precision) is not None:
            backend, precision = LIGHTEST
        return self._rebuild(backend=backend, precision=precision)

    def _frame_tokens(self) -> int:
        """Positions of a frame at the widest level that has transformer blocks."""
        arch, (height, width) = self.architecture, self.folder.manifest["size"]
        scale = arch.vae_scale_factor * min(level for layers in arch.keyframe_layers for _, level in layers)
        return int((height // scale) * (width // scale))

    def _stored_bytes(self, pattern: str) -> int:
        """Of the networks' files of such names, but for those of a stream, which a render does not read."""
        files = (file for file in self.folder.networks.rglob(pattern) if file.is_file())
        return sum(
            file.stat().st_size for file in files if not file.name.startswith((*STREAM_NETWORKS, SHALLOW_STREAM))
        )

    def checked_segment(self, num_frames: int, options: RenderOptions) -> int | None:
        """The length of segments that options ask for, a number by now, or None for a joint render of a clip of so many.

        Raises: PoseCrafterError where that is more than the engine takes at once.
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
        """What is to change, from this frame of the clip on, because `what` was not finite in `precision`.

        Raises: PoseCrafterError where there is no wider type, or the backend cannot load these networks in it.
        """
        if precision == WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   "lower --guidance-scale or --control-scale, or tune again with fewer steps")  # fmt: skip
        if self.folder.manifest["backend"] not in LOADED_WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   self._rebuild(precision=WIDER))  # fmt: skip
        return {"frame": frame, "precision": WIDER, "reason": f"{what} was not finite in {precision}"}

    def dividing(self, num_frames: int, at_once: int | None, frame: int, reason: str) -> Adjustment | None:
        """What is to change, from this frame of the clip on, because memory ran out, that changes nothing but rounding.

        That is blocks that do half as many tokens at once as they did; None where they already do few, or where
        the backend cannot be told.
        Args: num_frames: that the denoisers are given at once, the inserted reference and all prompts counted; at_once: the
            tokens that blocks did, as `needed` has it.
        """
        halved = min(at_once or FEED_FORWARD_TOKENS, num_frames * self._frame_tokens()) // 2
        if self.folder.manifest["backend"] not in IN_PARTS or halved < LEAST_TOKENS:
            return None
        return {"frame": frame, "tokens_at_once": halved, "reason": reason}

    def _rebuild(self, **changes: Any) -> str:
        """The command that builds this engine but for these of its manifest's entries."""
        return rebuild_command(self.folder.path, {**self.folder.manifest, **changes})

    def close(self) -> None:
        """Let go of the networks and of all memory that they hold for the shapes that they have run at."""
        self.engines, self.precision, self.tokens_at_once, self.has_run = {}, None, None, False
        let_go()

    def release(self) -> None:
        """Let go of the networks as `close` does, and of their folder, which may then be replaced."""
        self.close()
        if self._hold is not None:
            self._hold.close()
            self._hold = None


def check_runs_here(folder: EngineFolder) -> None:
    """Raise EngineFolderError when an engine's backend cannot run here, or it was built elsewhere or by other versions."""
    manifest, path = folder.manifest, folder.path
    backend, rebuild = get_backend(manifest["backend"]), rebuild_hint(path, manifest)
    reason = backend.unsupported_reason(manifest["precision"])
    if reason is not None:
        # Built with what else it has, for a backend that runs here.
        others = {name: value for name, value in manifest.items() if name not in ("backend", "precision", "max_frames")}
        raise EngineFolderError(f"{path} needs backend {backend.name}: {reason}", rebuild_hint(path, others))
    for built, here in _provenance(manifest, backend):
        if built != here:
            raise EngineFolderError(f"{path} was built on {built}, this is {here}", rebuild)
    built_on, this = manifest["device"], backend.device()
    if is_driver_older(built_on, this):
        message = f"{path} was built with a driver for CUDA {built_on[DRIVER]}, this one is for {this.get(DRIVER)}"
        raise EngineFolderError(message, f"update the driver, or {rebuild}")


def _provenance(manifest: dict[str, Any], backend: Backend) -> Iterator[tuple[str, str]]:
    """What an engine is bound to, as pairs: where it was built, and here."""
    yield manifest["device"]["name"], backend.device()["name"]
    built, here = (manifest["package"], manifest.get("networks", [])), (__version__, list(NETWORK_NAMES))
    yield tuple(f"posecrafter-rt {version} with {len(names)} networks" for version, names in (built, here))  # type: ignore[misc]
    versions = library_versions(backend.libraries)
    for name in backend.libraries:
        yield f"{name} {manifest['libraries'].get(name)}", f"{name} {versions.get(name)}"

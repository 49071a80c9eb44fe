"""`build_engine`: build an engine folder from a tuned checkpoint.

Layer 6: combines the layers below.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posecrafter_rt import __version__
from posecrafter_rt.atomic import refuse_sources, sha256_json
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engine_training import choose_size, write_training
from posecrafter_rt.engines import (
    LAST_RESORT,
    ONLY_OF,
    Backend,
    Precision,
    choose_backend,
    choose_precision,
    usual_max_frames,
)
from posecrafter_rt.engines.folder import EngineFolder, building, in_use, open_folder, take_networks, verify_files
from posecrafter_rt.engines.refit import check_source, other_weights
from posecrafter_rt.engines.stage_log import StageLog
from posecrafter_rt.engines.tuned_file import TUNED_FILE
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError, ShapeError
from posecrafter_rt.machine import library_versions, source_digest
from posecrafter_rt.models.lora import Lora, LoraFile, fuse_loras, read_lora
from posecrafter_rt.models.small_decoder import hash_small_decoder, load_small_decoder
from posecrafter_rt.models.sources import hash_configs, locate_base
from posecrafter_rt.models.weights import read_scheduler_config
from posecrafter_rt.passed_over import Failures, PassedOver, passing_over, read_passed_over
from posecrafter_rt.plain_numbers import is_whole, make_numbers_plain
from posecrafter_rt.spec import NETWORK_NAMES, Architecture

if TYPE_CHECKING:
    from posecrafter_rt.models.loading import PoseModel

LIBRARIES = ("torch", "diffusers", "transformers")
EXPORTING = ("onnx", "onnx-ir", "onnxscript")
# Libraries needed only to build an engine; those that it also needs to be loaded are in `Backend.libraries`.
BUILT_WITH = {"openvino": EXPORTING, "tensorrt": (*EXPORTING, "triton")}
SOURCES = ("models", "ops", "kernels", "export", "engines")  # subpackages whose code decides what an engine holds
# Manifest entries that differ between persons and do not affect how long a build takes.
OF_A_PERSON = ("fingerprint", "checkpoint", "base", "base_hash", "prompt", "steps", "seed", "loras", "small_decoder")

log = logging.getLogger(__name__)

# Called with the name of each stage as it begins, and the seconds left if all goes as the last time, or None.
BuildProgress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    backend: `auto` or a name of `engines.names()`. precision: `auto`, `fp32`, `bf16`, `fp16`, or `int8` (`openvino`
        only).
    size: (height, width) in pixels of the rendered frames, of tuning's shape; None: that of tuning.
    base, controlnet, vae: where they are, if they moved since tuning.
    refit: an engine folder of another checkpoint of the same base. Its files are linked (copied to another file
        system) but for what tuning changes; see docs/engines.md. `auto` then means its backend and its precision.
    loras: fused into the tuned weights, in this order; see `fuse_loras`.
    small_decoder: used instead of the checkpoint's; see `load_small_decoder`.
    feature_reuse: build the network that `RenderOptions.unet_every`, and so the preset `balanced`, needs; None: yes, or
        as in the engine to refit.
    max_frames: for `tensorrt` only: the most frames in one joint render or segment, counting the inserted reference;
        None: as in the engine to refit, else `engines.usual_max_frames`.
    """

    backend: str = "auto"
    precision: str = "auto"
    size: tuple[int, int] | None = None
    base: str | None = None
    refit: Path | None = None
    loras: tuple[Lora, ...] = ()
    small_decoder: str | None = None
    feature_reuse: bool | None = None
    max_frames: int | None = None
    controlnet: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        if self.size is None:
            return
        if not (len(self.size) == 2 and all(is_whole(side) for side in self.size)):
            raise ShapeError(f"a size of {self.size!r}", "give (height, width) in pixels, such as (512, 512)")
        object.__setattr__(self, "size", tuple(int(side) for side in self.size))


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    folder: the engine. was_current: it already existed, from the same checkpoint and options, and nothing was done.
    backend_reason: why this backend was chosen.
    """

    folder: EngineFolder
    was_current: bool
    backend_reason: str


def build_engine(
    checkpoint: Path | str,
    output: Path | str | None = None,
    options: BuildOptions = BuildOptions(),
    *,
    force: bool = False,
    progress: BuildProgress = lambda stage, seconds_left: None,
) -> BuildResult:
    """Build an engine folder.

    With backend `auto`, a backend that runs here but fails to build this engine is passed over, with a warning that
    says why. The next build of the same engine skips it without trying, unless `force` is set.

    Args:
        checkpoint: what `tune` wrote. output: the folder; None: the former's name, `.engine` for `.ckpt` or `.safetensors`.
        force: do two things. Replace what is at `output` even if it is not an engine, or an engine folder that holds
            other files; without `force` only an engine is replaced, once the new one is complete. And try again what
            `auto` passed over the last time. An engine of the same checkpoint and options is kept even so: remove it
            to build it again.
        progress: called with each stage as it begins, and the seconds left if there was such a build before.
    Raises: CheckpointError (also for a LoRA), ModelError, BackendUnavailable, ShapeError (a size that the network
        cannot halve, or of another shape than tuning's), OutputExists; PoseCrafterError if `max_frames` is too small,
        or is given for a backend that takes any number; EngineFolderError if the engine to refit is damaged, or
        differs in more than weights.
    """
    checkpoint = Path(checkpoint)
    name = re.sub(r"\.(ckpt|safetensors)$", "", checkpoint.name, flags=re.IGNORECASE)  # jane.doe is a name
    output = Path(output) if output is not None else checkpoint.parent / f"{name}.engine"
    failures = Failures({} if force else read_passed_over(output))
    while True:
        try:
            result = _build(checkpoint, output, options, force, progress, failures)
        except PassedOver as error:
            failures.add(error)
        else:
            failures.save(result.folder)
            return result


def _build(
    checkpoint: Path, output: Path, options: BuildOptions, force: bool, progress: BuildProgress, failures: Failures
) -> BuildResult:
    """Build an engine as `build_engine` does, with one backend; raise PassedOver if `auto` is to try the next."""
    plan = _choose(checkpoint, options, failures.why)
    manifest = _describe(plan, options)
    fingerprint = manifest["fingerprint"]
    if plan.is_auto and fingerprint in failures.before:
        raise PassedOver(plan.backend.name, fingerprint, failures.before[fingerprint])
    if plan.source is not None:
        check_source(plan.source, manifest)
    current = _current(output, fingerprint)
    if current is not None:
        return BuildResult(current, True, plan.why)
    refuse_sources(output, checkpoint, *_read_beside(options, plan.tuned, output))
    plan = _refit_or_build(plan, manifest)
    stages = StageLog(_kind_of_build(manifest, plan))

    def on_stage(stage: str) -> None:
        progress(stage, stages.begin(stage))

    on_stage("loading the tuned weights" if plan.is_partial else "loading the base")
    model, arch = _load(plan, options, manifest)
    if plan.source is not None:
        check_source(plan.source, {"architecture": manifest["architecture"]})  # known only once the base is loaded
    taken: dict[str, str] = {}
    with building(output, manifest, force, taken) as staging:
        on_stage("writing the reference frames")
        write_training(staging, plan.tuned.frames, plan.tuned.poses, plan.size)
        model.tokenizer.save_pretrained(staging / "tokenizer")
        networks = staging / "networks"
        networks.mkdir()
        with passing_over(plan.backend, fingerprint, plan.is_auto):
            taken |= _write_networks(plan, model, arch, networks, stages, on_stage)
    stages.save()
    return BuildResult(EngineFolder(output.resolve(), manifest, output.absolute()), False, plan.why)


@dataclass(frozen=True)
class _Plan:
    """What is to be built, as far as it is known before the base is loaded.

    source: the engine to refit. is_auto: whether another backend may be tried if this one fails. why: why this one.
    """

    source: EngineFolder | None
    is_auto: bool
    backend: Backend
    why: str
    precision: Precision
    tuned: Checkpoint
    loras: list[LoraFile]
    size: tuple[int, int]
    max_frames: int | None
    feature_reuse: bool

    @property
    def is_partial(self) -> bool:
        """Whether nothing but what was tuned is replaced in the engine to refit."""
        return self.source is not None and self.backend.holds_tuned_apart


def _read_beside(options: BuildOptions, tuned: Checkpoint, output: Path) -> list[Path]:
    """Return the other files and folders that an engine is built from; names of bases or of hub models are left out.

    The engine to refit is left out if it is `output` itself: an engine may be refitted in place.
    """
    sources = [getattr(options, name) or tuned.metadata[name] for name in ("base", "controlnet", "vae")]
    given = [*(Path(source) for source in sources if source), *(lora.path for lora in options.loras)]
    if options.small_decoder is not None:
        given.append(Path(options.small_decoder))
    if options.refit is not None and Path(options.refit).resolve() != output.resolve():
        given.append(Path(options.refit))
    return [path for path in given if path.exists()]


def _refit_or_build(plan: _Plan, manifest: Mapping[str, Any]) -> _Plan:
    """Return the plan without the engine to refit if more than a refit replaces differs; else verify what it reads."""
    if plan.source is None:
        return plan
    if plan.is_partial and (difference := other_weights(plan.source, manifest)) is not None:
        log.warning("the engine to refit %s: all of this one is written anew", difference)
        return replace(plan, source=None)
    verify_files(plan.source, *((".json", TUNED_FILE) if plan.is_partial else ()))
    return plan


def _load(plan: _Plan, options: BuildOptions, manifest: dict[str, Any]) -> tuple[PoseModel, Architecture]:
    """Load the tuned networks as they are built: with LoRAs fused, and folded. Raises: see `build_engine`.

    The manifest is given what is known only now.
    """
    load = plan.tuned.load_outline if plan.is_partial else plan.tuned.load_model
    model = load(base=options.base, controlnet=options.controlnet, vae=options.vae)
    if options.small_decoder is not None:
        arch = model.architecture()
        model.small_decoder = load_small_decoder(options.small_decoder, arch.latent_channels, arch.vae_scale_factor,
                                                 torch.float32)  # fmt: skip
    fuse_loras(model, plan.loras)
    model.unet.gives_deep_features = plan.feature_reuse
    if model.splits_modules():  # an outline could not be folded, so the engine will not be refitted
        manifest["tuned"] = None
    model.fold()
    arch = replace(model.architecture(), size=plan.size, max_frames=plan.max_frames)
    arch.check_size(plan.size)
    manifest["architecture"] = arch.to_json()
    return model, arch


def _write_networks(
    plan: _Plan, model: PoseModel, arch: Architecture, folder: Path, stages: StageLog, progress: Callable[[str], None]
) -> dict[str, str]:
    """Build the networks, or refit those of the engine to refit; return what `take_networks` took of it."""
    if plan.source is None:
        stages.set_missing(plan.backend.num_missing(model, arch, plan.precision))
        plan.backend.build(model, arch, folder, plan.precision, progress)
        return {}
    with in_use(plan.source):
        plan.backend.refit(plan.source.networks, folder, model, arch, plan.precision, progress)
        return take_networks(plan.source, folder.parent)


def _choose(checkpoint: Path, options: BuildOptions, failed: Mapping[str, str]) -> _Plan:
    """Choose what `auto` and None stand for in the options. An engine to refit has the backend, precision and the rest.

    failed: by name, why `auto` must pass over a backend.
    """
    source = open_folder(options.refit, verify=False) if options.refit is not None else None
    is_auto = options.backend == "auto" and options.precision not in ONLY_OF and source is None
    name, precision = options.backend, options.precision
    if source is not None:
        name = source.manifest["backend"] if name == "auto" else name
        precision = source.manifest["precision"] if precision == "auto" else precision
        check_source(source, {"backend": name, "precision": precision})
    chosen = choose_precision(precision, LAST_RESORT if name == "auto" and failed else name)
    backend, why = choose_backend(name, chosen, failed)
    tuned = Checkpoint.load(checkpoint)
    size = choose_size(options.size, tuned.frames.shape[1:3])
    usual = True if source is None else source.manifest.get("feature_reuse", False)
    return _Plan(
        source=source, is_auto=is_auto, backend=backend, why=why if source is None else f"that of {source.path}",
        precision=chosen, tuned=tuned, loras=[read_lora(lora) for lora in options.loras], size=size,
        max_frames=choose_max_frames(options, backend, size, source),
        feature_reuse=usual if options.feature_reuse is None else options.feature_reuse,
    )  # fmt: skip


def choose_max_frames(
    options: BuildOptions, backend: Backend, size: tuple[int, int], source: EngineFolder | None
) -> int | None:
    """Return the most frames at once that an engine is built for; None for a backend that takes any number.

    Raises: PoseCrafterError if a number is given for such a backend, or if it is less than 2.
    """
    usual, wanted = usual_max_frames(backend.name, size), options.max_frames
    if wanted is None:
        return usual if source is None else source.manifest.get("max_frames", usual)
    if usual is None:
        raise PoseCrafterError(f"an engine of backend {backend.name} takes any number of frames",
                               "leave out --max-frames")  # fmt: skip
    if wanted < 2:
        raise PoseCrafterError(f"an engine for {wanted} frames at once",
                               "give 2 or more: the inserted reference is one")  # fmt: skip
    return wanted


def libraries_of(backend: Backend) -> list[str]:
    """Return the distributions whose versions are part of the fingerprint of a backend's engine, sorted."""
    return sorted({*LIBRARIES, *BUILT_WITH.get(backend.name, ()), *backend.libraries})


def _describe(plan: _Plan, options: BuildOptions) -> dict[str, Any]:
    """Return the part of the manifest that is known before the weights are loaded.

    `fingerprint` is the hash of the rest, of the base's configurations and of the code in SOURCES, refitted or not.
    """
    tuned, backend, base = plan.tuned, plan.backend, locate_base(options.base or plan.tuned.metadata["base"])
    manifest = {
        "package": __version__, "backend": backend.name, "precision": plan.precision, "size": list(plan.size),
        "checkpoint": tuned.digest(), "tuned": tuned.names_digest(), "device": backend.device(),
        "networks": list(NETWORK_NAMES), "scheduler": read_scheduler_config(base), "recommended": base.settings().recommended,
        "libraries": {"python": platform.python_version(), **library_versions(libraries_of(backend))},
        **{name: tuned.metadata[name] for name in ("base", "base_hash", "prompt", "norm_scope", "steps", "seed")},
        **({"loras": [lora.describe() for lora in plan.loras]} if plan.loras else {}),
        **({} if options.small_decoder is None else {"small_decoder": hash_small_decoder(options.small_decoder)}),
        "feature_reuse": plan.feature_reuse,
        **({} if plan.max_frames is None else {"max_frames": plan.max_frames}),
    }  # fmt: skip
    configs = hash_configs(base, {key: getattr(options, key) or tuned.metadata[key] for key in ("vae", "controlnet")})
    return {**manifest, "fingerprint": sha256_json({**manifest, "sources": [configs, source_digest(*SOURCES)]})}


def _kind_of_build(manifest: Mapping[str, Any], plan: _Plan) -> dict[str, Any]:
    """Return what decides how long a build takes, as far as it is known before the base is loaded.

    That is everything that decides what is built, except whose avatar it is. Names and shapes of the tuned tensors
    stand for the base's architecture.
    """
    decisive = {name: value for name, value in manifest.items() if name not in OF_A_PERSON}
    shapes = {name: list(tensor.shape) for name, tensor in plan.tuned.tensors.items()}
    return {
        **decisive, "sources": source_digest(*SOURCES), "is_refit": plan.source is not None, "tuned": shapes,
        "other_decoder": "small_decoder" in manifest,
    }  # fmt: skip


def _current(output: Path, fingerprint: str) -> EngineFolder | None:
    try:
        folder = open_folder(output, verify=False)
        if folder.manifest.get("fingerprint") != fingerprint:  # then its gigabytes need not be read
            return None
        verify_files(folder)
    except EngineFolderError:
        return None
    return folder

"""`build_engine`: a tuned checkpoint → an engine folder.

Layer 6: puts together what the layers below know.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posecrafter_rt import __version__
from posecrafter_rt.atomic import sha256_json
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines import choose_backend, choose_precision
from posecrafter_rt.engines.base import Progress
from posecrafter_rt.engines.folder import EngineFolder, building, open_folder
from posecrafter_rt.errors import EngineFolderError, ShapeError
from posecrafter_rt.framing import resize_to, transform_keypoints
from posecrafter_rt.machine import library_versions
from posecrafter_rt.poses.keypoints import PoseSequence

LIBRARIES = ("torch", "diffusers", "transformers", "onnx")
REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    backend: `auto` or a name of `engines.names()`; precision: `auto`, `fp32`, `bf16` or `fp16`.
    size: (height, width) in pixels of what is rendered; None: that of tuning. base: where the base lies, if it moved.
    """

    backend: str = "auto"
    precision: str = "auto"
    size: tuple[int, int] | None = None
    base: str | None = None


@dataclass(frozen=True)
class BuildResult:
    """folder: the engine. was_current: it existed already, from the same checkpoint and options; nothing was done."""

    folder: EngineFolder
    was_current: bool
    backend_reason: str


def build_engine(
    checkpoint: Path | str,
    output: Path | str | None = None,
    options: BuildOptions = BuildOptions(),
    *,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> BuildResult:
    """Build an engine folder.

    Args:
        checkpoint: what `tune` wrote. output: the folder; None: the checkpoint's name with `.engine`.
        force: replace something at `output` that is not an engine folder; an engine folder is replaced anyway, once the
            new one is complete.
        progress: told each stage as it begins.
    Raises: CheckpointError, ModelError, BackendUnavailable, ShapeError (a size the network cannot halve), OutputExists.
    """
    checkpoint = Path(checkpoint)
    output = Path(output) if output is not None else checkpoint.with_suffix(".engine")
    precision = choose_precision(options.precision, options.backend)
    backend, why = choose_backend(options.backend, precision)
    tuned = Checkpoint.load(checkpoint)
    size = options.size or tuned.frames.shape[1:3]
    manifest: dict[str, Any] = {
        "package": __version__, "backend": backend.name, "precision": precision, "size": list(size),
        "checkpoint": tuned.digest(), "device": backend.device(),
        "libraries": {"python": platform.python_version(), **library_versions({*LIBRARIES, *backend.libraries})},
        **{name: tuned.metadata[name] for name in ("base", "base_hash", "prompt", "norm_scope", "steps", "seed")},
    }  # fmt: skip
    manifest["fingerprint"] = sha256_json(manifest)
    current = _current(output, manifest["fingerprint"])
    if current is not None:
        return BuildResult(current, True, why)
    progress("loading the base")
    model = tuned.load_model(base=options.base)
    model.fold()
    arch = model.architecture()
    if any(side % arch.size_multiple for side in size):
        raise ShapeError(f"size {size[0]}x{size[1]} does not fit the network", f"use multiples of {arch.size_multiple}")
    manifest |= {"architecture": arch.to_json(), "scheduler": model.scheduler_config,
                 "recommended": model.settings.recommended}  # fmt: skip
    with building(output, manifest, force) as staging:
        progress("writing the reference frames")
        _write_reference(staging / REFERENCE_FILE, tuned, size)
        model.tokenizer.save_pretrained(staging / "tokenizer")
        (staging / "networks").mkdir()
        backend.build(model, arch, staging / "networks", precision, progress)
    return BuildResult(open_folder(output), False, why)


def _current(output: Path, fingerprint: str) -> EngineFolder | None:
    try:
        folder = open_folder(output)
    except EngineFolderError:
        return None
    return folder if folder.manifest.get("fingerprint") == fingerprint else None


def _write_reference(path: Path, tuned: Checkpoint, size: tuple[int, int]) -> None:
    frames = torch.from_numpy(resize_to(tuned.frames, size))
    keypoints = torch.from_numpy(transform_keypoints(tuned.poses, size).keypoints)
    save_file({"frames": frames.contiguous(), "keypoints": keypoints.contiguous()}, path)


def read_reference(folder: EngineFolder) -> tuple[Any, PoseSequence]:
    """Training frames (n, H, W, 3) uint8 and their poses, at the engine's size."""
    tensors = load_file(folder.path / REFERENCE_FILE)
    frames = tensors["frames"].numpy()
    return frames, PoseSequence(tensors["keypoints"].numpy(), frames.shape[1:3])

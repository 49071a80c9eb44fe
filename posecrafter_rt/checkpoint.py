"""`tuned.ckpt`: the tuned tensors and the frames and poses they were tuned on, in one safetensors file.

Layer 3: the file is self-contained; no video is needed later.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from posecrafter_rt.atomic import atomic_path, refuse_overwrite, sha256_json
from posecrafter_rt.errors import CheckpointError, PoseError, first_line
from posecrafter_rt.machine import library_versions
from posecrafter_rt.models.loading import PoseModel, apply_tensors, load_base, load_outline
from posecrafter_rt.models.small_decoder import empty_small_decoder
from posecrafter_rt.models.weights import begins_as_safetensors
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tensor_file import save_tensors

FORMAT = "posecrafter-rt checkpoint"
FORMAT_VERSION = 1
LIBRARIES = ("posecrafter-rt", "torch", "diffusers", "transformers")
REQUIRED_METADATA = ("base", "base_hash", "controlnet", "vae", "prompt", "size", "norm_scope", "seed", "steps")
# Only one key: safetensors writes several in random order, but equal content must give equal bytes.
_HEADER = "posecrafter"
_PREFIXES = ("unet.", "controlnet.", "vae.", "small_decoder.")


@dataclass(eq=False)
class Checkpoint:
    """A tuned person.

    tensors: tuned tensors by `unet.…`, `controlnet.…`, `vae.…` and `small_decoder.…` name.
    frames: (n, H, W, 3) uint8 RGB. poses: n poses on a canvas of H × W pixels.
    metadata: JSON values, among them those of REQUIRED_METADATA: base, controlnet, vae as `load_base` takes them (or
        None); base_hash; prompt; size [height, width]; norm_scope; seed; steps. If a small decoder was distilled,
        small_decoder is its configuration. `tune` also writes schedule, the base's `DDIMSchedule.learned`, and
        configurations, its `PoseModel.configurations`; older checkpoints lack them. A loaded checkpoint also has
        "versions" and "format_version".
    Raises: CheckpointError if frames, poses and metadata do not fit together.
    """

    tensors: dict[str, Tensor]
    frames: np.ndarray
    poses: PoseSequence
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [name for name in REQUIRED_METADATA if name not in self.metadata]
        if missing:
            raise CheckpointError(f"the checkpoint does not say its {', '.join(missing)}", hint="tune again")
        if self.frames.ndim != 4 or self.frames.shape[3] != 3 or self.frames.dtype != np.uint8:
            message = f"the frames are {self.frames.dtype} {self.frames.shape}"
            raise CheckpointError(message, hint="give uint8 (n, H, W, 3)")
        if len(self.frames) != len(self.poses):
            message = f"{len(self.frames)} frames but {len(self.poses)} poses"
            raise CheckpointError(message, hint="give one pose a frame")
        if self.frames.shape[1:3] != self.poses.canvas:
            message = f"the frames are {self.frames.shape[1:3]} but the poses' canvas is {self.poses.canvas}"
            raise CheckpointError(message, hint="bring the poses to the frames' size")
        if not isinstance(self.metadata.get("schedule", {}), dict):
            raise CheckpointError("the noise schedule that it was tuned with is not a table", hint="tune again")
        if not isinstance(self.metadata.get("configurations", {}), dict):
            raise CheckpointError("its base's configurations are not a table", hint="tune again")
        foreign = [name for name in self.tensors if not name.startswith(_PREFIXES)]
        if foreign:
            raise CheckpointError(
                f"a tensor is called {foreign[0]}",
                hint=f"tuned tensors are {', '.join(f'{prefix}…' for prefix in _PREFIXES)}",
            )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file, atomically; equal content gives equal bytes.

        Raises: OutputExists; DiskFull; PoseCrafterError if the folder cannot be written.
        """
        refuse_overwrite(path, force)
        metadata = {name: value for name, value in self.metadata.items() if name != "format_version"}
        metadata["versions"] = {"python": platform.python_version(), **library_versions(LIBRARIES)}
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "fps": self.poses.fps, "metadata": metadata}
        tensors = dict(self.tensors)
        tensors["frames"] = torch.from_numpy(np.ascontiguousarray(self.frames))
        tensors["keypoints"] = torch.from_numpy(np.ascontiguousarray(self.poses.keypoints))
        with atomic_path(path) as temporary:
            save_tensors(tensors, temporary, {_HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint.

        Raises: CheckpointError if the file is missing, truncated, a pickle, or not a checkpoint of this package.
        """
        path = Path(path)
        header, tensors = _read(path)
        if not isinstance(header.get("metadata"), dict) or not {"frames", "keypoints"} <= set(tensors):
            raise CheckpointError(f"{path} is a damaged checkpoint: its frames, poses or metadata are missing",
                                  hint="tune again")  # fmt: skip
        frames, keypoints = tensors.pop("frames").numpy(), tensors.pop("keypoints").numpy()
        try:
            poses = PoseSequence(keypoints, frames.shape[1:3], header.get("fps"))
            return cls(tensors, frames, poses, {**header["metadata"], "format_version": header["format_version"]})
        except (PoseError, CheckpointError) as error:
            raise CheckpointError(f"{path} is a damaged checkpoint: {error}", hint="tune again") from error

    def require_base(self, model: PoseModel) -> None:
        """Raise CheckpointError, naming what differs, unless `model` is the base that this checkpoint was tuned on."""
        wanted = self.metadata["base_hash"]
        if model.base_hash != wanted:
            message = f"the checkpoint was tuned on {self.metadata['base']} with the hash {wanted[:12]}"
            message += f", but {model.base_id} has {model.base_hash[:12]}"
            hint = "give the base, ControlNet and VAE that it was tuned on (--base, --controlnet, --vae), or tune again"
            raise CheckpointError(message, hint=hint)
        schedule = model.identity()["schedule"]  # base_hash covers only the weights
        for name, tuned in self.metadata.get("schedule", schedule).items():  # older checkpoints lack it
            if name in schedule and tuned != schedule[name]:  # a later version may say more
                message = f"the checkpoint was tuned with {name} {tuned}, but {model.base_id} has {schedule[name]}"
                hint = "undo the change in the base's scheduler_config.json, or in the .yaml beside its file, or tune again"
                raise CheckpointError(message, hint=hint)
        configurations = model.configurations()
        for name, tuned in self.metadata.get("configurations", {}).items():
            if configurations.get(name, tuned) != tuned:  # another version may say more or less
                part, _, entry = name.partition(".")
                message = f"the checkpoint was tuned with another configuration of the {part.replace('_', ' ')}"
                hint = f"undo the change in {part}/config.json ({entry}), give the parts that it was tuned with "
                raise CheckpointError(message, hint=f"{hint}(--base, --controlnet, --vae), or tune again")

    def load_model(
        self,
        *,
        base: str | None = None,
        controlnet: str | None = None,
        vae: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PoseModel:
        """Load the base and put the tuned tensors into it.

        Args: base, controlnet, vae: where they are now, if they moved. dtype: of all weights.
        Raises: ModelError if the base cannot be loaded; CheckpointError if it is another base.
        """
        metadata = self.metadata
        model = load_base(base or metadata["base"], controlnet=controlnet or metadata["controlnet"],
                          vae=vae or metadata["vae"], norm_scope=metadata["norm_scope"], dtype=dtype)  # fmt: skip
        return self._tune(model, dtype)

    def load_outline(
        self, *, base: str | None = None, controlnet: str | None = None, vae: str | None = None
    ) -> PoseModel:
        """As `load_model`, but only what was tuned has values: all else is on the meta device (see `load_outline`).

        The base's weights are not read, so that they are those of `base_hash` is taken for granted.
        """
        metadata = self.metadata
        model = load_outline(base or metadata["base"], metadata["base_hash"], metadata["norm_scope"],
                             controlnet=controlnet or metadata["controlnet"], vae=vae or metadata["vae"])  # fmt: skip
        return self._tune(model, torch.float32)

    def _tune(self, model: PoseModel, dtype: torch.dtype) -> PoseModel:
        """Put the tuned tensors into the base."""
        self.require_base(model)
        if self.metadata.get("small_decoder") is not None:
            model.small_decoder = self._small_decoder(dtype)
        apply_tensors(model, self.tensors)
        return model

    def _small_decoder(self, dtype: torch.dtype) -> nn.Module:
        """Make the distilled small decoder; the checkpoint holds all its weights and its configuration."""
        prefix = "small_decoder."
        tensors = {name.removeprefix(prefix): tensor.to(dtype)
                   for name, tensor in self.tensors.items() if name.startswith(prefix)}  # fmt: skip
        try:
            module = empty_small_decoder(self.metadata["small_decoder"])
            module.load_state_dict(tensors, assign=True)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError("the checkpoint is damaged: its small decoder is not complete",
                                  hint="tune again") from error  # fmt: skip
        return module.eval().requires_grad_(False)

    def names_digest(self) -> str:
        """Return the SHA-256 of the names of what is tuned of the base."""
        return sha256_json(sorted(name for name in self.tensors if not name.startswith("small_decoder.")))

    def digest(self) -> str:
        """Return the SHA-256 of the content. It is the same before saving and after loading, on every machine."""
        arrays = {"frames": torch.from_numpy(self.frames), "keypoints": torch.from_numpy(self.poses.keypoints)}
        tensors = {**self.tensors, **arrays}
        hashes = {name: [str(tensor.dtype), list(tensor.shape), _sha256(tensor)] for name, tensor in tensors.items()}
        metadata = {name: value for name, value in self.metadata.items() if name not in ("versions", "format_version")}
        return sha256_json({"tensors": hashes, "fps": self.poses.fps, "metadata": metadata})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}", hint="make one: posecrafter-rt tune")
    with path.open("rb") as file:
        start = file.read(2)
    # safetensors begin with the length of their header, whose first two bytes can be any of these, too
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and not begins_as_safetensors(path):
        raise CheckpointError(f"{path} is a PyTorch pickle, which could run code, not a checkpoint of this package",
                              hint="make one: posecrafter-rt tune")  # fmt: skip
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            header = json.loads(text) if text is not None else None
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this package",
                                      hint="make one: posecrafter-rt tune")  # fmt: skip
            if header.get("format_version") != FORMAT_VERSION:
                message = (
                    f"{path} has format version {header.get('format_version')}, this release reads {FORMAT_VERSION}"
                )
                raise CheckpointError(message, hint="use the release that wrote it, or tune again")
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint: {first_line(error)}",
                              hint="copy it again, or make one: posecrafter-rt tune") from error  # fmt: skip


def _sha256(tensor: Tensor) -> str:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return sha256(array).hexdigest()

"""The inversion cache: one file per inverted latent, named by a hash of exactly what it depends on.

Layer 5.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from posecrafter_rt.atomic import atomic_path, sha256_json
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.tensor_file import save_tensors

log = logging.getLogger(__name__)


def inversion_key(
    manifest: dict[str, Any], schedule: DDIMSchedule, options: RenderOptions, *, frame: int, prompt: str,
    precision: str, threads: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Return everything that an inversion depends on, and nothing else (METHOD).

    Args: manifest: of the engine. options: with nothing left to the base. frame: the training frame that is inverted.
        prompt: the source prompt. precision: the inversion's. threads: how many, if rounding depends on it; else none.
    """
    assert options.inversion_substeps is not None
    steps = schedule.inversion_pairs(options.num_inference_steps, options.inversion_substeps, options.start_step)
    return {
        **{name: manifest[name] for name in ("checkpoint", "base_hash", "backend", "norm_scope", "scheduler", "size",
                                             "libraries")},
        "loras": [[lora["sha256"], lora["scale"]] for lora in manifest.get("loras", [])],
        "source_prompt": prompt, "frame": frame, "steps": steps.tolist(), "precision": precision,
        "conditioning_scale": options.conditioning_scale, **({"threads": list(threads)} if threads else {}),
    }  # fmt: skip


class InversionCache:
    """Inverted latents in a folder that may be emptied at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        """Return the file for a key of JSON values."""
        return self.folder / f"{sha256_json(key)}.safetensors"

    def load(self, key: dict[str, Any]) -> Tensor | None:
        """Load inverted latents (4, h, w) float32; None if they are absent or damaged (they are then computed anew)."""
        try:
            with safe_open(self.path(key), "pt") as file:
                inverted_latents, digest = file.get_tensor("inverted_latents"), (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        return inverted_latents if digest == _digest(inverted_latents) else None

    def save(self, key: dict[str, Any], inverted_latents: Tensor) -> None:
        """Write atomically. If that fails, a warning is logged, and a later render computes the latents again."""
        try:
            self.folder.mkdir(exist_ok=True)
            with atomic_path(self.path(key)) as temporary:
                tensors = {"inverted_latents": inverted_latents}
                save_tensors(tensors, temporary, {"sha256": _digest(inverted_latents)})
        except (PoseCrafterError, OSError) as error:
            log.warning("the inversion is not kept for the next time: %s", error)


def _digest(tensor: Tensor) -> str:
    return sha256(tensor.cpu().numpy().tobytes()).hexdigest()

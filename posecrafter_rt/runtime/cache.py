"""The inversion cache: one inverted latent a file, under a hash of exactly what it depends on.

Layer 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posecrafter_rt.atomic import atomic_path, sha256_json


class InversionCache:
    """Inverted latents in a folder that may be emptied at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        """The file for a key of JSON values."""
        return self.folder / f"{sha256_json(key)}.safetensors"

    def load(self, key: dict[str, Any]) -> Tensor | None:
        """The inverted latents (4, h, w) float32, or None when absent or unreadable (then they are computed anew)."""
        try:
            return load_file(self.path(key))["inverted_latents"]
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, key: dict[str, Any], inverted_latents: Tensor) -> None:
        """Write atomically. Raises DiskFull."""
        self.folder.mkdir(exist_ok=True)
        with atomic_path(self.path(key)) as temporary:
            save_file({"inverted_latents": inverted_latents.contiguous()}, temporary)

"""What a base recommends for tuning and rendering: `posecrafter.json` beside its networks, else the paper's values.

Layer 3: plain data.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.blocks import NormScope

SETTINGS_FILE = "posecrafter.json"


@dataclass(frozen=True)
class BaseSettings:
    """Default settings of a base. The defaults of this class are PoseCrafter's for Stable Diffusion 1.5.

    size: (height, width) in pixels. norm_scope: whether the residual blocks' GroupNorm takes its statistics per frame
    or over a clip. prompt: that of the tuned person. trainable: regular expressions; a parameter is trained if one of
    them is found in its `unet.…` or `controlnet.…` name. steps: None follows Eq. 20. minibatch: frames per step.
    learning_rate_decay: whether the learning rate falls during tuning. shared_noise: share (0..1) of training steps
    whose frames have part of their noise in common, as frames have in rendering. timestep_exponent: tuning draws
    timesteps with density proportional to t^exponent; 0 is uniform, larger values favour noisy timesteps.
    decoder_steps, decoder_learning_rate: for the autoencoder's decoder, tuned after the denoiser; the paper: 0 steps.
    small_decoder_steps, small_decoder_learning_rate: for a small decoder distilled from that; 0 steps: none is made.
    inversion_substeps, strength: defaults of the options that `RenderOptions` leaves to the base.
    Raises: ModelError for a value out of range.
    """

    size: tuple[int, int] = (512, 512)
    norm_scope: NormScope = "frame"
    prompt: str = "a person"
    trainable: tuple[str, ...] = (r"\.attn1\.to_out\.", r"\.attn_temp\.", r"\.conv_temp\.")
    learning_rate: float = 0.003
    steps: int | None = None
    weight_decay: float = 0.01
    minibatch: int = 8
    learning_rate_decay: bool = False
    shared_noise: float = 0.0
    timestep_exponent: float = 0.0
    decoder_steps: int = 0
    decoder_learning_rate: float = 1e-3
    small_decoder_steps: int = 0
    small_decoder_learning_rate: float = 2e-3
    inversion_substeps: int = 1
    strength: float = 1.0

    def __post_init__(self) -> None:
        valid = {
            "size": len(self.size) == 2 and all(_is_count(side) for side in self.size),
            "norm_scope": self.norm_scope in get_args(NormScope),
            "prompt": isinstance(self.prompt, str),
            "trainable": bool(self.trainable) and all(_is_pattern(pattern) for pattern in self.trainable),
            "learning_rate": _is_number(self.learning_rate) and self.learning_rate > 0,
            "steps": self.steps is None or _is_count(self.steps),
            "weight_decay": _is_number(self.weight_decay) and self.weight_decay >= 0,
            "minibatch": _is_count(self.minibatch),
            "learning_rate_decay": isinstance(self.learning_rate_decay, bool),
            "shared_noise": _is_number(self.shared_noise) and 0 <= self.shared_noise <= 1,
            "inversion_substeps": _is_count(self.inversion_substeps),
            "strength": _is_number(self.strength) and 0 < self.strength <= 1,
            "timestep_exponent": _is_number(self.timestep_exponent) and self.timestep_exponent >= 0,
            "decoder_steps": type(self.decoder_steps) is int and self.decoder_steps >= 0,
            "decoder_learning_rate": _is_number(self.decoder_learning_rate) and self.decoder_learning_rate > 0,
            "small_decoder_steps": type(self.small_decoder_steps) is int and self.small_decoder_steps >= 0,
            "small_decoder_learning_rate": _is_number(self.small_decoder_learning_rate)
            and self.small_decoder_learning_rate > 0,
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ModelError(f"the setting {name} is {getattr(self, name)!r}", hint=f"mend it in {SETTINGS_FILE}")

    @property
    def recommended(self) -> dict[str, Any]:
        """Values of the options that `RenderOptions` leaves to the base."""
        return {"inversion_substeps": self.inversion_substeps, "strength": self.strength}

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings: the content of `posecrafter.json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Any) -> BaseSettings:
        """The inverse of `to_json`; absent settings take defaults. Raises: ModelError for unknown or wrong ones."""
        known = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or (unknown := sorted(set(data) - known)):
            wrong = ", ".join(unknown) if isinstance(data, dict) else type(data).__name__
            raise ModelError(f"{SETTINGS_FILE} holds {wrong}", hint=f"its settings are {', '.join(sorted(known))}")
        for name in ("size", "trainable"):
            if name in data and not isinstance(data[name], list):
                raise ModelError(f"the setting {name} is {data[name]!r}", hint=f"give a list in {SETTINGS_FILE}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)

    @classmethod
    def load(cls, folder: Path) -> BaseSettings:
        """Read `posecrafter.json` in `folder`, or return the defaults if there is none."""
        path = folder / SETTINGS_FILE
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}", hint="mend its JSON, or remove it") from error
        return cls.from_json(data)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True

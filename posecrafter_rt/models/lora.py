"""Read LoRA files with kohya-ss' or diffusers' names, check them against a model and fuse them into its weights.

Layer 3: needs no peft. The names come from the model itself, so there is no table of blocks to keep up to date.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from posecrafter_rt.atomic import sha256_file
from posecrafter_rt.errors import CheckpointError
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.weights import is_safetensors, read_weights

HINT = "give a LoRA for Stable Diffusion 1.5, under kohya-ss' or diffusers' names"

# x.lora_down (kohya-ss), x.lora_A (peft), x.lora.down, x.lora_linear_layer.down, x_lora.down (diffusers)
_FACTOR = re.compile(r"(?P<layer>.+?)(?:[._]lora[._]|\.lora_linear_layer\.)(?P<side>down|up|A|B)\.weight")
_ATTENTION = re.compile(r"\.(to_[qkv]|to_out)(\.0)?$")
_PROJECTION = re.compile(r"\.(q|k|v|out)_proj$")
_SETTINGS = "lora_adapter_metadata"  # diffusers keeps peft's configuration under this key in a file's header
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
                "lora_mid.": "LoCon with a Tucker core"}  # fmt: skip
_UNKNOWN_SETTINGS = ("alpha_pattern", "use_rslora", "use_dora")  # each changes what is added to a weight


@dataclass(frozen=True)
class Lora:
    """A LoRA file to fuse, and its strength. Raises: CheckpointError unless `scale` is finite."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise CheckpointError(f"the scale of {self.path} is {self.scale}", hint="give a number, such as 0.8")


@dataclass(frozen=True)
class LoraLayer:
    """The update of one weight. down: (rank, in, …); up: (out, rank, 1…); alpha: None means the rank."""

    down: Tensor
    up: Tensor
    alpha: float | None

    def fits(self, shape: torch.Size) -> bool:
        """Return whether it can be added to a weight of that shape. Trailing 1s of 1×1 convolutions are optional."""
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        is_pair = min(len(down), len(up)) >= 2 and up[1] == down[0] > 0 and set(up[2:]) <= {1}
        return is_pair and _without_ones((up[0], *down[1:])) == _without_ones(tuple(shape))

    def is_finite(self) -> bool:
        """Return whether every number in it is finite."""
        factors = (factor.float() for factor in (self.down, self.up))
        return all(torch.isfinite(factor).all() for factor in factors) and math.isfinite(self.alpha or 0)

    def delta(self, scale: float) -> Tensor:
        """Return scale · alpha / rank · up @ down, float32 (out, in · kernel height · kernel width)."""
        rank = len(self.down)
        factor = scale * (rank if self.alpha is None else self.alpha) / rank
        return factor * (self.up.flatten(1).float() @ self.down.flatten(1).float())


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file's content. layers: by the names that the file uses."""

    lora: Lora
    sha256: str
    layers: dict[str, LoraLayer]

    def describe(self) -> dict[str, Any]:
        """Return what an engine's manifest records: the file's name, its hash and the scale."""
        return {"file": self.lora.path.name, "sha256": self.sha256, "scale": float(self.lora.scale)}


def read_lora(lora: Lora) -> LoraFile:
    """Read a LoRA file (.safetensors, or what torch.save wrote, without running the code that a pickle may hold).

    Raises: CheckpointError if the file is missing, truncated or a pickle that holds code; if it has no pair of factors,
        a tensor that is neither a factor nor an alpha (as DoRA, LoHa and LoKr have), a setting of peft that is not
        supported, or a number that is not finite.
    """
    tensors = read_weights(lora.path, CheckpointError)
    settings = _read_settings(lora.path)
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    foreign = []
    for name, tensor in sorted(tensors.items()):
        if match := _FACTOR.fullmatch(name):
            pairs.setdefault(match["layer"], {})["down" if match["side"] in ("down", "A") else "up"] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = tensor
        else:
            foreign.append(name)
    foreign += [f"{layer}.alpha" for layer in alphas if layer not in pairs]
    foreign += [f"{layer} up or down alone" for layer, pair in pairs.items() if len(pair) == 1]
    for mark, kind in _OTHER_KINDS.items():
        marked = [name for name in foreign if mark in name]
        _refuse(lora.path, f"is a {kind}, which is not supported: it holds {{}}", marked)
    _refuse(lora.path, "holds {}, which is no part of a LoRA", foreign)
    if not pairs:
        raise CheckpointError(f"{lora.path} holds no LoRA: it has no tensors", hint=HINT)
    layers = {}
    for layer, pair in pairs.items():
        alpha = alphas[layer].item() if layer in alphas else settings.get(f"{layer.partition('.')[0]}.lora_alpha")
        layers[layer] = LoraLayer(**pair, alpha=alpha)
    broken = [name for name, layer in layers.items() if not layer.is_finite()]
    _refuse(lora.path, "has numbers that are not finite in {}", broken)
    return LoraFile(lora, sha256_file(lora.path), layers)


def fuse_loras(model: PoseModel, files: Sequence[LoraFile]) -> None:
    """Add LoRAs to the U-Net and the text encoder, in place and in order: W += scale · alpha / rank · up @ down.

    Call this before `PoseModel.fold`. The update is computed in float32. A tuned attn1 gets it on top of its tuning.
    The ControlNet and the temporal layers get nothing, although the latter began as copies of attn1.
    Raises: CheckpointError, before anything is changed, if the model lacks a layer or has it in another shape.
    """
    weights = _weights(model)
    for file in files:
        path, layers = file.lora.path, file.layers
        _refuse(path, "addresses {}, which the model lacks", [name for name in layers if name not in weights])
        misfits = [
            f"{name} as {tuple(layer.up.shape)} × {tuple(layer.down.shape)}, the model as {tuple(weights[name].shape)}"
            for name, layer in layers.items()
            if not layer.fits(weights[name].shape)
        ]
        _refuse(path, "has {}", misfits)
    with torch.no_grad():
        for file in files:
            for name, layer in file.layers.items():
                if not weights[name].is_meta:  # one that the engine to refit holds, with the same LoRA in it
                    weights[name].add_(layer.delta(file.lora.scale).reshape(weights[name].shape))


def _read_settings(path: Path) -> dict[str, Any]:
    """Return peft's configuration, with keys `unet.…` and `text_encoder.…`; empty if the file has none."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_SETTINGS, "{}")
    try:
        settings: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {_SETTINGS}", hint=HINT) from error
    unknown = [name for name in sorted(settings) if name.endswith(_UNKNOWN_SETTINGS) and settings[name]]
    _refuse(path, "needs {}, which is not supported", unknown)
    return settings


def _weights(model: PoseModel) -> dict[str, Tensor]:
    """Return the weights that LoRAs may change, by every name that a file may use for them."""
    weights: dict[str, Tensor] = {}
    for role, network in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        for path, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and "_temp" not in path:
                weights |= dict.fromkeys(_names(role, path), module.weight)
    return weights


def _names(role: str, path: str) -> Iterator[str]:
    if role == "text_encoder":
        path = path.removeprefix("text_model.")  # transformers 5.6 dropped this level; files keep it
        first = _PROJECTION.sub(r".to_\1", path)  # as diffusers named it in its first LoRAs
        yield from (f"text_encoder.{path}", f"text_encoder.text_model.{path}", f"text_encoder.text_model.{first}")
        yield f"lora_te_text_model_{path.replace('.', '_')}"
        return
    yield from (f"unet.{path}", f"lora_unet_{path.replace('.', '_')}")
    if _ATTENTION.search(path):  # diffusers' attention processors, at first without the prefix
        processor = _ATTENTION.sub(r".processor.\1", path)
        yield from (f"unet.{processor}", processor)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _refuse(path: Path, message: str, problems: Sequence[str]) -> None:
    if problems:
        more = f" ({len(problems)} such in all)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path} {message.format(problems[0])}{more}", hint=HINT)

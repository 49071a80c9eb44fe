"""Weight files as plain tensors, and networks from the original one-file layout, without a network connection.

Layer 3: the configuration that such files lack comes from `sd15/`; a pickle's code is never run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from posecrafter_rt.errors import CheckpointError, ModelError
from posecrafter_rt.models.sources import Component, first_line, reading

_CONVERTERS: dict[type, Callable[..., dict[str, Tensor]]] = {
    UNet2DConditionModel: convert_ldm_unet_checkpoint,
    ControlNetModel: convert_controlnet_checkpoint,
    AutoencoderKL: convert_ldm_vae_checkpoint,
}
_TEXT_PREFIX = "cond_stage_model.transformer."


def read_weights(path: Path, error_type: type[ModelError] | type[CheckpointError] = ModelError) -> dict[str, Tensor]:
    """Read a weight file (.safetensors, or what torch.save wrote) as tensors by name, mapped into memory.

    Raises: error_type: missing, truncated, without tensors, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise error_type(f"there is no file {path}", hint="check the path")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise error_type(f"{path} is damaged, or a pickle that could run code: it holds more than tensors",
                         hint="take the .safetensors form of these weights") from error  # fmt: skip
    except Exception as error:  # on foreign bytes the restricted unpickler trips in any way: IndexError, AssertionError
        message = f"{path} is truncated or no weight file: {first_line(error)}"
        raise error_type(message, hint="fetch or copy it again") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise error_type(f"{path} holds no tensors by name", hint="give a file of a network's weights")
    return tensors


def load_single_file(cls: type, part: Component, dtype: torch.dtype) -> Any:
    """A diffusers network from the file of `part`, in the original layout or diffusers' own; every tensor of it."""
    weights = read_weights(part.files[0])
    with reading(part.files[0]):
        config = cls.load_config(part.configs / part.role, local_files_only=True)  # type: ignore[attr-defined]
        with torch.device("meta"):
            model = cls.from_config(config)  # type: ignore[attr-defined]
        if not set(model.state_dict()) <= set(weights):
            converted = _CONVERTERS[cls](dict(weights), config)
            weights = {name: tensor for name, tensor in converted.items() if tensor is not None}
    fill(model, weights, part, dtype)
    return model


def load_text_encoder(part: Component, dtype: torch.dtype) -> CLIPTextModel:
    """The CLIP text encoder of a folder or of a single file."""
    weights = {name: tensor for path in part.files for name, tensor in read_weights(path).items()}
    if part.folder is None:
        weights = {
            name.removeprefix(_TEXT_PREFIX): tensor for name, tensor in weights.items() if name.startswith(_TEXT_PREFIX)
        }
    with reading(part.files[0]):
        config = CLIPTextConfig.from_pretrained(part.folder or part.configs / part.role, local_files_only=True)
        model: Any = CLIPTextModel(config)
    # transformers 5.6 dropped the level `text_model`; files of either kind are met, under either version.
    expected = {name.removeprefix("text_model."): name for name in model.state_dict()}
    named = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    fill(model, {expected[name]: tensor for name, tensor in named.items() if name in expected}, part, dtype)
    return model.to(dtype)  # the buffers, too


def fill(model: torch.nn.Module, weights: Mapping[str, Tensor], part: Component, dtype: torch.dtype) -> None:
    """Give a model (perhaps on the meta device) its weights, one by one in `dtype`.

    Raises: ModelError unless all of them are there in their shapes.
    """
    expected = model.state_dict()
    present = [name for name in expected if name in weights]
    differing = [name for name in present if weights[name].shape != expected[name].shape]
    part.check_complete(set(expected) - set(present), differing)
    # Copied, because what is only mapped from a file changes when the file does.
    converted = {
        name: weights[name].to(dtype if expected[name].is_floating_point() else expected[name].dtype, copy=True)
        for name in expected
    }
    model.load_state_dict(converted, assign=True)

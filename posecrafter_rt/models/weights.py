"""Read weight files, in diffusers' layout or the original one, as plain tensors, and fill networks with them.

Layer 3: the configuration that single files lack comes from `sd15/`. Nothing is downloaded; no code of a pickle runs.
"""

from __future__ import annotations

import json
import logging
import re
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from posecrafter_rt.errors import CheckpointError, ModelError, first_line
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.models.sources import Base, Component, reading

_CONVERTERS: dict[type, Callable[..., dict[str, Tensor]]] = {
    UNet2DConditionModel: convert_ldm_unet_checkpoint,
    ControlNetModel: convert_controlnet_checkpoint,
    AutoencoderKL: convert_ldm_vae_checkpoint,
}
_V_PARAMETERIZATION = re.compile(r"^\s*parameterization:\s*[\"']?v[\"']?\s*(#.*)?$", re.MULTILINE)
_TEXT_PREFIX = "cond_stage_model.transformer."
# diffusers' names for the VAE's attention before 0.18; the hub still holds such files.
_LEGACY_ATTENTION = re.compile(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.")
_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")  # in torch's message on a pickle that it refuses

log = logging.getLogger(__name__)


class _Ignored:
    """Stands for what training puts beside the weights: made from anything, it keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Of PyTorch Lightning's files, such as Stable Diffusion's own .ckpt: its states of callbacks, with numpy's numbers.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
]


def read_weights(path: Path, error_type: type[ModelError] | type[CheckpointError] = ModelError) -> dict[str, Tensor]:
    """Read a weight file (safetensors, or what torch.save wrote) as tensors by name, memory-mapped if possible.

    Raises: error_type if the file is missing or truncated, or a pickle without tensors or with more than tensors.
    """
    if not path.is_file():
        raise error_type(f"there is no file {path}", hint="check the path")
    try:
        if is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        more = f"{found[1]}, which is no tensor" if found else "more than tensors"
        raise error_type(f"{path} is damaged, or a pickle that could run code: it holds {more}",
                         hint="take the .safetensors form of these weights, or, if you trust the file, load it in "
                         "PyTorch and save its state_dict alone") from error  # fmt: skip
    except Exception as error:  # on foreign bytes the restricted unpickler raises almost anything, such as IndexError
        message = f"{path} is truncated or no weight file: {first_line(error)}"
        raise error_type(message, hint="fetch or copy it again") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise error_type(f"{path} holds no tensors by name", hint="give a file of a network's weights")
    return tensors


def is_safetensors(path: Path) -> bool:
    """Return whether a file is called .safetensors, or begins as they do: our .ckpt files, and those that were renamed."""
    return path.suffix.lower() == ".safetensors" or begins_as_safetensors(path)


def begins_as_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do, with the length of a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def read_scheduler_config(base: Base) -> dict[str, Any]:
    """Return diffusers' configuration of a base's noise schedule.

    A single file has none. It is taken to predict the noise, unless one of these says that it predicts v: an original
    configuration of its name beside it (.yaml), a tensor called `v_pred`, or Model Spec's metadata.
    Raises: ModelError if it is unreadable or has settings that `DDIMSchedule` lacks, or if a single file's schedule was
        rescaled (then it has a tensor called `ztsnr`).
    """
    with reading(base.base_id):
        text = (base.configs / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        DDIMSchedule.from_config(config)  # raises now, before minutes of tuning or building
        if base.file is None:
            return config
        names, metadata = _read_header(base.file)
        original = base.file.with_suffix(".yaml")
        says_v = original.is_file() and _V_PARAMETERIZATION.search(original.read_text(encoding="utf-8"))
    if "ztsnr" in names:
        raise ModelError(f"{base.file} was trained on a schedule rescaled to end in pure noise, which is not supported",
                         hint="use a base model without ztsnr")  # fmt: skip
    if says_v or "v_pred" in names or metadata.get("modelspec.prediction_type") == "v":
        config["prediction_type"] = "v_prediction"
    return config


def load_network(cls: Any, part: Component, dtype: torch.dtype) -> Any:
    """Load a diffusers network from a folder or a single file, which must hold every tensor of it."""
    weights = {_LEGACY_ATTENTION.sub(_modern, name): tensor for name, tensor in _read_all(part).items()}
    model = empty_network(cls, part.config_folder)
    if part.is_single_file and not set(model.state_dict()) <= set(weights):
        with reading(part.location):
            weights = _convert(cls, weights, cls.load_config(part.config_folder, local_files_only=True), part)
    fill(model, weights, part, dtype)
    return model


def empty_network(cls: Any, config_folder: Path) -> Any:
    """Make a network of diffusers, or transformers' text encoder, on the meta device."""
    with reading(config_folder), torch.device("meta"):
        if cls is CLIPTextModel:
            return cls(CLIPTextConfig.from_pretrained(config_folder, local_files_only=True))
        return cls.from_config(cls.load_config(config_folder, local_files_only=True))


def _convert(cls: type, weights: Mapping[str, Tensor], config: Any, part: Component) -> dict[str, Tensor]:
    """Return the tensors of a network in the original layout under diffusers' names."""
    if "difference" in weights:
        raise ModelError(f"{part.location} holds differences from Stable Diffusion's weights, not a ControlNet's own",
                         hint="use lllyasviel/control_v11p_sd15_openpose")  # fmt: skip
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("model_ema.")}
    if part.role == "unet" and any(name.startswith("model_ema.diffusion_model") for name in weights):
        # As diffusers does, and what is made for further training; its own warning names an option of its script.
        log.warning("%s also holds averaged weights of the U-Net (EMA), which are not used", part.location)
    converted = _CONVERTERS[cls](own, config)
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def load_text_encoder(part: Component, dtype: torch.dtype) -> CLIPTextModel:
    """Load the CLIP text encoder from a folder or a single file."""
    weights = _read_all(part)
    if part.is_single_file:
        names = [name for name in weights if name.startswith(_TEXT_PREFIX)]
        weights = {name.removeprefix(_TEXT_PREFIX): weights[name] for name in names}
    with reading(part.location):
        config = CLIPTextConfig.from_pretrained(part.config_folder, local_files_only=True)
        model: Any = CLIPTextModel(config)
    # transformers 5.6 dropped the level `text_model`. Files with and without it occur, under either version.
    expected = {name.removeprefix("text_model."): name for name in model.state_dict()}
    named = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    fill(model, {expected[name]: tensor for name, tensor in named.items() if name in expected}, part, dtype)
    return model.to(dtype)  # the buffers, too


def _read_header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Return the tensors' names, and the metadata, which only safetensors have."""
    if not is_safetensors(path):
        return set(read_weights(path)), {}
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata() or {}


def _read_all(part: Component) -> dict[str, Tensor]:
    return {name: tensor for path in part.files for name, tensor in read_weights(path).items()}


def _modern(match: re.Match[str]) -> str:
    modern = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{match[1]}{modern[match[2]]}."


def fill(model: torch.nn.Module, weights: Mapping[str, Tensor], part: Component, dtype: torch.dtype) -> None:
    """Give a model (perhaps on the meta device) its weights, converted one by one to `dtype`.

    Raises: ModelError if a weight is missing or has another shape.
    """
    expected = model.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in weights]
    problems += [f"holds {name} in another shape" for name, tensor in weights.items()
                 if name in expected and tensor.shape != expected[name].shape]  # fmt: skip
    if problems:
        more = f" ({len(problems)} tensors in all)" if len(problems) > 1 else ""
        raise ModelError(f"the {part.role} in {part.location} {problems[0]}{more}",
                         hint=f"use a Stable Diffusion 1.5 {part.role} that is complete")  # fmt: skip
    # Copied, because mapped memory would change with the file.
    converted = {
        name: weights[name].to(dtype if expected[name].is_floating_point() else expected[name].dtype, copy=True)
        for name in expected
    }
    model.load_state_dict(converted, assign=True)

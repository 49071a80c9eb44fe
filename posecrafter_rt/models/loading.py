"""Load base models from a diffusers folder, the hub or single files as one `PoseModel`; strict about every tensor.

Layer 3: also loads tuned tensors into a model, and reads ControlVideo's weight files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from posecrafter_rt.errors import CheckpointError, ModelError, first_line
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.models.blocks import NormScope, check_norm_scope
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser, fold_vae, folded_name
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.settings import BaseSettings
from posecrafter_rt.models.small_decoder import describe_config, fold_small_decoder
from posecrafter_rt.models.sources import (
    PARTS,
    Base,
    Component,
    config_folders,
    hash_files,
    is_of_writer,
    lasting_id,
    locate_base,
    locate_component,
    reading,
)
from posecrafter_rt.models.tokenizer import warn_of_cuts
from posecrafter_rt.models.unet import VideoUNet, check_options
from posecrafter_rt.models.weights import (
    empty_network,
    load_network,
    load_text_encoder,
    read_scheduler_config,
    read_weights,
)
from posecrafter_rt.spec import Architecture

CONTROLNET_HINT = "give --controlnet lllyasviel/control_v11p_sd15_openpose, or a folder or file that holds it"
_CLASSES: dict[str, Any] = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
_KINDS = {8: "an InstructPix2Pix model", 9: "an inpainting model"}  # by the channels that their U-Nets read
_SCALING_FACTOR = 0.18215  # of Stable Diffusion 1.5's VAE
_VAE_HINT = "use a VAE of the base's kind; for Stable Diffusion 1.5 stabilityai/sd-vae-ft-mse is one"


@dataclass
class PoseModel:
    """All networks of a base as torch modules, in evaluation mode and without gradients.

    base_id, controlnet_id, vae_id: with these, `load_base` finds them again from any working directory; None: the
    base's own is used. base_hash: SHA-256 over the weights of all four networks.
    small_decoder: that of a tuned person, or one that the user gave; a base has none.
    tuned: the names of those parameters that differ between persons, as in `named_parameters`.
    """

    unet: VideoUNet
    controlnet: VideoControlNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizerFast
    scheduler_config: dict[str, Any]
    base_id: str
    base_hash: str
    settings: BaseSettings
    controlnet_id: str | None = None
    vae_id: str | None = None
    small_decoder: nn.Module | None = None
    tuned: frozenset[str] = frozenset()

    def identity(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's metadata that name its base; `schedule` is `DDIMSchedule.learned`."""
        return {"base": self.base_id, "controlnet": self.controlnet_id, "vae": self.vae_id, "base_hash": self.base_hash,
                "configurations": self.configurations(),
                "schedule": DDIMSchedule.from_config(self.scheduler_config).learned}  # fmt: skip

    def configurations(self) -> dict[str, Any]:
        """Return what the networks' configurations say, in JSON's types, by names such as `vae.scaling_factor`.

        Defaults are included: whether a file gives them depends on what wrote it.
        """
        configs = {role: describe_config(getattr(self, role)) for role in _CLASSES}
        configs["text_encoder"] = self.text_encoder.config.to_dict()
        entries = ((f"{role}.{name}", value) for role, config in configs.items()
                   for name, value in config.items() if not is_of_writer(name))  # fmt: skip
        said: dict[str, Any] = json.loads(json.dumps(dict(entries)))
        return said

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules by the prefixes of their parameters' names."""
        names = ("unet", "controlnet", "vae", "text_encoder", "small_decoder")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def networks(self) -> dict[str, nn.Module]:
        """Return every network by its name in `spec`; they share these modules' weights."""
        return build_networks(**self.modules())  # type: ignore[arg-type]

    def architecture(self) -> Architecture:
        """Return the sizes that fix every network's tensor shapes."""
        return describe_architecture(**self.modules())  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PoseModel:
        """Convert and move every module in place; return self."""
        for module in self.modules().values():
            # nn.Module's own method: diffusers' override warns about a float32 list that AutoencoderKL leaves empty
            nn.Module.to(module, device=device, dtype=dtype)
        return self

    def fold(self) -> None:
        """Fold pairs of linear maps into one (see `folding`), in place; for inference only.

        `tuned` has the folded names then, and all of the small decoder's.
        """
        fold_denoiser(self.unet)
        fold_vae(self.vae)
        if self.small_decoder is not None:
            fold_small_decoder(self.small_decoder)
        tuned = {folded_name(name) for name in self.tuned}
        self.tuned = frozenset(name for name, _ in named_parameters(self)
                               if name in tuned or name.startswith("small_decoder."))  # fmt: skip

    def splits_modules(self) -> bool:
        """Whether a module, or a pair that `fold` makes one of, has weights that are tuned and others that are not.

        Before folding only.
        """
        of_module: dict[str, set[bool]] = {}
        for name, _ in named_parameters(self):
            module = folded_name(name).rpartition(".")[0]
            of_module.setdefault(module, set()).add(name in self.tuned or name.startswith("small_decoder."))
        return any(len(kinds) > 1 for kinds in of_module.values())

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return input_ids int64 (prompts, tokens), padded or cut to the text encoder's length; log what is cut."""
        return tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)


def tokenize(tokenizer: CLIPTokenizerFast, prompts: list[str], num_tokens: int) -> Tensor:
    """Return input_ids int64 (prompts, num_tokens), padded or cut; log what is cut."""
    encoded = tokenizer(prompts, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt")
    warn_of_cuts(prompts, encoded.encodings)
    return encoded.input_ids.to(torch.int64)


def load_base(
    base: str,
    *,
    controlnet: str | None = None,
    vae: str | None = None,
    norm_scope: NormScope | None = None,
    dtype: torch.dtype = torch.float32,
) -> PoseModel:
    """Load a Stable Diffusion 1.5 base, inflated to clips.

    Args:
        base: "embedded"; a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler, optionally controlnet); a
            hub id "owner/name"; or one file in Stable Diffusion's original layout (.safetensors; .ckpt, .pt, .pth and
            .bin are read without running the code that a pickle may hold). A single file needs no network access.
        controlnet, vae: a folder, hub id or file that is used instead of the base's own. Whether the latents of a VAE
            have the base's scale is checked by its config.json, which a file outside a diffusers folder lacks.
        norm_scope: overrides the base's own setting.
        dtype: of all weights. They are converted one by one, so the model is never held twice.
    Raises: ModelError if something is not found, incomplete, of another kind, or a pickle that holds code; if the hub
        cannot be reached; if the base has no ControlNet and none is given; or if norm_scope is unknown. DiskFull.
    """
    found, parts, scheduler_config = locate_parts(base, controlnet, vae)
    settings = found.settings()  # before minutes of reading weights
    scope = norm_scope or settings.norm_scope
    check_norm_scope(scope)
    networks = {role: load_network(cls, parts[role], dtype) for role, cls in _CLASSES.items()}
    networks["text_encoder"] = load_text_encoder(parts["text_encoder"], dtype)
    base_hash = hash_files({role: part.files for role, part in parts.items()})
    ids = {"base_hash": base_hash, "controlnet_id": controlnet and lasting_id(controlnet),
           "vae_id": vae and lasting_id(vae)}  # fmt: skip
    model = _inflate(found, networks, scope, scheduler_config=scheduler_config, settings=settings, **ids)
    model.unet.to(dtype)  # temporal attention is created in float32 as a copy of the loaded attn1
    return model


def load_outline(base: str, base_hash: str, norm_scope: NormScope, **parts: str | None) -> PoseModel:
    """Return a base without its weights, which need not be there: all parameters are on the meta device.

    Args: base_hash: that of the weights that it stands for. base, controlnet and vae (both in `parts`), norm_scope: as
        of `load_base`.
    Raises: ModelError if a configuration is not found or cannot be read, or if norm_scope is unknown; DiskFull.
    """
    check_norm_scope(norm_scope)
    found = locate_base(base)
    classes = {**_CLASSES, "text_encoder": CLIPTextModel}
    networks = {role: empty_network(classes[role], folder) for role, folder in config_folders(found, parts).items()}
    ids = {f"{role}_id": source and lasting_id(source) for role, source in parts.items()}
    with torch.device("meta"):
        return _inflate(found, networks, norm_scope, scheduler_config=read_scheduler_config(found),
                        settings=found.settings(), base_hash=base_hash, **ids)  # fmt: skip


def _inflate(found: Base, networks: Mapping[str, Any], scope: NormScope, **facts: Any) -> PoseModel:
    """Return the model of a base's networks. facts: what else a `PoseModel` takes."""
    model = PoseModel(
        unet=VideoUNet(networks["unet"], scope),
        controlnet=VideoControlNet(networks["controlnet"], scope),
        vae=networks["vae"],
        text_encoder=networks["text_encoder"],
        tokenizer=_load_tokenizer(found.configs / "tokenizer"),
        base_id=found.base_id,
        **facts,
    )
    for module in model.modules().values():
        module.eval().requires_grad_(False)
    _check_tokenizer(model)
    return model


class Located(NamedTuple):
    """A base, the files of each of its networks, and diffusers' configuration of its noise schedule."""

    base: Base
    parts: dict[str, Component]
    scheduler_config: dict[str, Any]

    @property
    def size_multiple(self) -> int:
        """`Architecture.size_multiple`, without loading the networks: each level but the first halves once."""
        configs = [_read_config(role, self.parts[role].config_folder) for role in ("vae", "unet")]
        return int(2 ** sum(len(config["block_out_channels"]) - 1 for config in configs))


def locate_parts(base: str, controlnet: str | None = None, vae: str | None = None) -> Located:
    """Find a base and its networks, and refuse what does not fit together, by their configurations.

    Of the hub, the weights of the base come last: they are the largest.
    Args: as of `load_base`. Raises: ModelError, DiskFull.
    """
    found = locate_base(base)
    scheduler_config = read_scheduler_config(found)
    unet = _read_config("unet", found.config_folder("unet"))
    check_options(unet)
    parts = {} if vae is None else {"vae": locate_component(vae, "vae")}
    _check_vae(found, unet, parts.get("vae"))
    text_channels = _read_config("text_encoder", found.config_folder("text_encoder"))["hidden_size"]
    if text_channels != unet["cross_attention_dim"]:
        message = f"the text encoder gives {text_channels} channels but the U-Net reads {unet['cross_attention_dim']}"
        raise ModelError(message, hint="use a Stable Diffusion 1.x base")
    if controlnet is not None:
        parts["controlnet"] = locate_component(controlnet, "controlnet")
    elif not found.has("controlnet"):
        raise ModelError(f"{base} holds no ControlNet, and without one poses steer nothing", hint=CONTROLNET_HINT)
    _check_controlnet(found, unet, parts.get("controlnet"))
    for role in PARTS:
        if role not in parts:
            parts[role] = found.component(role)
    return Located(found, parts, scheduler_config)


def _read_config(role: str, folder: Path) -> dict[str, Any]:
    """Return a network's configuration, with its class's defaults for what the file leaves out."""
    with reading(folder):
        if role == "text_encoder":
            return CLIPTextConfig.from_pretrained(folder, local_files_only=True).to_dict()
        cls = _CLASSES[role]
        defaults = {name: parameter.default for name, parameter in signature(cls.__init__).parameters.items()}
        config = {**defaults, **cls.load_config(folder, local_files_only=True)}
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in config.items()
        }  # as in JSON


def _check_vae(base: Base, unet: Mapping[str, Any], given: Component | None) -> None:
    """Raise ModelError if the VAE, the base's own or the one given, does not make the latents that the U-Net knows."""
    vae = _read_config("vae", base.config_folder("vae") if given is None else given.config_folder)
    made, read = vae["latent_channels"], unet["in_channels"]
    if made != read:
        message = f"the VAE makes {made} channels but the U-Net reads {read}"
        if read in _KINDS:
            raise ModelError(f"{message}, as {_KINDS[read]} does", hint="use the model that it was made from")
        raise ModelError(message, hint=_VAE_HINT)
    has_own = base.folder is None or base.has("vae")
    own = _read_config("vae", base.config_folder("vae"))["scaling_factor"] if has_own else _SCALING_FACTOR
    if vae["scaling_factor"] != own:
        message = f"the VAE's scaling_factor is {vae['scaling_factor']} but the base's own has {own}"
        raise ModelError(message, hint=_VAE_HINT)


def _check_controlnet(base: Base, unet: Mapping[str, Any], given: Component | None) -> None:
    folder = base.config_folder("controlnet") if given is None else given.config_folder
    controlnet = _read_config("controlnet", folder)
    check_options(controlnet)
    for name in ("block_out_channels", "cross_attention_dim", "in_channels", "layers_per_block"):
        if unet[name] != controlnet[name]:
            raise ModelError(f"the U-Net's {name} is {unet[name]} but the ControlNet's is {controlnet[name]}",
                             hint="use a ControlNet that was trained for this base; for Stable Diffusion 1.5 "
                             "lllyasviel/control_v11p_sd15_openpose is one")  # fmt: skip


def _load_tokenizer(folder: Path) -> CLIPTokenizerFast:
    names = [["tokenizer.json"], ["vocab.json", "merges.txt"]]
    if not any(all((folder / name).is_file() for name in alternative) for alternative in names):
        # transformers would build a tokenizer without a vocabulary from it.
        raise ModelError(f"{folder} has no vocab.json and merges.txt", hint="copy the base's tokenizer folder again")
    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        message = f"the tokenizer in {folder} cannot be read: {first_line(error)}"
        raise ModelError(message, hint="copy the base's tokenizer folder again") from error


def _check_tokenizer(model: PoseModel) -> None:
    if len(model.tokenizer) > model.text_encoder.config.vocab_size:
        message = (
            f"the tokenizer has {len(model.tokenizer)} words, the text encoder {model.text_encoder.config.vocab_size}"
        )
        raise ModelError(message, hint="take both from one base")


def named_parameters(model: PoseModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names (`unet.…`, `vae.…`) and parameters of all modules but the text encoder, in a fixed order."""
    for prefix, module in model.modules().items():
        if prefix != "text_encoder":
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter


def apply_tensors(model: PoseModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy tuned tensors into a model in place, converted to its dtype; they are its `tuned` then.

    On an error nothing is copied. A parameter on the meta device is given memory.

    Args: tensors: by the names of `named_parameters`; a 1×1 convolution may have its trailing dimensions of 1 or not.
    Raises: CheckpointError if the model lacks a name or has it in another shape.
    """
    parameters = dict(named_parameters(model))
    unknown = sorted(set(tensors) - set(parameters))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{model.base_id} has no parameter {unknown[0]}{more}",
                              hint="use the base that the weights were tuned on")  # fmt: skip
    fitted = {name: _fit_shape(name, tensor, parameters[name].shape) for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, tensor in fitted.items():
            if parameters[name].is_meta:
                prefix, _, path = name.partition(".")
                module, _, leaf = path.rpartition(".")
                parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=parameters[name].dtype), False)
                setattr(model.modules()[prefix].get_submodule(module), leaf, parameters[name])
            parameters[name].copy_(tensor)
    model.tuned |= set(fitted)


def _fit_shape(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape == shape:
        return tensor
    if tensor.dim() > len(shape) and tensor.shape == (*shape, *(1,) * (tensor.dim() - len(shape))):
        return tensor.reshape(shape)
    raise CheckpointError(f"{name} has the shape {tuple(tensor.shape)}, the base's is {tuple(shape)}",
                          hint="use the base that the weights were tuned on")  # fmt: skip


_TUNED = re.compile(r"\.(attn1\.to_out|attn_temp|conv_temp)\.")


def load_controlvideo_weights(unet_path: str | Path, controlnet_path: str | Path) -> dict[str, Tensor]:
    """Read the weight files that ControlVideo's training writes, `N-unet.pt` and `N-controlnet.pt`.

    Each is a dictionary of tensors under diffusers' names: `attn1.to_out`, and in the U-Net `attn_temp` and `conv_temp`
    (a 1×1 convolution). Whole state dicts work too: tensors that are not tuned are left out. The prefix `module.`,
    which data-parallel training adds, is removed.
    Returns: tensors by `unet.…` and `controlnet.…` name, for `apply_tensors`.
    Raises: CheckpointError if a file is missing, unreadable, a pickle that holds code, or without a tuned tensor.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, path in (("unet", Path(unet_path)), ("controlnet", Path(controlnet_path))):
        named = {name.removeprefix("module."): tensor for name, tensor in read_weights(path, CheckpointError).items()}
        tuned = {name: tensor for name, tensor in named.items() if _TUNED.search(name)}
        if not tuned:
            raise CheckpointError(f"{path} holds no attn1.to_out, attn_temp or conv_temp",
                                  hint="give ControlVideo's N-unet.pt and N-controlnet.pt")  # fmt: skip
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in tuned.items()}
    return tensors

"""A model's modules without weights: write their configurations as JSON, and build empty modules from them.

Layer 3: for engines that bring their own weights, and for tracing, which needs none.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser, fold_vae
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.small_decoder import describe_config, empty_small_decoder
from posecrafter_rt.models.unet import VideoUNet


def describe_modules(model: PoseModel) -> str:
    """Return the components' configurations as JSON, without the paths that they came from."""
    text_encoder: Any = model.text_encoder.config.to_dict()
    configs = {name: describe_config(module) for name, module in model.modules().items() if name != "text_encoder"}
    configs["text_encoder"] = {key: value for key, value in text_encoder.items() if not key.startswith("_")}
    unet = {"norm_scope": model.unet.norm_scope, "gives_deep_features": model.unet.gives_deep_features}
    return json.dumps({**unet, "configs": configs})


def empty_modules(description: str) -> dict[str, nn.Module]:
    """Build the modules of `PoseModel.modules`, folded. All but the text encoder are on the meta device.

    Args: description: what `describe_modules` returned.
    """
    described = json.loads(description)
    configs, norm_scope = described["configs"], described["norm_scope"]
    with torch.device("meta"):
        unet = VideoUNet(UNet2DConditionModel.from_config(configs["unet"]), norm_scope)
        unet.gives_deep_features = described.get("gives_deep_features", False)
        fold_denoiser(unet)
        controlnet = VideoControlNet(ControlNetModel.from_config(configs["controlnet"]), norm_scope)
        vae = AutoencoderKL.from_config(configs["vae"])
        fold_vae(vae)
        small = {name: empty_small_decoder(configs[name]) for name in ("small_decoder",) if name in configs}
    # Not on the meta device: no weight file holds the buffer with its position indices. It is small.
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
    return {"unet": unet, "controlnet": controlnet, "vae": vae, "text_encoder": text_encoder, **small}

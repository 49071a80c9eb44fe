"""A model's modules without its weights: their configurations as JSON, and the modules again out of these.

Layer 3: for engines that bring weights of their own, and for tracing, which needs none.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_decoder, fold_denoiser
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.unet import VideoUNet


def describe_modules(model: PoseModel) -> str:
    """The components' configurations as JSON, without the paths that they came from."""
    configs = {}
    for name, module in model.modules().items():
        config: Any = module.config
        config = config.to_dict() if name == "text_encoder" else dict(config)
        configs[name] = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.dumps({"norm_scope": model.unet.norm_scope, "configs": configs})


def empty_modules(description: str) -> dict[str, nn.Module]:
    """The four modules of `PoseModel.modules`, folded; all but the text encoder's weights are on the meta device.

    Args: description: what `describe_modules` wrote.
    """
    described = json.loads(description)
    configs, norm_scope = described["configs"], described["norm_scope"]
    with torch.device("meta"):
        unet = VideoUNet(UNet2DConditionModel.from_config(configs["unet"]), norm_scope)
        fold_denoiser(unet)
        controlnet = VideoControlNet(ControlNetModel.from_config(configs["controlnet"]), norm_scope)
        vae = AutoencoderKL.from_config(configs["vae"])
        fold_decoder(vae)
    # Not on meta: it keeps its position indices in a buffer that no weight file holds. It is small.
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
    return {"unet": unet, "controlnet": controlnet, "vae": vae, "text_encoder": text_encoder}

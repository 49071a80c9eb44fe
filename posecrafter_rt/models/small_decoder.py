"""A decoder of a few convolutions in place of the VAE's: ours, distilled from it (see `tuning_losses`), or a given one.

Layer 3. The full decoder costs as much as several denoising steps. On one person's pictures a small one comes close.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.folding import fold_doubled
from posecrafter_rt.models.sources import Component, hash_files, lasting_id, locate_component, reading
from posecrafter_rt.models.weights import load_network

CHANNELS, BLOCKS = (128, 64, 32), (3, 3, 2)  # per level; a VAE with fewer doublings uses the last ones


class ResidualBlock(nn.Module):
    """x + conv(SiLU(conv(SiLU(x)))): (N, C, h, w) → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.conv2(F.silu(self.conv1(F.silu(hidden_states))))


class SmallDecoder(ModelMixin, ConfigMixin):
    """Scaled latents (N, 4, h, w) → pixels (N, 3, H, W), about [-1, 1].

    Each level has residual blocks, then a transposed convolution that doubles the picture. The last of these outputs
    RGB, so nothing is convolved at full size. There are no norms, so a pixel depends only on the latents around it.
    Args: channels, blocks: of each level, from the latents on.
    """

    @register_to_config
    def __init__(
        self, latent_channels: int = 4, channels: tuple[int, ...] = CHANNELS, blocks: tuple[int, ...] = BLOCKS
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(count)), nn.SiLU(),
                          nn.ConvTranspose2d(width, following, 4, stride=2, padding=1))
            for width, following, count in zip(channels, (*channels[1:], 3), blocks, strict=True)
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        hidden_states = self.conv_in(latents)
        for level in self.levels:
            hidden_states = level(hidden_states)
        return hidden_states


def new_small_decoder(latent_channels: int, vae_scale_factor: int, generator: torch.Generator) -> SmallDecoder:
    """Create an untrained decoder for a VAE: float32, on the CPU, with random weights from `generator`.

    Each residual block at first adds little to its input.
    Raises: ModelError for a VAE of factor 1, or above 8.
    """
    levels = round(math.log2(vae_scale_factor))
    if not 1 <= levels <= len(CHANNELS):
        raise ModelError(f"there is no small decoder for a VAE that shrinks pictures {vae_scale_factor} times",
                         hint="tune with --small-decoder-steps 0")  # fmt: skip
    decoder = SmallDecoder(latent_channels, CHANNELS[-levels:], BLOCKS[-levels:])
    decoder.float()  # whatever torch's default type is
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # torch's default range, but from this generator. An output of a doubling sees a quarter of the 16 taps.
            taps = module.weight[0].numel() if isinstance(module, nn.Conv2d) else 4 * module.in_channels
            nn.init.uniform_(module.weight, -(taps**-0.5), taps**-0.5, generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):
            with torch.no_grad():
                module.conv2.weight.mul_(0.3)
    return decoder


def describe_config(module: nn.Module) -> dict[str, Any]:
    """Return a diffusers module's configuration in JSON's types, without the paths that it came from."""
    config: Any = module.config
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in config.items() if not key.startswith("_")}  # fmt: skip


def empty_small_decoder(config: dict[str, Any]) -> nn.Module:
    """Build a small decoder of this configuration, folded and without weights (on the meta device)."""
    kind = AutoencoderTiny if "num_decoder_blocks" in config else SmallDecoder
    config = {name: value for name, value in config.items() if name != "block_out_channels"}  # the class adds it itself
    with torch.device("meta"):
        module: nn.Module = kind.from_config(config)
        fold_small_decoder(module)
    return module


def load_small_decoder(source: str, latent_channels: int, vae_scale_factor: int, dtype: torch.dtype) -> nn.Module:
    """Load a given decoder: a folder or hub id of diffusers' `AutoencoderTiny` (TAESD) or of a `SmallDecoder`.

    Raises: ModelError if it is not found, a single file, of another kind, or made for the latents of another VAE.
    """
    part = _locate(source)
    with reading(source):
        name = SmallDecoder.load_config(part.config_folder, local_files_only=True).get("_class_name")
    kind = {"AutoencoderTiny": AutoencoderTiny, "SmallDecoder": SmallDecoder}.get(name)
    if kind is None:
        raise ModelError(
            f"{source} holds {name}, no small decoder", hint="give an AutoencoderTiny, such as TAESD's folder"
        )
    module: nn.Module = load_network(kind, part, dtype).eval().requires_grad_(False)
    found = latents_of(module)
    if found != (latent_channels, vae_scale_factor):
        raise ModelError(f"the small decoder in {source} reads {found[0]} channels and enlarges {found[1]} times, the "
                         f"base's VAE {latent_channels} and {vae_scale_factor}", hint="take the one of this VAE")  # fmt: skip
    return module


def hash_small_decoder(source: str) -> str:
    """Return the SHA-256 over a given decoder's weight files and configuration.

    Raises: ModelError if it is not found or a single file.
    """
    part = _locate(source)
    return hash_files({"small_decoder": part.files, "config": (part.config_folder / "config.json",)})


def latents_of(module: nn.Module) -> tuple[int, int]:
    """Return how many channels the latents that a small decoder reads have, and how many times it enlarges them."""
    config: Any = module.config
    if isinstance(module, AutoencoderTiny):
        return config["latent_channels"], config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1)
    return config["latent_channels"], 2 ** len(config["channels"])


def decode_small(module: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (N, 4, h, w) → pixels (N, 3, H, W), about [-1, 1]."""
    pixels: Tensor = module.decoder(latents) if isinstance(module, AutoencoderTiny) else module(latents)
    return pixels


@torch.no_grad()
def fold_small_decoder(module: nn.Module) -> None:
    """Fold an `AutoencoderTiny` in place: its doublings as in `folding.fold_upsamplers`; remove its encoder."""
    if not isinstance(module, AutoencoderTiny):
        return
    module.encoder = nn.Identity()
    layers = module.decoder.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Upsample):
            layers[index], layers[index + 1] = nn.Identity(), fold_doubled(layers[index + 1])


def _locate(source: str) -> Component:
    if Path(lasting_id(source)).is_file():
        raise ModelError(f"{source} is a single file, without the config.json that says which small decoder it holds",
                         hint="give a folder or hub id in diffusers' layout, such as madebyollin/taesd")  # fmt: skip
    return locate_component(source, "small_decoder")

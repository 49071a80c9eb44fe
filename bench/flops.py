"""Counts the FLOPs of a base's networks and of whole algorithms on the meta device, where tensors have only shapes.

Bench: imported by ledger.py, presets.py, stream_budget.py and throughput.py. Matrix products, convolutions and
attentions are counted, a multiply-add as 2 FLOPs. Additions, activations and norms are not counted.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import posecrafter_rt.ops.traced  # noqa: F401  (registers torch.ops.posecrafter)
from bench.plain import Networks, to_diffusers
from bench.untrained import shapes_only
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser, fold_vae
from posecrafter_rt.models.networks import VaeDecoder, build_networks, describe_architecture
from posecrafter_rt.models.small_decoder import new_small_decoder
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.spec import SHALLOW_UNET

NUM_REGIONS = 3  # face and hands

# Layers by purpose. A layer belongs to the first part whose pattern matches its name.
PARTS = {
    "pose embedding": r"controlnet_cond_embedding",
    "key-frame K and V": r"attn1\.to_[kv]",
    "text K and V": r"attn2\.to_[kv]",
    "timestep projections": r"time_embedding|time_emb_proj",
    "temporal q, k, v": r"attn_temp\.to_[qkv]",
    "temporal output": r"attn_temp\.to_out|conv_temp|temporal_out",
    "doubling": r"upsamplers",
}


def attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count two products of every query with every key, from shapes (…, heads, n, d); exponentials are not counted."""
    return 2 * q[:-1].numel() * k[-2] * (q[-1] + v[-1])


def keyframe_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count posecrafter::keyframe_attention: q (G·F, L, C), k, v (G, L', C): a query meets its group's L' keys."""
    return 4 * q.numel() * k[1]


def temporal_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count posecrafter::temporal_attention: q (G, F, L, C), k, v (G, F', L, C): a query meets all F' keys."""
    return 4 * q.numel() * k[1]


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.posecrafter.keyframe_attention: keyframe_flops,
    torch.ops.posecrafter.temporal_attention: temporal_flops,
}


def count_flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs of a call, on any device."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def layer_flops(layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Count the FLOPs of one layer by hand: 2 · outputs · inputs per output.

    For a transposed convolution: 2 · inputs · outputs per input.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        return 2 * inputs.numel() * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
    if isinstance(layer, nn.Conv2d):
        return 2 * output.numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    assert isinstance(layer, nn.Linear)
    return 2 * output.numel() * layer.in_features


Layers = dict[str, nn.Module]  # linear and convolution layers by name; a name begins with the network's


def layers_of(network: str, module: nn.Module, pattern: str = "") -> Layers:
    """Return the layers of a module whose names match a pattern."""
    return {f"{network}.{name}": layer for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and re.search(pattern, name)}  # fmt: skip


def part_of(name: str) -> str:
    """Return the part that a layer belongs to."""
    other = f"other layers of the {name.split('.')[0]}"
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), other)


@contextmanager
def tally(layers: Layers) -> Iterator[Counter[str]]:
    """Sum up the FLOPs of these layers by part while the context is open, by hand and not by torch's counter."""
    parts: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            parts[part_of(name)] += layer_flops(layer, inputs[0], output)

        return add

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Measured:
    """FLOPs of one call, in all and by part. The attention products are the part that no layer accounts for."""

    flops: int
    parts: dict[str, int]


def measure(layers: Layers, call: Callable[[], Any]) -> Measured:
    """Count the FLOPs of a call, and of its layers by part."""
    with tally(layers) as parts:
        flops = count_flops(call)
    return Measured(flops, {**parts, "attention products": flops - sum(parts.values())})


@dataclass
class Count:
    """FLOPs of one algorithm, by stage and by part."""

    stages: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)

    def add(self, stage: str, times: int, call: Measured) -> None:
        """Add a call that the algorithm makes `times` times."""
        self.stages[stage] += times * call.flops
        for part, flops in call.parts.items():
            self.parts[part] += times * flops

    @property
    def total(self) -> int:
        """The FLOPs of all stages."""
        return sum(self.stages.values())


@dataclass(frozen=True)
class Setup:
    """One render: (height, width) in pixels, N target frames, denoising steps in each direction; guidance scale 1."""

    size: tuple[int, int] = (512, 512)
    frames: int = 100
    num_inference_steps: int = 50


class Counters:
    """A base's networks on the meta device, both plain and as the runtime has them, and the calls of each algorithm."""

    def __init__(self, configs: Path) -> None:
        """configs: a folder with unet, controlnet, vae and text_encoder, each with a config.json."""
        parts = shapes_only(configs)
        with torch.device("meta"):
            self.unet = VideoUNet(parts["unet"]).eval()
            self.controlnet = VideoControlNet(parts["controlnet"]).eval()
        self.vae, self.text_encoder = parts["vae"].eval(), parts["text_encoder"].eval()
        self.arch = describe_architecture(self.unet, self.controlnet, self.vae, self.text_encoder)
        model: Any = self  # has the four networks of a PoseModel, without weights
        self.plain_networks = Networks.of(model)
        folded, vae = copy.deepcopy(self.unet), copy.deepcopy(self.vae)
        fold_denoiser(folded)
        folded.gives_deep_features = True  # adds the network that runs between whole evaluations
        fold_vae(vae)
        self.networks = build_networks(folded, self.controlnet, vae, self.text_encoder)
        self.plain_decoder = VaeDecoder(vae=self.vae)
        self._measured: dict[tuple[Any, ...], Measured] = {}
        shared = layers_of("ControlNet", self.controlnet) | layers_of("text encoder", self.text_encoder)
        self.exact_layers = shared | layers_of("U-Net", folded) | layers_of("VAE", vae)
        # The plain U-Net owns its image layers. Its processors call the temporal layers, which belong to the model.
        self.plain_layers = shared | layers_of("ControlNet", self.plain_networks.controlnet)
        self.plain_layers |= layers_of("VAE", self.vae)
        self.plain_layers |= layers_of("U-Net", self.plain_networks.unet)
        self.plain_layers |= layers_of("U-Net", self.unet, r"attn_temp|conv_temp")

    def small_decoder(self, setup: Setup) -> Measured:
        """Count decoding one frame with a small decoder as tuning makes it."""
        small = new_small_decoder(self.arch.latent_channels, self.arch.vae_scale_factor, torch.Generator()).to("meta")
        call = partial(small, self.latents(setup, 1))
        return self.measured(("small decoder", setup.size), layers_of("small decoder", small), call)

    def latents(self, setup: Setup, frames: int) -> Tensor:
        """Return latents (frames, 4, h, w), on the meta device like everything here."""
        scale = self.arch.vae_scale_factor
        return torch.empty(frames, self.arch.latent_channels, *(side // scale for side in setup.size), device="meta")

    def pixels(self, setup: Setup, frames: int) -> Tensor:
        """Return pictures (frames, 3, H, W)."""
        return torch.empty(frames, 3, *setup.size, device="meta")

    def text(self) -> Tensor:
        """Return text embeddings (1, tokens, D)."""
        return torch.empty(1, self.arch.text_tokens, self.arch.text_channels, device="meta")

    def input_ids(self) -> Tensor:
        """Return token ids (1, tokens)."""
        return torch.empty(1, self.arch.text_tokens, dtype=torch.int64, device="meta")

    def measured(self, what: tuple[Any, ...], layers: Layers, call: Callable[[], Any]) -> Measured:
        """Count a call, or return the cached count."""
        if what not in self._measured:
            self._measured[what] = measure(layers, call)
        return self._measured[what]

    def plain_step(self, setup: Setup, frames: int) -> Measured:
        """Count one plain ControlNet and U-Net step of a clip."""
        latents, pictures = self.latents(setup, frames), self.pixels(setup, frames)
        call = partial(self.plain_networks.predict, latents, 500, self.text(), pictures)
        return self.measured(("plain step", setup.size, frames), self.plain_layers, call)

    def exact_step(self, setup: Setup, frames: int) -> Measured:
        """Count one ControlNet and U-Net step of the runtime, which takes precomputed tables and pose embeddings."""
        latents = self.latents(setup, frames)
        pose = torch.empty(frames, self.arch.pose_channels, *latents.shape[2:], device="meta")
        time_unet, time_controlnet = (torch.empty(1, width, device="meta") for width in self.arch.time_widths)
        kv_unet, kv_controlnet = (torch.empty(1, self.arch.text_tokens, width, device="meta")
                                  for width in self.arch.kv_widths)  # fmt: skip
        scale = torch.empty(1, device="meta")

        def step() -> None:
            residuals = self.networks["controlnet"](latents, time_controlnet, kv_controlnet, pose, scale)
            self.networks["unet"](latents, time_unet, kv_unet, *residuals)

        return self.measured(("exact step", setup.size, frames), self.exact_layers, step)

    def shallow_step(self, setup: Setup, frames: int) -> Measured:
        """Count the U-Net's first and last layer, which run on kept features."""
        latents = self.latents(setup, frames)
        first, deep = (latents.new_empty(frames, channels, *latents.shape[2:])
                       for channels in (self.unet.conv_in.out_channels, self.unet.deep_channels))  # fmt: skip
        time = torch.empty(1, self.arch.time_widths[0], device="meta")
        text_kv = torch.empty(1, self.arch.text_tokens, self.arch.kv_widths[0], device="meta")
        return self.network(SHALLOW_UNET, latents, time, text_kv, deep, first)

    def image_step(self, setup: Setup) -> dict[str, int]:
        """Return the FLOPs of diffusers' U-Net and ControlNet for one frame in one step, without temporal layers."""
        latents, pictures, text = self.latents(setup, 1), self.pixels(setup, 1), self.text()
        unet, controlnet = to_diffusers(self.unet, UNet2DConditionModel), self.plain_networks.controlnet
        return {
            "U-Net": count_flops(lambda: unet(latents, 500, encoder_hidden_states=text)),
            "ControlNet": count_flops(
                lambda: controlnet(latents, 500, encoder_hidden_states=text, controlnet_cond=pictures)
            ),
        }

    def network(self, name: str, *inputs: Tensor) -> Measured:
        """Count one call of one of the runtime's networks."""
        shapes = tuple(tensor.shape for tensor in inputs)
        return self.measured((name, shapes), self.exact_layers, partial(self.networks[name], *inputs))

    def plain_decode(self, setup: Setup) -> Measured:
        """Count decoding one frame with diffusers' unchanged decoder."""
        latents = self.latents(setup, 1)
        return self.measured(("plain decode", setup.size), self.plain_layers, partial(self.plain_decoder, latents))

    def edit(self, setup: Setup) -> Measured:
        """Count the latent edit of N frames by hand: 4 taps per element, as if each region were the whole latent."""
        flops = 8 * setup.frames * NUM_REGIONS * self.latents(setup, 1).numel()
        return Measured(flops, {"latent edit": flops})

    def baseline(self, setup: Setup, inverted: int, sampled: int, edits: bool) -> Count:
        """Count a baseline of plain.py that inverts `inverted` frames, and samples and decodes `sampled` frames.

        Its VAE encoder and text encoder are counted as the runtime's networks: both call diffusers' modules.
        """
        count, steps = Count(), setup.num_inference_steps
        count.add("text", 2, self.network("text_encoder", self.input_ids()))  # once for inversion, once for sampling
        count.add("encode", inverted, self.network("vae_encoder", self.pixels(setup, 1)))
        count.add("invert", steps, self.plain_step(setup, inverted))
        if edits:
            count.add("edit", 1, self.edit(setup))
        count.add("sample", steps, self.plain_step(setup, sampled))
        count.add("decode", sampled, self.plain_decode(setup))
        return count

    def plain(self, setup: Setup) -> Count:
        """Count ControlVideo's algorithm: all frames are inverted, nothing is inserted."""
        return self.baseline(setup, setup.frames, setup.frames, edits=False)

    def published(self, setup: Setup) -> Count:
        """Count PoseCrafter's algorithm: one frame is inverted; the reference is inserted and decoded."""
        return self.baseline(setup, 1, setup.frames + 1, edits=True)

    def exact(self, setup: Setup) -> Count:
        """Count this runtime with nothing cached from an earlier render. Source and target prompt are the same."""
        count, steps = Count(), setup.num_inference_steps
        count.add("text", 1, self.network("text_encoder", self.input_ids()))
        count.add("text", 1, self.network("prompt_kv", self.text()))
        timesteps = torch.empty(steps, dtype=torch.int64, device="meta")
        count.add("timestep tables", 1, self.network("time_tables", timesteps))
        count.add("poses", setup.frames + 1, self.network("pose_embedding", self.pixels(setup, 1)))
        count.add("encode", 1, self.network("vae_encoder", self.pixels(setup, 1)))
        count.add("invert", steps, self.exact_step(setup, 1))
        count.add("edit", 1, self.edit(setup))
        count.add("sample", steps, self.exact_step(setup, setup.frames + 1))
        count.add("decode", setup.frames, self.network("vae_decoder", self.latents(setup, 1)))
        return count

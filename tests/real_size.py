"""Stable Diffusion 1.5's denoisers one at a time, for tests that would not have the memory for a whole base."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from bench.untrained import shapes_only
from posecrafter_rt.export.onnx import export_network, save_model
from posecrafter_rt.export.verify import verify_network
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.models.weights import load_network
from posecrafter_rt.spec import Architecture, network_specs


def load_denoiser(base: Path, name: str, size: tuple[int, int]) -> tuple[nn.Module, Architecture]:
    """`unet` or `controlnet` in float32, folded, with temporal layers that do something; no other network has weights."""
    modules = shapes_only(base)
    part = locate_base(str(base)).component(name)
    if name == "unet":
        unet = VideoUNet(load_network(UNet2DConditionModel, part, torch.float32))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in unet.named_parameters():
                if key.endswith("conv_temp.weight"):
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn * 0.5 / parameter.shape[-1] ** 0.5)
    else:
        with torch.device("meta"):
            unet = VideoUNet(modules["unet"])
        modules["controlnet"] = load_network(ControlNetModel, part, torch.float32)
    fold_denoiser(unet)
    modules |= {"unet": unet, "controlnet": VideoControlNet(modules["controlnet"])}
    network = build_networks(**modules)[name].requires_grad_(False)
    return network, replace(describe_architecture(**modules), size=size)


def prove_export(base: Path, name: str, size: tuple[int, int], folder: Path) -> dict[str, float]:
    """Export one denoiser, check the file and run it by ONNX Runtime beside PyTorch for one frame and for two.

    Returns: seconds and peak memory, of the export and of all; the relative error, the largest; bytes of the files.
    Raises: onnx's ValidationError; PoseCrafterError where the two differ.
    """
    network, arch = load_denoiser(base, name, size)
    spec, path, start = network_specs(arch)[name], folder / f"{name}.onnx", time.perf_counter()
    save_model(export_network(network, spec, arch), path)
    exported = {"export_s": time.perf_counter() - start, "export_peak_bytes": peak_rss_bytes()}
    onnx.checker.check_model(str(path), full_check=True)  # by its path: with data beside it, it is no message of 2 GiB
    error = verify_network(path, network, spec, [{"frames": frames, "groups": 1} for frames in (1, 2)])
    return {**exported, "total_s": time.perf_counter() - start, "peak_bytes": peak_rss_bytes(), "relative_error": error,
            "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*"))}  # fmt: skip

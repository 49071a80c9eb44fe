"""Stable Diffusion 1.5's networks one at a time, for tests that would not have the memory for a whole base."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn

from bench.untrained import shapes_only
from posecrafter_rt.engines.tensorrt import prepare_graph
from posecrafter_rt.export.onnx import export_network, save_model
from posecrafter_rt.export.verify import verify_network
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser, fold_vae
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.models.weights import load_network, load_text_encoder
from posecrafter_rt.spec import Architecture, network_specs

# The components whose weights a network reads, where it is not the one that its name begins with.
READ = {"prompt_kv": ("unet", "controlnet"), "time_tables": ("unet", "controlnet"), "pose_embedding": ("controlnet",)}
BY_PROMPT = ("text_encoder", "prompt_kv")  # they know no frames
COMPONENTS = {"controlnet": ControlNetModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}


def load_one(base: Path, name: str, size: tuple[int, int]) -> tuple[nn.Module, Architecture]:
    """One network in float32 as engines are built of it: folded, with deep features and temporal layers that do something.

    No component that it does not read has weights.
    """
    located, modules = locate_base(str(base)), shapes_only(base)
    for part in (*COMPONENTS, "text_encoder"):
        if part in READ.get(name, ()) or (name not in READ and name.startswith(part)):
            component = located.component(part)
            modules[part] = (load_text_encoder(component, torch.float32) if part == "text_encoder"
                             else load_network(COMPONENTS[part], component, torch.float32))  # fmt: skip
    with nullcontext() if name.startswith("unet") or name in READ else torch.device("meta"):
        unet = VideoUNet(modules["unet"])
    draw_temporal(unet)
    unet.gives_deep_features = True
    modules |= {"unet": unet, "controlnet": VideoControlNet(modules["controlnet"])}
    fold_denoiser(unet)
    fold_vae(modules["vae"])
    network = build_networks(**modules)[name].requires_grad_(False)
    return network, replace(describe_architecture(**modules), size=size)


def draw_temporal(unet: VideoUNet) -> None:
    """Give the layers that inflation adds, and leaves without effect, one; in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if key.endswith("conv_temp.weight") and not parameter.is_meta:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * 0.5 / parameter.shape[-1] ** 0.5)


def prove_export(base: Path, name: str, size: tuple[int, int], folder: Path) -> dict[str, float]:
    """Export one network, check the file and run it by ONNX Runtime beside PyTorch for one frame (or prompt) and for two.

    Returns: seconds and peak memory, of the export and of all; the relative error, the largest; bytes of the files.
    Raises: onnx's ValidationError; PoseCrafterError where the two differ.
    """
    network, arch = load_one(base, name, size)
    spec, path, start = network_specs(arch)[name], folder / f"{name}.onnx", time.perf_counter()
    save_model(export_network(network, spec, arch), path)
    exported = {"export_s": time.perf_counter() - start, "export_peak_bytes": peak_rss_bytes()}
    onnx.checker.check_model(str(path), full_check=True)  # by its path: with data beside it, it is no message of 2 GiB
    cases = [{"frames": frames, "groups": frames if name in BY_PROMPT else 1, "steps": frames, "window": frames + 1}
             for frames in (1, 2)]  # fmt: skip
    error = verify_network(path, network, spec, cases)
    return {**exported, "total_s": time.perf_counter() - start, "peak_bytes": peak_rss_bytes(), "relative_error": error,
            "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*"))}  # fmt: skip


def prepare_for_tensorrt(base: Path, name: str, size: tuple[int, int], folder: Path) -> dict[str, float]:
    """Export one denoiser, make it TensorRT's in fp16 for compute capability 8.6, save it and have onnx check the file.

    Returns: seconds and peak memory; how many attentions are plugins, and how many there are; bytes of the files.
    Raises: onnx's ValidationError; PoseCrafterError where a weight does not fit.
    """
    network, arch = load_one(base, name, size)
    spec, path, start = network_specs(arch)[name], folder / f"{name}.onnx", time.perf_counter()
    graph = export_network(network, spec, arch)
    plugins, attentions = prepare_graph(graph, spec, arch, "fp16", (8, 6))
    save_model(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    return {"total_s": time.perf_counter() - start, "peak_bytes": peak_rss_bytes(), "plugins": plugins,
            "attentions": attentions, "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*"))}  # fmt: skip

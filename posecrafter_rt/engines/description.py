"""What each network of an engine folder is: its precision, its tensors, how many weights it has and where they lie.

Layer 4: read from the files. No backend is loaded, except that for `openvino` in fp16 the precision of the autoencoder
depends on the operations compiled for this processor if it has VNNI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from posecrafter_rt.engines.base import inner_precision
from posecrafter_rt.engines.folder import EngineFolder
from posecrafter_rt.engines.openvino_operations import network_precision
from posecrafter_rt.engines.tuned_file import TUNED_FILE, read_tuned
from posecrafter_rt.spec import SHALLOW_STREAM, SHALLOW_UNET, SMALL_DECODER, Architecture, TensorSpec, network_specs

DESCRIPTION_FILE = "description.json"  # in a networks folder; not every backend writes it
# The components whose weights a network of the `torch` backend reads: it has one file per component.
COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "prompt_kv": ("unet", "controlnet"),
    "time_tables": ("unet", "controlnet"),
    "pose_embedding": ("controlnet",),
    "vae_encoder": ("vae",),
    "vae_decoder": ("vae",),
    "controlnet": ("controlnet",),
    "unet": ("unet",),
    "controlnet_stream": ("controlnet",),
    "unet_stream": ("unet",),
    SMALL_DECODER: ("small_decoder",),
    SHALLOW_UNET: ("unet",),
    SHALLOW_STREAM: ("unet",),
}


def write_description(networks_folder: Path, networks: Mapping[str, Mapping[str, Any]]) -> None:
    """Save what is known only while building, for `describe_networks`.

    Args: networks: for each name what its backend knows of these. weights, bytes, files: those that it reads, of which
        other networks may read the same. digest: hashes. plugins, how many of the attentions run our kernels;
        attentions, how many there are; limits, the least and the most of each free dimension, by its symbol; error, the
        largest relative error of an output against the module in float32.
    """
    (networks_folder / DESCRIPTION_FILE).write_text(json.dumps(networks, indent=1), encoding="utf-8")


def read_description(networks_folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `write_description` saved, by network; empty if it saved nothing."""
    noted = networks_folder / DESCRIPTION_FILE
    found: dict[str, dict[str, Any]] = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    return found


def describe_networks(folder: EngineFolder) -> dict[str, dict[str, Any]]:
    """Describe every network of an engine that this version of the package built, by name.

    Each has its precision; inputs and outputs, with the shape and type that `spec` gives each at the engine's size;
    files, bytes and weights, of which several networks may read the same; and what `write_description` saved about it.
    """
    manifest, kept = folder.manifest, read_description(folder.networks)
    backend = manifest["backend"]
    precision_of = network_precision if backend == "openvino" else inner_precision
    described = {}
    for name, spec in network_specs(Architecture.from_json(manifest["architecture"])).items():
        stems, noted = COMPONENTS[name] if backend == "torch" else (name,), kept.get(name, {})
        described[name] = {
            "precision": precision_of(stems[0], manifest["precision"]),
            "inputs": _describe_tensors(spec.inputs),
            "outputs": _describe_tensors(spec.outputs),
            **({} if "files" in noted else _look_into_files(folder.networks, stems)),
            **noted,
        }
    return described


def _look_into_files(networks_folder: Path, stems: tuple[str, ...]) -> dict[str, Any]:
    """Return what `write_description` calls files, bytes and weights. stems: of the files' names."""
    files = [file for stem in stems for file in sorted(networks_folder.glob(f"{stem}.*"))]
    prefixes = tuple(f"{stem}." for stem in stems)
    tuned = [] if not (networks_folder / TUNED_FILE).is_file() else [
        tensor for name, tensor in read_tuned(networks_folder).items() if name.startswith(prefixes)]  # fmt: skip
    return {
        "files": [*(file.name for file in files), *([TUNED_FILE] if tuned else [])],
        "bytes": sum(file.stat().st_size for file in files) + sum(tensor.nbytes for tensor in tuned),
        "weights": sum(map(count_weights, files)) + sum(tensor.numel() for tensor in tuned),
    }


def _describe_tensors(tensors: tuple[TensorSpec, ...]) -> dict[str, dict[str, Any]]:
    return {tensor.name: {"shape": list(tensor.dims), "dtype": tensor.dtype} for tensor in tensors}


def count_weights(file: Path) -> int:
    """Count the numbers in the weights of a .safetensors file; 0 for any other.

    Constants of the graph that are not parameters do not count: only their names have no dot.
    """
    if file.suffix != ".safetensors":
        return 0
    with safe_open(file, framework="numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dictionary)
        return sum(prod(tensor.get_shape()) for name, tensor in slices.items()
                   if "." in name and "F" in tensor.get_dtype())  # fmt: skip

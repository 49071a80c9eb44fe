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
from xml.etree import ElementTree

from safetensors import safe_open

from posecrafter_rt.engines.base import inner_precision
from posecrafter_rt.engines.folder import EngineFolder
from posecrafter_rt.engines.openvino_operations import network_precision
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

    Args: networks: for each name: plugins, how many of the attentions run our kernels; attentions, how many there are;
        limits, the least and the most of each free dimension, by its symbol; error, the largest relative error of an
        output against the module in float32.
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
    files, bytes and weights (several networks of `torch` read one file); and what `write_description` saved about it.
    """
    manifest, kept = folder.manifest, read_description(folder.networks)
    precision_of = network_precision if manifest["backend"] == "openvino" else inner_precision
    described = {}
    for name, spec in network_specs(Architecture.from_json(manifest["architecture"])).items():
        stems = COMPONENTS[name] if manifest["backend"] == "torch" else (name,)
        files = [file for stem in stems for file in sorted(folder.networks.glob(f"{stem}.*"))]
        described[name] = {
            "precision": precision_of(stems[0], manifest["precision"]),
            "inputs": _describe_tensors(spec.inputs),
            "outputs": _describe_tensors(spec.outputs),
            "files": [file.name for file in files],
            "bytes": sum(file.stat().st_size for file in files),
            "weights": sum(map(count_weights, files)),
            **kept.get(name, {}),
        }
    return described


def _describe_tensors(tensors: tuple[TensorSpec, ...]) -> dict[str, dict[str, Any]]:
    return {tensor.name: {"shape": list(tensor.dims), "dtype": tensor.dtype} for tensor in tensors}


def count_weights(file: Path) -> int:
    """Count the numbers in the weights of a .safetensors file or OpenVINO's .xml, whose numbers lie beside it; else 0.

    Constants of the graph that are not parameters do not count: only their names have no dot.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dictionary)
            return sum(prod(tensor.get_shape()) for name, tensor in slices.items()
                       if "." in name and "F" in tensor.get_dtype())  # fmt: skip
    if file.suffix == ".xml":
        return sum(_count_constant(layer) for _, layer in ElementTree.iterparse(file) if layer.tag == "layer")
    return 0


def _count_constant(layer: ElementTree.Element) -> int:
    """Count the numbers of a layer of OpenVINO's IR if it is a floating-point weight; else return 0."""
    data = layer.find("data")
    if layer.get("type") != "Const" or "." not in layer.get("name", "") or data is None:
        return 0
    shape = data.get("shape", "")
    is_float = data.get("element_type", "") in ("f32", "f16", "bf16")
    return prod(int(length) for length in shape.split(",") if length.strip()) if is_float else 0

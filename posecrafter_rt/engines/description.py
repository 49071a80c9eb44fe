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
from posecrafter_rt.engines.openvino_weights import weights_path
from posecrafter_rt.engines.tuned_file import TUNED_FILE, read_tuned
from posecrafter_rt.spec import SHALLOW_STREAM, SHALLOW_UNET, SMALL_DECODER, Architecture, TensorSpec, network_specs

DESCRIPTION_FILE = "description.json"  # in a networks folder; not every backend writes it
# The components whose weights a network reads. Backends of BY_COMPONENT have one file of weights for each.
BY_COMPONENT = ("torch", "inductor")
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
    files, bytes and weights, of which several networks may read the same; and what `write_description` saved about it.
    """
    manifest, kept = folder.manifest, read_description(folder.networks)
    precision_of = network_precision if manifest["backend"] == "openvino" else inner_precision
    described = {}
    for name, spec in network_specs(Architecture.from_json(manifest["architecture"])).items():
        files, backend = _files_of(name, manifest["backend"], folder.networks), manifest["backend"]
        # OpenVINO's graph has the tuned weights, too, without their values.
        counted = [file for file in files if backend != "openvino" or file.suffix == ".xml"]
        described[name] = {
            "precision": precision_of(COMPONENTS[name][0] if backend == "torch" else name, manifest["precision"]),
            "inputs": _describe_tensors(spec.inputs),
            "outputs": _describe_tensors(spec.outputs),
            "files": [file.name for file in files],
            "bytes": sum(file.stat().st_size for file in files),
            "weights": sum(count_weights(file, COMPONENTS[name]) for file in counted),
            **kept.get(name, {}),
        }
    return described


def _files_of(name: str, backend: str, networks_folder: Path) -> list[Path]:
    """Return the files that a network is read from."""
    own, tuned = sorted(networks_folder.glob(f"{name}.*")), networks_folder / TUNED_FILE
    if backend in BY_COMPONENT:
        code = [file for file in own if file.suffix == ".pt2"]
        has_tuned = count_weights(tuned, COMPONENTS[name]) > 0
        parts = (networks_folder / f"{component}.safetensors" for component in COMPONENTS[name])
        own = [*code, *filter(Path.is_file, parts)]  # of a small decoder all may count as tuned
    elif backend == "openvino":
        graph = networks_folder / f"{name}.xml"
        content = graph.read_bytes()
        has_tuned = any(f'name="{key}"'.encode() in content for key in read_tuned(networks_folder))
        own = [weights_path(graph), graph]
    else:
        has_tuned = False
    return [*own, tuned] if has_tuned else own


def _describe_tensors(tensors: tuple[TensorSpec, ...]) -> dict[str, dict[str, Any]]:
    return {tensor.name: {"shape": list(tensor.dims), "dtype": tensor.dtype} for tensor in tensors}


def count_weights(file: Path, components: tuple[str, ...]) -> int:
    """Count the numbers in the weights of a .safetensors file or OpenVINO's .xml, whose numbers lie elsewhere; else 0.

    Args: components: of TUNED_FILE only their weights count.
    Constants of the graph that are not parameters do not count: only their names have no dot.
    """
    counted = tuple(f"{component}." for component in components) if file.name == TUNED_FILE else ("",)
    if file.suffix == ".safetensors":
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dictionary)
            return sum(prod(tensor.get_shape()) for name, tensor in slices.items()
                       if "." in name and name.startswith(counted) and "F" in tensor.get_dtype())  # fmt: skip
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

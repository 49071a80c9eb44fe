"""What every backend needs for refitting: whether an engine can be refitted, and which of its weights differ.

Layer 4: an engine can serve another checkpoint if only the values of its weights differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posecrafter_rt.atomic import sha256_json
from posecrafter_rt.engines.device import DRIVER
from posecrafter_rt.engines.folder import EngineFolder
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.spec import Architecture, NetworkSpec, network_specs

if TYPE_CHECKING:
    from posecrafter_rt.models.loading import PoseModel

GRAPHS_FILE = "graphs.json"  # in a networks folder: the hash of each network's graph, without weights
HINT_NO_REFIT = "build without --refit"
HINT_BF16 = "build the engine with --precision bf16"
HINT_TUNE_AGAIN = "no precision holds it: tune again, perhaps with a lower --learning-rate"
HINT_NO_REFIT_BF16 = f"{HINT_NO_REFIT}, with --precision bf16"

Graphs = dict[str, str | None]


def _digits(digest: Any) -> str:
    return str(digest)[:12]


def _size(size: Any) -> str:
    return "x".join(map(str, size))


def _device(device: Any) -> str:
    return " with CUDA ".join(str(device[name]) for name in ("name", DRIVER) if name in device)


# What must be equal, with its name in messages and how it is printed. Libraries are compared one by one.
_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "package": ("posecrafter-rt", str),
    "device": ("device", _device),
    "backend": ("backend", str),
    "precision": ("precision", str),
    "size": ("size", _size),
    "base_hash": ("base's hash", _digits),
    "norm_scope": ("norm_scope", str),
    "feature_reuse": ("feature reuse", lambda is_built: "on" if is_built else "off"),
    "max_frames": ("most frames at once", str),
    "architecture": ("architecture", str),
}


def check_source(source: EngineFolder, wanted: Mapping[str, Any]) -> None:
    """Raise EngineFolderError, which names the first difference, unless an engine can be refitted.

    Args: wanted: the manifest of the engine to be made, or a part of it; what it lacks is not compared.
    """
    for name, (title, shown) in _FACTS.items():
        if name in wanted and sha256_json(source.manifest.get(name)) != sha256_json(wanted[name]):
            if name not in source.manifest:
                raise _refusal(source.path, f"its {title} is unknown")
            if name == "architecture":
                raise _refusal(
                    source.path, f"its architecture has another {_differing(source.manifest[name], wanted[name])}"
                )
            theirs = shown(source.manifest[name])
            raise _refusal(source.path, f"its {title} is {theirs}, not {shown(wanted[name])}", _hint(name, theirs))
    built, here = source.manifest.get("libraries", {}), wanted.get("libraries", {})
    for name in sorted(here):
        if name != "python" and built.get(name) != here[name]:  # no network depends on Python's version
            raise _refusal(source.path, f"its {name} is {built.get(name)}, not {here[name]}", HINT_NO_REFIT)


def other_weights(source: EngineFolder, wanted: Mapping[str, Any]) -> str | None:
    """Return which weights beside the tuned ones differ in an engine, as the end of a sentence about it; None: none.

    Args: wanted: the manifest of the engine to be made.
    """
    if sha256_json(source.manifest.get("loras")) != sha256_json(wanted.get("loras")):
        return "holds other LoRAs"
    return (
        None if source.manifest.get("tuned") == wanted["tuned"] else "was tuned in other weights, or in parts of layers"
    )


def _differing(theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the names of what differs, for a message."""
    return ", ".join(
        sorted(name for name in {*theirs, *wanted} if sha256_json(theirs.get(name)) != sha256_json(wanted.get(name)))
    )


def _hint(name: str, theirs: str) -> str:
    if name in ("backend", "precision", "size", "max_frames"):
        return f"give --{name.replace('_', '-')} {theirs}, or {HINT_NO_REFIT}"
    return HINT_NO_REFIT


def _refusal(path: Path, difference: str, hint: str = HINT_NO_REFIT) -> EngineFolderError:
    return EngineFolderError(f"{path} cannot be refitted to this checkpoint: {difference}", hint)


def graph_digest(network: nn.Module, spec: NetworkSpec, arch: Architecture, *, is_onnx: bool = True) -> str:
    """Return the SHA-256 of what a network's exported graph depends on: configuration, code, versions; no weights.

    is_onnx: whether it is exported to ONNX, by further libraries.
    """
    from posecrafter_rt.export.graphs import LIBRARIES, TRACED_BY, graph_key

    return sha256_json(graph_key(network, spec, arch, LIBRARIES if is_onnx else TRACED_BY))


def write_graphs(folder: Path, graphs: Graphs) -> None:
    """Write the graphs' hashes for `check_graph`; None for a network whose weights cannot be replaced by name."""
    (folder / GRAPHS_FILE).write_text(json.dumps(graphs, indent=1), encoding="utf-8")


def read_graphs(folder: Path) -> Graphs:
    """Read what `write_graphs` wrote. Raises: EngineFolderError if it is not there."""
    try:
        graphs: Graphs = json.loads((folder / GRAPHS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(folder.parent, f"it holds no {GRAPHS_FILE}") from error
    return graphs


def check_graph(folder: Path, graphs: Graphs, name: str, digest: str) -> None:
    """Raise EngineFolderError unless a network in `folder` differs from one with this digest only in its weights."""
    if graphs.get(name) is None:
        raise _refusal(folder.parent, f"weights of its {name} were merged when it was built")
    if graphs[name] != digest:
        raise _refusal(folder.parent, f"its {name} was exported from another configuration or by other code")


def check_graphs(folder: Path, model: PoseModel, arch: Architecture, *, is_onnx: bool = True) -> None:
    """`check_graph` for every network of a model. is_onnx: see `graph_digest`."""
    graphs, specs = read_graphs(folder), network_specs(arch)
    for name, network in model.networks().items():
        check_graph(folder, graphs, name, graph_digest(network, specs[name], arch, is_onnx=is_onnx))


def in_stored_type(
    name: str, tensor: Tensor, dtype: torch.dtype, error: type[PoseCrafterError] = EngineFolderError,
    hint: str = HINT_NO_REFIT_BF16,
) -> Tensor:  # fmt: skip
    """Return a weight in the type that an engine stores it in, contiguous.

    Raises: `error` if it is beyond that type's range, with `hint` if that is float16; an infinity would go unnoticed.
    """
    stored = tensor.detach().to(dtype).contiguous()
    if stored.is_floating_point() and stored.numel() and not all(map(torch.isfinite, stored.aminmax())):  # NaN is both
        raise error(f"{name} does not fit {dtype}", hint if dtype == torch.float16 else HINT_TUNE_AGAIN)
    return stored


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise EngineFolderError if one of a build's weights, which are in their stored types, is beyond its type's range."""
    for name, tensor in weights.items():
        in_stored_type(name, tensor, tensor.dtype, hint=HINT_BF16)


def changed_weights(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of `weights` that differ from `stored` in any bit.

    weights: in the types that they are to be stored in.
    Raises: EngineFolderError if one of them is beyond its type's range; those that are stored already are not checked.
    """
    return {name: in_stored_type(name, tensor, tensor.dtype) for name, tensor in weights.items()
            if name not in stored or not same_bits(stored[name], tensor)}  # fmt: skip


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one element type are equal in every bit: 0.0 is not -0.0, a NaN equals itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    ours, theirs = (tensor.contiguous().view(integers) for tensor in (first, second))
    return torch.equal(ours, theirs)

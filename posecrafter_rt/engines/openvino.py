"""The `openvino` backend: the exported ONNX as OpenVINO's IR, compiled for each concrete shape; the default on a CPU.

Layer 4.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.atomic import sha256_files
from posecrafter_rt.blob_cache import BlobCache, MappedBlob
from posecrafter_rt.engines.base import (
    FULL_PRECISION,
    Engine,
    InputChecker,
    Precision,
    Progress,
    fitting_weights,
)
from posecrafter_rt.engines.description import read_description, write_description
from posecrafter_rt.engines.manifest import rebuild_networks_hint
from posecrafter_rt.engines.openvino_attention import use_attention
from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_ir import constants, replace_constants, save_ir
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.engines.openvino_norms import normalise_by_channel
from posecrafter_rt.engines.openvino_operations import (
    REWRITING,
    extend,
    hold_weights,
    missing_bytes_reason,
    missing_halves_reason,
    missing_reason,
    network_precision,
)
from posecrafter_rt.engines.openvino_request import Request
from posecrafter_rt.engines.openvino_streams import following, leave_out_reference
from posecrafter_rt.engines.openvino_weights import SharedWeights, weights_path
from posecrafter_rt.engines.refit import Graphs, check_graphs, graph_digest, in_stored_type, write_graphs
from posecrafter_rt.engines.tuned_file import TUNED_FILE, refit_tuned, write_tuned
from posecrafter_rt.errors import CheckpointError, EngineFolderError, last_line
from posecrafter_rt.machine import (
    available_bytes,
    core_quota,
    cpu_device,
    cpu_has_bf16,
    release_mapped,
    return_freed_memory,
)
from posecrafter_rt.spec import IS_REFERENCE, RUN_ONCE, Architecture, NetworkSpec, network_specs
from posecrafter_rt.tensor_file import MappedTensors

if TYPE_CHECKING:
    import openvino

    from posecrafter_rt.models.loading import PoseModel

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32"}  # of all that is not in 16 or 8 bits
KEPT_SHAPES = 4  # compiled models per network, each with its own activations and its own layout of the weights
LARGE_BYTES = 3 << 26  # of weights: a network with more keeps other shapes only while memory has room for one more
# Multiples of a network's weights that one more shape needs to be compiled, and for activations: the weights lie in the
# file and in the compiled model's layout. HELD: our operations hold them packed, in 16 and 8 bits once for all shapes.
# Measured at Stable Diffusion 1.5's size.
NEEDED_FOLD, NEEDED_FOLD_HELD = 3, {"fp32": 2, "fp16": 0.5, "int8": 0.5}
KEPT_BYTES = 1 << 30  # the most for compiled networks in an engine's folder: some hold their weights

log = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], ...]


class NetworkFile(NamedTuple):
    """A network's IR, the hashes of it and of its file of weights, and the bytes that it reads, with those in TUNED_FILE."""

    path: Path
    digest: list[str]
    weight_bytes: int


class OpenVinoEngine:
    """One network. Each new input shape is compiled once, statically, and kept, except for networks of RUN_ONCE.

    A stream's networks are compiled once for the reference, and once for frames that follow it. One model never serves
    changing shapes: with dynamic shapes OpenVINO 2026.4 returns garbage for temporal attention when one frame is
    followed by sixteen or more.
    """

    has_own_threads = True

    def __init__(
        self, spec: NetworkSpec, core: openvino.Core, file: NetworkFile, tuned: MappedTensors,
        properties: dict[str, Any], cache: BlobCache, precision: Precision,
    ) -> None:  # fmt: skip
        self.spec, self._following, self.device = spec, following(spec), torch.device("cpu")
        self._checked = InputChecker(spec, self.device)
        names = [tensor.name for tensor in spec.inputs]
        self._reference_at = names.index(IS_REFERENCE) if IS_REFERENCE in names else None
        self._core, self._path, self._digest = core, file.path, file.digest
        self._cache, self._precision = cache, precision
        # For both contracts: they differ in their number of inputs, and so in their keys.
        self._requests: OrderedDict[Shapes, Request] = OrderedDict()
        self._weights_path, self._weight_bytes, self._tuned = weights_path(file.path), file.weight_bytes, tuned
        self._swapped: dict[str, np.ndarray] = {}
        is_full = HINTS[precision] == HINTS["fp32"]
        # Saves a fifth of the decoder's time in float32; nothing in denoisers, on small pictures. bf16: not measured.
        self._is_by_channel = spec.name == "vae_decoder" and is_full
        self._operations = extend(core) if is_full and spec.name not in FULL_PRECISION else None
        # An exported network refers to the weights' file. OpenVINO 2026.4 cannot read it back if it has an operation of
        # ours, unless it holds its weights, too.
        self._is_apart = self._operations is None
        self._properties = {**properties, "CACHE_MODE": "OPTIMIZE_SIZE" if self._is_apart else "OPTIMIZE_SPEED"}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """See `Engine`. Inputs are read in place; outputs are views of the compiled model's own memory, which lives as
        long as they do.
        """
        checked = self._checked(inputs)
        spec = self._following
        if self._reference_at is not None:
            if any(checked[self._reference_at].tolist()):
                spec = self.spec
            else:
                del checked[self._reference_at]
        tensors = [tensor.contiguous() for tensor in checked]
        outputs = self._request(spec, tuple(tensor.shape for tensor in tensors))(tensors)
        if self.spec.name in RUN_ONCE:
            # For another prompt or person a small one is there again in 0.03 s, a large one in a second.
            self._requests.clear()
        return outputs

    def _request(self, spec: NetworkSpec, shapes: Shapes) -> Request:
        if shapes not in self._requests:
            while self._requests and not self._has_room():
                self._requests.popitem(last=False)
            compiled, blob = self._compile(spec, shapes)
            self._requests[shapes] = Request(compiled, spec, blob)
            self._release()  # most weights are in another layout by now
            return_freed_memory()  # compiling has freed as much memory as a small network holds
        self._requests.move_to_end(shapes)
        return self._requests[shapes]

    def _release(self) -> None:
        release_mapped(self._weights_path)
        self._tuned.release()

    def _has_room(self) -> bool:
        """Whether one more may be compiled beside those that are kept: its layout of large weights takes gigabytes."""
        if len(self._requests) >= KEPT_SHAPES:
            return False
        available = available_bytes() if self._weight_bytes > LARGE_BYTES else None
        needed = NEEDED_FOLD if self._is_apart else NEEDED_FOLD_HELD[self._precision]
        return available is None or available > needed * self._weight_bytes

    def _is_kept(self) -> bool:
        """Whether compiled networks are kept for other processes: not with swapped weights, which their keys lack.

        A blob that holds its weights may have gigabytes. One apart from them holds the tuned ones.
        """
        return not self._swapped and (self._is_apart or self._weight_bytes <= LARGE_BYTES)

    def _compile(self, spec: NetworkSpec, shapes: Shapes) -> tuple[Any, MappedBlob | None]:
        """Compile, or import what an earlier process compiled from the same weights and shapes; also return its blob.

        The process that compiled a blob with weights imports it, too: the weights then lie in pages of the file, not in
        memory of their own.
        """
        if not self._is_kept():
            return self._compile_anew(spec, shapes), None
        key = {"network": [*self._digest, self._tuned.digest], "shapes": shapes, "properties": self._properties,
               "by_channel": self._is_by_channel, "operations": self._operations, "precision": self._precision, "rewriting": REWRITING,
               **_runtime(self._core)}  # fmt: skip
        kept = self._cache.map(key)
        imported = self._import(kept)
        if imported is not None:
            return imported, kept
        compiled = self._compile_anew(spec, shapes)
        is_saved = self._cache.save(key, compiled.export_model().getbuffer())
        # Not if its weights lie apart anyway, nor if what was kept could not be read.
        blob = self._cache.map(key) if is_saved and not self._is_apart and kept is None else None
        if blob is None:
            return compiled, None
        del compiled  # memory need not hold both
        imported = self._import(blob)
        return (self._compile_anew(spec, shapes), None) if imported is None else (imported, blob)

    def _compile_anew(self, spec: NetworkSpec, shapes: Shapes) -> Any:
        return self._core.compile_model(self._read(spec, shapes), "CPU", self._properties)

    def _import(self, blob: MappedBlob | None) -> Any | None:
        """Return the compiled network that a blob holds; None if there is no blob or it cannot be read."""
        import openvino

        if blob is None:
            return None
        weights = {"WEIGHTS_PATH": str(self._weights_path)} if self._is_apart else {}
        tensor = openvino.Tensor(blob.array, shared_memory=True)
        try:
            return self._core.import_model(tensor, "CPU", {**self._properties, **weights})
        except RuntimeError as error:
            log.warning("a kept compiled network cannot be read (%s); it is compiled again", last_line(error))
            return None

    def _open(self) -> Any:
        model = self._core.read_model(self._path, self._weights_path)
        replace_constants(model, {**self._tuned.arrays, **self._swapped})
        return model

    def _read(self, spec: NetworkSpec, shapes: Shapes) -> Any:
        model = self._open()
        if spec is not self.spec:
            leave_out_reference(model)
        model.reshape({tensor.name: list(shape) for tensor, shape in zip(spec.inputs, shapes, strict=True)})
        if self._operations is not None:
            use_attention(model, self._precision)
            use_convolutions(model, self._precision)
            use_linear(model, self._precision)
            if not self._is_kept():
                hold_weights(model, self._release)
        if self._is_by_channel:
            normalise_by_channel(model)  # those that were not fused into a convolution
        return model

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `Engine.swap_weights`. The next call compiles anew."""
        shapes = {name: tuple(node.shape) for name, node in constants(self._open()).items()}
        fitting = fitting_weights(shapes, tensors)
        if fitting:
            self._swapped |= {name: in_stored_type(name, tensor, torch.float32, CheckpointError).numpy().copy()
                              for name, tensor in fitting.items()}  # fmt: skip
            self._requests.clear()
        return set(fitting)


def _runtime(core: openvino.Core) -> dict[str, str]:
    """Return what else decides whether compiled code fits: OpenVINO's build and the processor."""
    import openvino

    return {"openvino": openvino.get_version(), "device": core.get_property("CPU", "FULL_DEVICE_NAME")}


class OpenVinoBackend:
    """OpenVINO on the CPU, through ONNX. num_threads: None: as OpenVINO chooses, or a quota of cores."""

    name = "openvino"
    libraries = ("openvino",)
    holds_tuned_apart = True

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads

    def device(self) -> dict[str, str]:
        """Return this processor."""
        return cpu_device()

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Return why OpenVINO cannot run here, or None."""
        for package in ("openvino", "onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {package}"
        if precision == "bf16" and not cpu_has_bf16():
            return "it has no bf16 on this processor; use fp32"
        if precision == "fp16":
            return missing_halves_reason()
        if precision == "int8":
            return missing_bytes_reason()
        return None

    def num_missing(self, model: PoseModel, arch: Architecture, precision: Precision) -> int:
        """Count the networks that are still to be traced."""
        from posecrafter_rt.export.graphs import graph_cache
        from posecrafter_rt.export.prefill import missing_graphs

        return len(missing_graphs(model, arch, graph_cache()))

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write every network as IR in float32, and the files' digests; compiling a network chooses the precision.

        Traced graphs are kept in the user's cache, so another checkpoint of the same architecture is built in seconds.
        Raises: EngineFolderError if a weight is beyond float32's range.
        """
        import openvino

        from posecrafter_rt.export.graphs import graph_cache
        from posecrafter_rt.export.onnx import export_network, save_model
        from posecrafter_rt.export.prefill import prefill

        core, specs, cache = openvino.Core(), network_specs(arch), graph_cache()
        graphs: Graphs = {}
        tuned: dict[str, Tensor] = {}
        described: dict[str, dict[str, Any]] = {}
        files: dict[Path, SharedWeights] = {}
        prefill(model.to(torch.float32), arch, cache, progress)
        for name, network in model.networks().items():
            progress(f"exporting {name}")
            onnx_path, path = folder / f"{name}.onnx", folder / f"{name}.xml"
            arrays = {key: in_stored_type(key, parameter, torch.float32).numpy()
                      for key, parameter in network.named_parameters()}  # fmt: skip
            exported = export_network(network, specs[name], arch, inline=True, graphs=cache)
            save_model(exported, onnx_path)
            place = weights_path(path)
            shared = files.setdefault(place, SharedWeights(place))
            written, num_bytes = save_ir(core, onnx_path, path, arrays, model.tuned, shared)
            for file in folder.glob(f"{name}.onnx*"):  # perhaps with weights beside it
                file.unlink()
            is_refittable = all(key in written for key in exported.graph.initializers if key in arrays)
            graphs[name] = graph_digest(network, specs[name], arch) if is_refittable else None
            apart = {key: torch.from_numpy(arrays[key]) for key in written if key in model.tuned}
            tuned |= apart
            described[name] = {
                "weights": sum(arrays[key].size for key in written),
                "bytes": path.stat().st_size + num_bytes + sum(tensor.nbytes for tensor in apart.values()),
                "files": [path.name, shared.path.name, *([TUNED_FILE] if apart else [])],
            }
        write_tuned(folder, tuned)
        write_graphs(folder, graphs)
        known = sha256_files([*folder.glob("*.xml"), *folder.glob("*.bin")])
        for facts in described.values():
            facts["digest"] = [known[folder / file] for file in facts["files"][:2]]
        write_description(folder, described)
        if precision == "fp32":
            progress("compiling operations")  # once per machine; else the first render waits for it
            missing_reason()

    def refit(
        self, source: Path, folder: Path, model: PoseModel, arch: Architecture, precision: Precision, progress: Progress
    ) -> None:
        """See `Backend.refit`."""
        check_graphs(source, model, arch)
        progress("writing the tuned weights")
        refit_tuned(source, folder, model)

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Return all networks; each is compiled only when it is first called.

        Raises: EngineFolderError if the folder was not written by `build`.
        """
        import openvino

        specs, known = network_specs(arch), read_description(networks_folder)
        try:
            files = {name: NetworkFile(networks_folder / f"{name}.xml", known[name]["digest"], known[name]["bytes"])
                     for name in specs}  # fmt: skip
            tuned = MappedTensors(networks_folder / TUNED_FILE)
        except (OSError, ValueError, KeyError) as error:
            raise EngineFolderError(f"{networks_folder} holds no networks of this backend",
                                    rebuild_networks_hint(networks_folder)) from error  # fmt: skip
        core, compiled = openvino.Core(), BlobCache(cache, KEPT_BYTES)

        def engine(spec: NetworkSpec) -> OpenVinoEngine:
            inner = network_precision(spec.name, precision)
            return OpenVinoEngine(spec, core, files[spec.name], tuned, self._properties(inner), compiled, inner)

        return {name: engine(spec) for name, spec in specs.items()}

    def _properties(self, precision: Precision) -> dict[str, Any]:
        num_threads = self.num_threads or core_quota()  # OpenVINO heeds none
        threads = {} if num_threads is None else {"INFERENCE_NUM_THREADS": num_threads}
        return {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "CPU_RUNTIME_CACHE_CAPACITY": 0,  # the second guard against the fault that OpenVinoEngine describes
            **threads,
        }

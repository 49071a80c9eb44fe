"""The `tensorrt` backend: the exported ONNX, with its types, as TensorRT 11 plans; the default on an NVIDIA GPU.

Layer 4: decides what is built from what; `tensorrt_build`, `tensorrt_plugins` and `tensorrt_runtime` do the work.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.engines.base import (
    BEYOND_FP16,
    TORCH_DTYPES,
    Engine,
    Precision,
    Progress,
    inner_precision,
    untyped_reason,
)
from posecrafter_rt.engines.description import read_description, write_description
from posecrafter_rt.engines.device import DRIVER, cuda_driver, describe_compiled_device, gpu_name, is_driver_older
from posecrafter_rt.engines.manifest import rebuild_networks_hint
from posecrafter_rt.engines.refit import (
    HINT_NO_REFIT,
    HINT_NO_REFIT_BF16,
    Graphs,
    changed_weights,
    check_graph,
    graph_digest,
    read_graphs,
    write_graphs,
)
from posecrafter_rt.engines.tensorrt_build import build_plan, profile_shapes, profile_sizes
from posecrafter_rt.engines.tensorrt_common import failure, leave_memory, make_logger, start
from posecrafter_rt.engines.tensorrt_plugins import PLUGIN_OPS, register_plugins
from posecrafter_rt.engines.tensorrt_runtime import TensorRTEngine, Workspace, refit
from posecrafter_rt.errors import EngineFolderError, first_line
from posecrafter_rt.export.shapes import random_inputs, split_dim
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.machine import library_versions
from posecrafter_rt.spec import SMALL_DECODER, Architecture, NetworkSpec, network_specs
from posecrafter_rt.tensor_file import save_tensors

if TYPE_CHECKING:
    import onnx_ir as ir
    import tensorrt as trt

    from posecrafter_rt.models.loading import PoseModel

INSTALL = {"tensorrt": "'tensorrt-cu13>=11.4'", "triton": "triton", "onnx": "onnx", "onnxscript": "onnxscript"}
MIN_VERSION = (11, 4)  # earlier ones read a plugin's attributes in a way that newer NumPy refuses
MIN_CAPABILITY = (8, 0)
MIN_CUDA, MIN_DRIVER = "13.0", "580"  # of the wheels for CUDA 13; torch's may be for an older one
DESCRIPTION = "tensorrt.json"
TIMING_CACHE = "timing.cache"
DECODERS = ("vae_decoder", SMALL_DECODER)
# Relative errors of a plan against its module in float32, four times what the tests allow. Plans are checked because a
# wrong one gives no sign of it: TensorRT 11.3.0 is known to have lost a bias in a refit.
TOLERANCES = {"fp32": 4e-4, "fp16": 0.02, "bf16": 0.12}
# What to do about a plan that misses them; the second if it is in fp16. Unlike PyTorch, TensorRT may add up products of
# float16 in float16 (its issue 2942), which neither the range nor the precision of a network need allow.
IF_BUILT = ("--backend torch", "--precision bf16 or --backend torch")
IF_REFITTED = (HINT_NO_REFIT, HINT_NO_REFIT_BF16)

log = logging.getLogger(__name__)


def plan_precision(name: str, precision: Precision) -> tuple[Precision, bool]:
    """Return a network's precision inside an engine of this precision, and whether its float32 products may be TF32."""
    inner = inner_precision(name, precision)
    # TF32 has float16's mantissa but a wider range. In bf16 it is for operators that TensorRT does not have in bf16.
    return inner, inner == "bf16" or (inner != precision and name in BEYOND_FP16)


class TensorRTBackend:
    """TensorRT on the current CUDA device."""

    name = "tensorrt"
    libraries = ("tensorrt-cu13", "tensorrt-cu13-bindings")
    holds_tuned_apart = False

    def device(self) -> dict[str, str]:
        """Return the current GPU, with its compute capability and driver; a plan runs on no other."""
        return describe_compiled_device()

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Return why TensorRT cannot run here, or None. CUDA is asked only if everything is installed."""
        reason = untyped_reason(precision)
        if reason is not None:  # first: no installation would help
            return reason
        for package, requirement in INSTALL.items():
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {requirement}"
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU"
        capability = torch.cuda.get_device_capability()
        if capability < MIN_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
        driver = cuda_driver()
        if library_versions(self.libraries) and is_driver_older({DRIVER: MIN_CUDA}, {DRIVER: driver}):
            return f"the driver is for CUDA {driver}; {self.libraries[0]} needs {MIN_CUDA} (driver {MIN_DRIVER})"
        try:
            version = _version()
        except (ImportError, OSError) as error:
            return f"tensorrt cannot be loaded: {first_line(error)}"
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            return f"tensorrt {version} is too old: pip install {INSTALL['tensorrt']}"
        return None

    def num_missing(self, model: PoseModel, arch: Architecture, precision: Precision) -> int:
        """Count the networks that are still to be traced, and one more if nothing was timed on this GPU yet."""
        from posecrafter_rt.export.graphs import graph_cache
        from posecrafter_rt.export.prefill import missing_graphs

        is_timed = _timings().holds(_timings_key())
        return len(missing_graphs(model, arch, graph_cache())) + (not is_timed)

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write every network's plan and, beside it, its weights, which a refit may need; compare it with its module.

        Traced graphs and the timing cache are kept in the user's cache. The timing cache is saved after each network,
        so the next build has it even if this one fails; a copy of it lies in the folder.
        """
        from posecrafter_rt.export.graphs import graph_cache
        from posecrafter_rt.export.onnx import export_network
        from posecrafter_rt.export.prefill import prefill

        specs, cache = network_specs(arch), graph_cache()
        graphs: Graphs = {}
        register_plugins(torch.cuda.get_device_capability())
        timings, key = _timings(), _timings_key()
        timing_cache = timings.load(key) or b""
        described: dict[str, dict[str, Any]] = {}
        prefill(model.to(torch.float32), arch, cache, progress)
        for name, network in model.networks().items():
            progress(f"exporting {name}")
            graph = export_network(network, specs[name], arch, graphs=cache)
            graphs[name] = graph_digest(network, specs[name], arch)
            progress(f"building {name}")
            described[name], measured = _build_network(
                graph, specs[name], arch, folder, precision, timing_cache, progress
            )
            timing_cache = measured or timing_cache
            timings.save(key, timing_cache)
            progress(f"checking {name}")
            described[name]["error"] = self._compare(folder, network, specs[name], arch, precision, IF_BUILT)
            leave_memory()
        (folder / TIMING_CACHE).write_bytes(timing_cache)
        write_graphs(folder, graphs)
        write_description(folder, described)
        description = {"tensorrt": _version(), "device": gpu_name()}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def refit(
        self, source: Path, folder: Path, model: PoseModel, arch: Architecture, precision: Precision, progress: Progress
    ) -> None:
        """See `Backend.refit`. A plan is refitted on the GPU and then compared with its module on the CPU."""
        check_description(source, {"tensorrt": _version(), "device": gpu_name()})
        specs, graphs = network_specs(arch), read_graphs(source)
        described = read_description(source)
        for name, network in model.to(torch.float32).networks().items():
            check_graph(source, graphs, name, graph_digest(network, specs[name], arch))
            progress(f"refitting {name}")
            stored = load_file(source / f"{name}.safetensors")
            changed = changed_weights(in_types_of(stored, network), stored)
            if not changed:
                continue
            weights = {**stored, **changed}
            save_tensors(weights, folder / f"{name}.safetensors")
            _refit_plan(source, folder, name, changed, weights)
            described[name]["error"] = self._compare(folder, network, specs[name], arch, precision, IF_REFITTED)
            leave_memory()
        write_description(folder, described)

    def _compare(
        self, folder: Path, network: nn.Module, spec: NetworkSpec, arch: Architecture, precision: Precision,
        hints: tuple[str, str],
    ) -> float:  # fmt: skip
        """Run what was written three times on the smallest clip with two frames: unrecorded, recorded, and replayed.

        Returns: the largest relative error of an output.
        Raises: EngineFolderError, with one of these hints, if that is too large.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        plan = partial(_deserialize, folder, spec.name, hints[0])
        engine = TensorRTEngine(spec, plan, Workspace(device), folder / f"{spec.name}.safetensors")
        least, _, most = profile_sizes(spec, arch)
        inputs = random_inputs(spec, {**least, "frames": min(2 * least["groups"], most["frames"])})
        with torch.inference_mode():
            expected = network(*inputs.values())
        given = {name: tensor.to(device) for name, tensor in inputs.items()}  # at one address, else nothing is replayed
        inner, allow_tf32 = plan_precision(spec.name, precision)
        tolerance, worst = max(TOLERANCES[inner], TOLERANCES["fp16"] if allow_tf32 else 0), 0.0
        for _ in range(3):
            outputs = engine(**given)
            for tensor, right in zip(spec.outputs, expected, strict=True):
                error = relative_error(outputs[tensor.name].cpu(), right)
                if not error <= tolerance:  # so that NaN is refused
                    message = f"TensorRT's {spec.name} gives {tensor.name} with a relative error of {error:.2g}"
                    raise EngineFolderError(message, hints[inner == "fp16"])
                worst = max(worst, error)
        return worst

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Return every network: decoders share one workspace, the others share another.

        So one thread can decode while another samples; networks of one workspace never run at the same time. A plan is
        put on the GPU when its network first runs.

        Raises: EngineFolderError if the folder was not written by `build`, or for another GPU or TensorRT.
        """
        check_description(networks_folder, {"tensorrt": _version(), "device": gpu_name()})
        specs, hint = network_specs(arch), rebuild_networks_hint(networks_folder)
        device = torch.device("cuda", torch.cuda.current_device())
        sampling, decoding = Workspace(device), Workspace(device)
        return {
            name: TensorRTEngine(spec, partial(_deserialize, networks_folder, name, hint),
                                 decoding if name in DECODERS else sampling, networks_folder / f"{name}.safetensors")
            for name, spec in specs.items()
        }  # fmt: skip


def _timings() -> BlobCache:
    """Return the blob cache of timing caches, each under a `_timings_key`."""
    return BlobCache(cache_dir() / "tensorrt")


def _timings_key() -> dict[str, str]:
    return {"timings": gpu_name(), "tensorrt": _version()}


def _build_network(
    graph: ir.Model, spec: NetworkSpec, arch: Architecture, folder: Path, precision: Precision, timings: bytes,
    progress: Progress,
) -> tuple[dict[str, Any], bytes]:  # fmt: skip
    """Write a network's plan and weights; return what `write_description` takes, and `build_plan`'s timings."""
    from posecrafter_rt.export.onnx import save_model

    inner, allow_tf32 = plan_precision(spec.name, precision)
    plugins, attentions = prepare_graph(graph, spec, arch, inner, torch.cuda.get_device_capability())
    save_tensors(initialisers(graph), folder / f"{spec.name}.safetensors")
    path = folder / f"{spec.name}.onnx"
    save_model(graph, path)
    plan, timings = build_plan(path, profile_shapes(spec, arch), timings, allow_tf32,
                               lambda phase: progress(f"building {spec.name}: {phase}"))  # fmt: skip
    (folder / f"{spec.name}.plan").write_bytes(plan)
    for exported in folder.glob(f"{spec.name}.onnx*"):  # perhaps with weights beside it
        exported.unlink()
    return {"plugins": plugins, "attentions": attentions, "limits": shape_limits(spec, arch)}, timings


def shape_limits(spec: NetworkSpec, arch: Architecture) -> dict[str, list[int]]:
    """Return the least and the most of each free dimension of a network, by its symbol."""
    least, _, most = profile_sizes(spec, arch)
    symbols = {split_dim(dim)[0] for tensor in spec.inputs for dim in tensor.dims if isinstance(dim, str)}
    return {symbol: [least[symbol], most[symbol]] for symbol in sorted(symbols)}


def prepare_graph(
    graph: ir.Model, spec: NetworkSpec, arch: Architecture, precision: Precision, capability: tuple[int, int]
) -> tuple[int, int]:
    """Prepare an exported graph for TensorRT: attention becomes plugins if a kernel fits, types become the precision's.

    A kernel is tried as `ahead_of_time` will compile it for the profile of this architecture.

    Returns: how many attentions are plugins, and how many there are.
    """
    from posecrafter_rt.export.strong_types import kept_names, lift_constants, lower_precision
    from posecrafter_rt.export.tensorrt_plugins import mark_plugins
    from posecrafter_rt.kernels.plugins import plugin_kernel, unsupported_reason

    _, usual, _ = profile_sizes(spec, arch)

    @cache  # what no kernel fits is tried and reported only once
    def has_plugin(name: str, channels: int, heads: int) -> bool:
        if name not in PLUGIN_OPS:
            return False
        op, dtype = PLUGIN_OPS[name], TORCH_DTYPES[precision]
        if unsupported_reason(op, capability, dtype, channels, heads) is not None:
            return False
        frames = 1 if op == "keyframe_attention" else usual["frames"] // usual["groups"]
        try:
            plugin_kernel(op, capability, dtype, channels // heads, frames)
        except ValueError as error:
            log.warning("%s is written out in standard operators: %s", name, error)
            return False
        return True

    counts = mark_plugins(graph, has_plugin)
    lower_precision(graph, precision, kept_names(spec))
    lift_constants(graph.graph)
    return counts


def initialisers(graph: ir.Model) -> dict[str, Tensor]:
    """Return every initialiser by its name, in the type that it has in the graph."""
    found = {}
    for name, value in graph.graph.initializers.items():
        if value.const_value is not None:
            array = value.const_value.numpy()
            array = array if array.flags.writeable else array.copy()  # torch wants a writeable array
            is_bf16 = array.dtype.name == "bfloat16"  # which torch does not take from NumPy
            tensor = torch.from_numpy(array.view("int16") if is_bf16 else array)
            found[str(name)] = (tensor.view(torch.bfloat16) if is_bf16 else tensor).contiguous()
    return found


def in_types_of(stored: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return those of a network's parameters that are stored, each in the type that it is stored in."""
    return {name: parameter.detach().to(stored[name].dtype)
            for name, parameter in network.named_parameters() if name in stored}  # fmt: skip


def check_description(networks_folder: Path, current: dict[str, Any]) -> None:
    """Raise EngineFolderError if an engine is not of this backend, or was built for something else than `current`."""
    try:
        built = json.loads((networks_folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineFolderError(f"{networks_folder} holds no networks of this backend",
                                rebuild_networks_hint(networks_folder)) from error  # fmt: skip
    for name, value in current.items():
        if built.get(name) != value:
            raise EngineFolderError(f"the engine was built for {name} {built.get(name)}, this is {value}",
                                    rebuild_networks_hint(networks_folder))  # fmt: skip


def _deserialize(folder: Path, name: str, hint: str) -> trt.ICudaEngine:
    """Put a plan on the GPU. Raises: EngineFolderError if TensorRT cannot read it, OutOfMemory if it does not fit."""
    import tensorrt as trt

    runtime: trt.Runtime = start(lambda: trt.Runtime(make_logger()))
    plan = runtime.deserialize_cuda_engine((folder / f"{name}.plan").read_bytes())
    if plan is None:
        raise failure(f"TensorRT cannot read {name}.plan in {folder}", hint, EngineFolderError)
    return plan


def _refit_plan(
    source: Path, folder: Path, name: str, changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Write a network's plan with changed weights; the GPU holds it only meanwhile."""
    plan = _deserialize(source, name, rebuild_networks_hint(source))
    refit(plan, changed, weights, weights.__getitem__, HINT_NO_REFIT)
    (folder / f"{name}.plan").write_bytes(_serialize(plan))


def _serialize(plan: trt.ICudaEngine) -> bytes:
    """Return a plan with its present weights; it can be refitted again."""
    import tensorrt as trt

    config: trt.ISerializationConfig = plan.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    blob = plan.serialize_with_config(config)
    if blob is None:
        raise failure("TensorRT cannot write the refitted plan", HINT_NO_REFIT)
    return bytes(blob)


def _version() -> str:
    import tensorrt as trt

    return str(trt.__version__)

"""The `inductor` backend: every network compiled ahead of time by AOTInductor, for this processor or this NVIDIA GPU.

Layer 4.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import tempfile
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posecrafter_rt.atomic import sha256_json
from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.engines.base import (
    TORCH_DTYPES,
    Engine,
    InputChecker,
    Precision,
    Progress,
    cast,
    fitting_weights,
    inner_precision,
    to_boundary,
    untyped_reason,
)
from posecrafter_rt.engines.description import write_description
from posecrafter_rt.engines.device import describe_compiled_device, torch_device
from posecrafter_rt.engines.manifest import rebuild_networks_hint
from posecrafter_rt.engines.own_settings import own_settings
from posecrafter_rt.engines.refit import (
    HINT_BF16,
    Graphs,
    check_graphs,
    check_weights,
    graph_digest,
    in_stored_type,
    write_graphs,
)
from posecrafter_rt.engines.tuned_file import TUNED_FILE, refit_tuned, write_tuned
from posecrafter_rt.errors import BackendUnavailable, CheckpointError, EngineFolderError
from posecrafter_rt.machine import cpu_features, library_versions
from posecrafter_rt.spec import Architecture, NetworkSpec, network_specs
from posecrafter_rt.tensor_file import save_tensors

if TYPE_CHECKING:
    from posecrafter_rt.models.loading import PoseModel

OPTIONS = {
    "always_keep_tensor_constants": True,  # else small ones become part of the code, and a swap would miss them
    "aot_inductor.package_constants_in_so": False,  # the same code for every checkpoint
    # The same code for any number of threads, too: it takes those that there are when it runs. The second number says
    # only how finely loops are divided, which would otherwise depend on the threads that there are when it is compiled.
    "cpp.dynamic_threads": True,
    "cpp.threads": 16,
}
# What compiled code may use of a processor. Virtual machines with the same processor name can differ in them.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")
# The beginnings of the flags that -march=native lets a compiler generate code for, on x86 and Arm. Other flags do not
# matter, and an update of Linux may add some: the engine must not be refused then.
COMPILED_FOR = (
    "3dnow", "abm", "adx", "aes", "amx", "apx", "asimd", "atomics", "avx", "bf16", "bmi", "cmpccxadd", "crc32", "cssc", "cx16", "f16c",
    "fcma", "flagm", "fma", "fp", "frint", "gfni", "i8mm", "ilrcpc", "jscvt", "lahf", "lrcpc", "mops", "movbe", "movdir",
    "pclmul", "pmull", "pni", "popcnt", "sha", "sme", "sse", "ssse", "sve", "tbm", "vaes", "vpclmul", "xop",
)  # fmt: skip


class InductorEngine:
    """One compiled network, with the weights that it reads in place.

    Compiled code that runs without weights ends the process. So only this class holds it, and binds all weights before
    anything else.
    """

    has_own_threads = False

    def __init__(
        self, spec: NetworkSpec, package: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, is_exact: bool
    ) -> None:
        """Bind the weights. weights: of all networks, which share them. is_exact: whether a GPU's float32 convolutions
        must be exact, not TF32.

        Raises: EngineFolderError if the code reads others.
        """
        compiled = _open(package)
        names = compiled.get_constant_fqns()
        if not set(names) <= set(weights):
            raise EngineFolderError(f"{package} and the weights beside it do not fit together",
                                    rebuild_networks_hint(package.parent))  # fmt: skip
        own = dict(zip(names, cast((weights[name] for name in names), dtype), strict=True))
        compiled.load_constants(own, check_full_update=True, user_managed=True)
        self.spec, self.dtype, self.is_exact, self._compiled, self._weights = spec, dtype, is_exact, compiled, own
        self.device = next(iter(own.values())).device
        self._checked = InputChecker(spec, self.device)

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """See `Engine`."""
        tensors = cast(self._checked(inputs), self.dtype)
        with own_settings(self.device, self.is_exact):
            outputs = self._compiled(*(tensor.contiguous() for tensor in tensors))
        tensors = to_boundary(self.spec, outputs)
        return {out.name: tensor for out, tensor in zip(self.spec.outputs, tensors, strict=True)}

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `Engine.swap_weights`. Networks that share a weight share the swap."""
        fitting = fitting_weights({name: tuple(tensor.shape) for name, tensor in self._weights.items()}, tensors)
        swapped = {name: in_stored_type(name, tensor, self._weights[name].dtype, CheckpointError, HINT_BF16)
                   for name, tensor in fitting.items()}  # fmt: skip
        for name, tensor in swapped.items():
            self._weights[name].copy_(tensor)
        return set(fitting)


class InductorBackend:
    """AOTInductor on the current CUDA device, or on the CPU if there is none. Only building needs a C++ compiler."""

    name = "inductor"
    libraries = ("torch", "triton")
    holds_tuned_apart = True

    def device(self) -> dict[str, str]:
        """Return the GPU with its compute capability and driver, or the processor with its instruction sets.

        Only the best known of these are named; a hash stands for all.
        """
        device = describe_compiled_device()
        if device["type"] == "cpu":
            features = cpu_features()
            flags = sha256_json(sorted(name for name in features if name.startswith(COMPILED_FOR)))[:8]
            found = [name for name in INSTRUCTION_SETS if name in features]
            device["name"] += f", flags {flags} ({' '.join(found) or 'baseline'})"
        return device

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Return why AOTInductor cannot run here, or None. `build` reports a missing compiler: loading needs none."""
        if not torch.cuda.is_available():
            return None if precision in ("fp32", "bf16") else f"it has no {precision} on a CPU; use fp32 or bf16"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        return untyped_reason(precision)

    def num_missing(self, model: PoseModel, arch: Architecture, precision: Precision) -> int:
        """Count the networks that are still to be compiled."""
        specs, codes = network_specs(arch), _codes()
        keys = (self._key(_graph(network, specs[name], arch), name, precision)
                for name, network in model.networks().items())  # fmt: skip
        return sum(not codes.holds(key) for key in keys)

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write every network's code and, beside it, the weights in the precision that they run in.

        Raises: BackendUnavailable if something must be compiled without a suitable C++ compiler; EngineFolderError if
            a weight is beyond the precision's range.
        """
        specs, graphs = network_specs(arch), Graphs()
        weights: dict[str, Tensor] = {}
        described: dict[str, dict[str, Any]] = {}
        for name, network in model.to(torch.float32).networks().items():
            progress(f"compiling {name}")
            graphs[name], own = self.build_network(network, specs[name], arch, folder, precision)
            described[name] = _describe(_package(folder, specs[name]), own, model.tuned)
            for key, tensor in own.items():  # in the widest type, if networks differ
                if key not in weights or tensor.element_size() > weights[key].element_size():
                    weights[key] = tensor
        write_weights(folder, weights, model.tuned)
        write_graphs(folder, graphs)
        write_description(folder, described)

    def build_network(
        self, network: nn.Module, spec: NetworkSpec, arch: Architecture, folder: Path, precision: Precision
    ) -> tuple[str, dict[str, Tensor]]:
        """Write the code of one network, which is in float32; return its graph's hash, and its weights.

        The code holds no weights. It is kept in the user's cache, so another checkpoint of the same architecture is
        built in seconds.
        """
        package, dtype = _package(folder, spec), TORCH_DTYPES[inner_precision(spec.name, precision)]
        graph, cache = _graph(network, spec, arch), _codes()
        key = self._key(graph, spec.name, precision)
        code = cache.load(key)
        if code is None:
            code = self._compile(network, spec, arch, dtype)
            cache.save(key, code)
        package.write_bytes(code)
        return graph, _weights_of(package, network, dtype)

    def _key(self, graph: str, name: str, precision: Precision) -> dict[str, Any]:
        """Return all that a network's code depends on. graph: its hash."""
        dtype = TORCH_DTYPES[inner_precision(name, precision)]
        return {"graph": graph, "dtype": str(dtype), "device": self.device(), "options": OPTIONS,
                "libraries": library_versions(self.libraries)}  # fmt: skip

    def _compile(self, network: nn.Module, spec: NetworkSpec, arch: Architecture, dtype: torch.dtype) -> bytes:
        from torch._inductor import aoti_compile_and_package

        from posecrafter_rt.export.trace import quiet, trace
        from posecrafter_rt.models.blocks import channels_last

        _check_compiler()
        copied = channels_last(copy.deepcopy(network).to(torch_device(), dtype))
        program = trace(copied, spec, arch)
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = str(Path(folder) / f"{spec.name}.pt2")
            options = dict(OPTIONS)  # a copy: torch adds its own
            return Path(aoti_compile_and_package(program, package_path=path, inductor_configs=options)).read_bytes()

    def refit(
        self, source: Path, folder: Path, model: PoseModel, arch: Architecture, precision: Precision, progress: Progress
    ) -> None:
        """See `Backend.refit`. No compiler is needed."""
        check_graphs(source, model, arch, is_onnx=False)
        progress("writing the tuned weights")
        refit_tuned(source, folder, model)

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Load every network, with its weights on the device.

        Raises: EngineFolderError if the folder was not written by `build`.
        """
        weights = read_weights(networks_folder)
        return {name: self.load_network(spec, networks_folder, precision, weights)
                for name, spec in network_specs(arch).items()}  # fmt: skip

    def load_network(
        self, spec: NetworkSpec, networks_folder: Path, precision: Precision, weights: Mapping[str, Tensor]
    ) -> Engine:
        """Load one network; see `load`. weights: what `read_weights` returned."""
        package = _package(networks_folder, spec)
        if not package.is_file():
            raise EngineFolderError(f"{networks_folder} holds no {spec.name} of this backend",
                                    rebuild_networks_hint(networks_folder))  # fmt: skip
        dtype = TORCH_DTYPES[inner_precision(spec.name, precision)]
        return InductorEngine(spec, package, weights, dtype, is_exact=precision == "fp32")


def _check_compiler() -> None:
    """Raise BackendUnavailable unless there is a C++ compiler that links the C++ library that torch uses, too."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendUnavailable("backend inductor: no C++ compiler was found to build with",
                                 "install g++, or name a compiler in CXX, or give --backend torch") from error  # fmt: skip
    if not _shares_cxx_library(compiler):
        raise BackendUnavailable(f"backend inductor: {compiler} puts a C++ library of its own into what it links",
                                 "name the system's compiler: CXX=g++, or give --backend torch")  # fmt: skip


@cache
def _shares_cxx_library(compiler: str) -> bool:
    """Whether what a compiler links asks for the system's C++ library.

    If a package holds a second copy of it, loading the package ends the process: std::regex there meets torch's locale.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        done = subprocess.run(command, input=b"#include <locale>\nstd::locale f() { return {}; }", capture_output=True)
        # A compiler that fails here fails in torch, too, which reports it.
        return done.returncode != 0 or any(
            name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so", b"libc++.1.dylib")
        )


def _graph(network: nn.Module, spec: NetworkSpec, arch: Architecture) -> str:
    """Return the hash of the graph that a network's code is compiled from, in which ONNX has no part."""
    return graph_digest(network, spec, arch, is_onnx=False)


def _package(folder: Path, spec: NetworkSpec) -> Path:
    """Return the path of a network's code."""
    return folder / f"{spec.name}.pt2"


def _describe(package: Path, weights: Mapping[str, Tensor], tuned: Container[str]) -> dict[str, Any]:
    """Return what `write_description` takes of a network. weights: those that its code reads."""
    files = {TUNED_FILE if name in tuned else _component_file(name) for name in weights}
    return {"weights": sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point()),
            "bytes": package.stat().st_size + sum(tensor.nbytes for tensor in weights.values()),
            "files": [package.name, *sorted(files)]}  # fmt: skip


def _component_file(weight: str) -> str:
    """Return the name of the file that holds a weight of this name, unless it is tuned."""
    return f"{weight.partition('.')[0]}.safetensors"


def _open(package: Path) -> Any:
    """Open compiled code, which has no weights yet: it can list their names and take them, but must not run."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(package))


def _codes() -> BlobCache:
    """Return the cache of compiled networks, each under the backend's `_key`."""
    return BlobCache(cache_dir() / "inductor")


def _weights_of(package: Path, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return those of a network's parameters and buffers that its code reads, floating-point ones as `dtype`.

    Raises: EngineFolderError if one is beyond the type's range.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    names = _open(package).get_constant_fqns()
    weights = dict(zip(names, cast((tensors[name].detach() for name in names), dtype), strict=True))
    check_weights(weights)
    return weights


def write_weights(folder: Path, weights: Mapping[str, Tensor], tuned: Container[str] = ()) -> None:
    """Write the weights of all networks: each component's as one file, but for those that are `tuned`."""
    components: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name not in tuned:
            components.setdefault(_component_file(name), {})[name] = tensor
    for file, tensors in components.items():
        save_tensors(tensors, folder / file)
    write_tuned(folder, {name: tensor for name, tensor in weights.items() if name in tuned})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read what `write_weights` wrote to the device."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file, device=str(torch_device()))
    return _laid_out(weights)


def _laid_out(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay weights out in memory as the compiled code expects: it reads addresses, not strides (see `channels_last`)."""
    return {name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            for name, tensor in weights.items()}  # fmt: skip

"""The `torch` backend: the plain modules, which are the reference for every other backend.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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
from posecrafter_rt.engines.cuda_graphs import Recorder
from posecrafter_rt.engines.device import describe_device, multiplies, torch_device
from posecrafter_rt.engines.own_settings import own_settings
from posecrafter_rt.engines.refit import HINT_BF16, HINT_NO_REFIT, check_weights, in_stored_type
from posecrafter_rt.engines.tuned_file import read_tuned, refit_tuned, write_tuned
from posecrafter_rt.errors import CheckpointError, EngineFolderError
from posecrafter_rt.models.blocks import channels_last, do_in_parts
from posecrafter_rt.models.empty import describe_modules, empty_modules
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.narrow import keep_narrow
from posecrafter_rt.models.networks import build_networks
from posecrafter_rt.spec import (
    SHALLOW_STREAM,
    SHALLOW_UNET,
    SMALL_DECODER,
    STREAM_NETWORKS,
    Architecture,
    NetworkSpec,
    network_specs,
)
from posecrafter_rt.tensor_file import save_tensors

COMPONENTS_FILE = "components.json"
# Networks that run at every step or for every frame, with the input pixels of the largest batch that is recorded: 32
# frames of 64 × 64 latents for denoisers; one frame of 512 × 512 (64 × 64 latents) for decoders, two for poses.
RECORDED = {**dict.fromkeys(("controlnet", "unet", SHALLOW_UNET, *STREAM_NETWORKS, SHALLOW_STREAM), 1 << 17),
            "vae_decoder": 1 << 12, SMALL_DECODER: 1 << 12, "pose_embedding": 1 << 19}  # fmt: skip
# Their results are used or copied before another network runs: only these recordings may share their memory.
SHARING = ("unet_stream", SHALLOW_STREAM, "vae_decoder", SMALL_DECODER, "pose_embedding")


class TorchEngine:
    """One network module, run eagerly in its smallest weight's dtype; those of RECORDED use CUDA graphs if these help.

    is_exact: whether a GPU's float32 convolutions must be exact, not TF32. pool: see `Recorder`.
    """

    has_own_threads = False

    def __init__(self, module: nn.Module, spec: NetworkSpec, is_exact: bool, pool: Any = None) -> None:
        self.module, self.spec, self.is_exact = module, spec, is_exact
        smallest = min(module.parameters(), key=Tensor.numel)  # larger ones may be kept narrow
        self.device, self.dtype = smallest.device, smallest.dtype
        self._checked = InputChecker(spec, self.device)
        most = RECORDED.get(spec.name)
        self._network = self._run if most is None else Recorder(spec.name, self._run, most, pool)

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """See `Engine`."""
        with own_settings(self.device, self.is_exact):
            outputs = self._network(self._checked(inputs))
        return {out.name: tensor for out, tensor in zip(self.spec.outputs, outputs, strict=True)}

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return to_boundary(self.spec, self.module(*cast(inputs, self.dtype)))

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `Engine.swap_weights`. Networks that share a module share the swap."""
        parameters = dict(self.module.named_parameters())
        fitting = fitting_weights({name: tuple(p.shape) for name, p in parameters.items()}, tensors)
        swapped = {name: in_stored_type(name, tensor, parameters[name].dtype, CheckpointError, HINT_BF16)
                   for name, tensor in fitting.items()}  # fmt: skip
        with torch.no_grad():
            for name, tensor in swapped.items():
                parameters[name].copy_(tensor)
        return set(fitting)


class TorchBackend:
    """Eager PyTorch on the current CUDA device, or on the processor if there is none; it runs everywhere.

    tokens_at_once: see `do_in_parts`, for a clip that does not fit into memory. None: a block does what is fastest.
    """

    name = "torch"
    libraries = ("torch", "diffusers", "transformers")
    holds_tuned_apart = True

    def __init__(self, tokens_at_once: int | None = None) -> None:
        self.tokens_at_once = tokens_at_once

    def device(self) -> dict[str, str]:
        """Return the GPU with its compute capability, or the processor."""
        return describe_device()

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Return a reason only for int8. What a processor does not multiply fast, it stores and widens."""
        return untyped_reason(precision)

    def num_missing(self, model: PoseModel, arch: Architecture, precision: Precision) -> int:
        """Return 0: builds of this backend cache nothing."""
        return 0

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write each component's configuration and its weights in the precision that it runs in.

        Raises: EngineFolderError if a weight is beyond the precision's range.
        """
        tuned: dict[str, Tensor] = {}
        for name, module in model.modules().items():
            progress(name)
            weights = _weights(name, module, precision)
            check_weights({f"{name}.{key}": tensor for key, tensor in weights.items()})
            apart = {key: weights.pop(key) for key in list(weights) if f"{name}.{key}" in model.tuned}
            tuned |= {f"{name}.{key}": tensor for key, tensor in apart.items()}
            save_tensors(weights, folder / f"{name}.safetensors")
        write_tuned(folder, tuned)
        (folder / COMPONENTS_FILE).write_text(describe_modules(model), encoding="utf-8")

    def refit(
        self, source: Path, folder: Path, model: PoseModel, arch: Architecture, precision: Precision, progress: Progress
    ) -> None:
        """See `Backend.refit`."""
        if (source / COMPONENTS_FILE).read_text(encoding="utf-8") != describe_modules(model):
            raise EngineFolderError(f"{source.parent} cannot be refitted to this checkpoint: its configuration differs",
                                    HINT_NO_REFIT)  # fmt: skip
        progress("writing the tuned weights")
        refit_tuned(source, folder, model, _channels_last)

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Rebuild the modules without the base, in the precision asked for, which may be wider than that of the files.

        If the device does not multiply that precision fast, only the weights are in it, and the arithmetic is float32.
        """
        description = (networks_folder / COMPONENTS_FILE).read_text(encoding="utf-8")
        modules, device = empty_modules(description), torch_device()
        tuned = read_tuned(networks_folder, device)
        for name, module in modules.items():
            stored = load_file(networks_folder / f"{name}.safetensors", device=str(device))
            prefix = f"{name}."
            stored |= {key.removeprefix(prefix): value for key, value in tuned.items() if key.startswith(prefix)}
            inner = inner_precision(name, precision)
            weights = _cast_weights(_channels_first(stored), TORCH_DTYPES[inner])
            if not multiplies(inner, device):
                weights = keep_narrow(module, weights)
            module.load_state_dict(weights, assign=True)
            channels_last(module.to(device).eval().requires_grad_(False))
            if self.tokens_at_once is not None:
                do_in_parts(module, self.tokens_at_once)
        networks = build_networks(**modules)  # type: ignore[arg-type]
        specs = network_specs(arch)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        return {name: TorchEngine(network, specs[name], precision == "fp32", pool if name in SHARING else None)
                for name, network in networks.items()}  # fmt: skip


def _weights(name: str, module: nn.Module, precision: Precision) -> dict[str, Tensor]:
    """Return a component's weights as they are stored; those that are not floating-point keep their type.

    Convolutions are stored channels-last, as they run. So a processor reads every weight in place in the file: nothing
    is copied, and processes share what they have read.
    """
    weights = _cast_weights(module.state_dict(), TORCH_DTYPES[inner_precision(name, precision)])
    return {key: _channels_last(tensor).contiguous() for key, tensor in weights.items()}


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def _channels_first(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `_weights` stored with its dimensions in the order of modules, as views."""
    return {key: tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor for key, tensor in stored.items()}


def _cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in weights.items()}

"""The networks of a stream's step, and the memory of keys and values that they attend to.

Layer 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine
from posecrafter_rt.method.dpmpp import Terms
from posecrafter_rt.runtime.denoiser import Tables
from posecrafter_rt.spec import IS_REFERENCE, SHALLOW_STREAM, TensorSpec, residual_names


class Sampling(NamedTuple):
    """The denoising steps of a stream. tables: for their timesteps only. terms: one per step; see `dpmpp_terms`."""

    tables: Tables
    terms: list[Terms]
    conditioning_scale: float


class Predicted(NamedTuple):
    """What a `StreamDenoiser` returns. The next call of a network may overwrite all of it.

    noise_pred: (F, 4, h, w). memory: the frames' own keys and values, named as in `StreamReference`. For frames other
    than the reference only the temporal ones are sure to be there. features: inputs of these frames' shallow steps;
    empty if the engine has no shallow network.
    """

    noise_pred: Tensor
    memory: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]


class StreamDenoiser:
    """ControlNet, then U-Net, on frames of a stream, each at the step that it has reached.

    The memory of keys and values is a ring for each step. Slot 0 is the reference's; the others are the last frames',
    in any order, because order does not matter to temporal attention. The tensors are made once.
    """

    def __init__(
        self, engines: Mapping[str, Engine], sampling: Sampling, window: int,
        memory: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """memory: the reference's; only its temporal part is copied. None: to sample the reference itself."""
        self.controlnet, self.unet = engines["controlnet_stream"], engines["unet_stream"]
        self.shallow_unet = engines.get(SHALLOW_STREAM)
        self.device, self.window = self.unet.device, window
        steps = len(sampling.terms)
        self.conditioning_scale = torch.full((1,), sampling.conditioning_scale, dtype=torch.float32, device=self.device)
        self.is_reference = torch.full((steps,), memory is None, device=self.device)
        self.tables = {
            name: {"time_projections": sampling.tables.time_projections[name], "text_kv": sampling.tables.text_kv[name]}
            for name in ("controlnet", "unet")
        }
        self.window_mask = torch.zeros(steps, window + 1, dtype=torch.bool, device=self.device)
        # Views of tensors that are written to but never replaced: a network's steps, by (name, start, stop), and a
        # frame's place in the rings, by (step, slot).
        self._rows_of: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self._slots: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.num_frames = [0] * steps  # how many each step has remembered since its last `forget`
        # In the type in which networks keep them. Only a call tells that type, so it is float32 until then.
        dtypes = {} if memory is None else {name: tensor.dtype for name, tensor in memory["temporal"].items()}
        self.temporal = {spec.name: self._zeros(spec, steps, dtypes.get(spec.name, torch.float32))
                         for spec in _kept(self.unet, "temporal")}  # fmt: skip
        if memory is None:
            self.keyframe = {
                network.spec.name: {spec.name: self._zeros(spec, steps) for spec in _kept(network, "keyframe")}
                for network in (self.controlnet, self.unet)
            }
            return
        self.keyframe = {network.spec.name: dict(memory[network.spec.name]) for network in (self.controlnet, self.unet)}
        for name, tensor in memory["temporal"].items():
            self.temporal[name][:, 0] = tensor
        self.forget(slice(None))

    def _zeros(self, spec: TensorSpec, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make zeros (S, …) for a tensor of the memory."""
        dims = [{"frames": steps, "window": self.window + 1}.get(dim, dim) for dim in spec.dims]  # type: ignore[arg-type]
        return torch.zeros([int(dim) for dim in dims], dtype=dtype, device=self.device)

    @torch.inference_mode()
    def forget(self, steps: slice) -> None:
        """At these steps, let frames attend only to the reference and to frames that come from now on."""
        self.window_mask[steps] = False
        self.window_mask[steps, 0] = True
        for step in range(*steps.indices(len(self.num_frames))):
            self.num_frames[step] = 0

    @torch.inference_mode()
    def wipe(self) -> None:
        """`forget` everything and zero the slots: a masked slot has weight 0, but 0 times NaN is still NaN."""
        self.forget(slice(None))
        for tensor in self.temporal.values():
            tensor[:, 1:] = 0

    @torch.inference_mode()
    def __call__(self, latents: Tensor, pose_embeddings: Tensor, steps: slice) -> Predicted:
        """Run both networks, whole. latents: (F, 4, h, w), one frame at each of `steps`."""
        residuals = self.controlnet(
            latents=latents, pose_embeddings=pose_embeddings, conditioning_scale=self.conditioning_scale,
            **self._rows("controlnet", steps))  # fmt: skip
        controlnet_kv = _new(residuals)
        outputs = self.unet(latents=latents, **residuals, **self._rows("unet", steps))
        kept, features = _new(outputs), dict[str, Tensor]()
        if self.shallow_unet is not None:
            first = residual_names(1)[0]
            features = {"deep_features": outputs["deep_features"], first: residuals[first]}
        memory = {
            "controlnet_stream": controlnet_kv,
            "unet_stream": {name: tensor for name, tensor in kept.items() if name not in self.temporal},
            "temporal": {name: tensor for name, tensor in kept.items() if name in self.temporal},
        }
        return Predicted(outputs["noise_pred"], memory, features)

    @torch.inference_mode()
    def shallow(self, latents: Tensor, features: dict[str, Tensor], steps: slice) -> Predicted:
        """Run only the U-Net's first and last layer, on what the others gave at an earlier step of the same frames."""
        assert self.shallow_unet is not None
        given = {**self._rows("unet", steps), "latents": latents, **features}
        outputs = self.shallow_unet(**{spec.name: given[spec.name] for spec in self.shallow_unet.spec.inputs})
        return Predicted(outputs["noise_pred"], {"temporal": _new(outputs)}, features)

    def _rows(self, name: str, steps: slice) -> dict[str, Tensor]:
        """Return the inputs of a network that depend on the steps but not on the frame: views, made once."""
        key = (name, steps.start, steps.stop)
        if key not in self._rows_of:
            tables, of_steps = self.tables[name], dict(self.keyframe[f"{name}_stream"])
            if name == "unet":
                of_steps |= {**self.temporal, "window_mask": self.window_mask}
            of_steps |= {"time_projections": tables["time_projections"]}
            rows = {each: tensor[steps] for each, tensor in of_steps.items()}
            own = self.is_reference[: steps.stop - steps.start]  # all its entries are equal
            self._rows_of[key] = {**rows, "text_kv": tables["text_kv"], IS_REFERENCE: own}
        return self._rows_of[key]

    @torch.inference_mode()
    def remember(self, temporal: Mapping[str, Tensor], steps: Iterable[tuple[int, int]]) -> None:
        """Put frames' keys and values (F, …) in place of the oldest. steps: pairs (row in F, step it was at)."""
        for row, step in steps if self.window else ():
            slot = 1 + self.num_frames[step] % self.window
            places = self._slot(step, slot)
            for name, tensor in temporal.items():
                places[name].copy_(tensor[row])
            self.window_mask[step, slot].fill_(True)  # assigning True would make a tensor of it
            self.num_frames[step] += 1

    def _slot(self, step: int, slot: int) -> dict[str, Tensor]:
        """Return one frame's place in the rings of a step: views, made once."""
        if (step, slot) not in self._slots:
            self._slots[step, slot] = {name: tensor[step, slot] for name, tensor in self.temporal.items()}
        return self._slots[step, slot]


def _kept(network: Engine, kind: str) -> list[TensorSpec]:
    return [spec for spec in network.spec.inputs if spec.name.startswith(f"{kind}_kv_")]


def _new(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the keys and values out of a network's outputs, under the names that they have as inputs."""
    return {name.removeprefix("new_"): outputs.pop(name) for name in list(outputs) if name.startswith("new_")}

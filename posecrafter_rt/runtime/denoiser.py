"""The networks of a render's step: ControlNet, then U-Net, and guidance. `method` calls it once for every step.

Layer 5. What it is given was computed once, in `prepare`; `stream_denoiser` does the same for a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine
from posecrafter_rt.spec import SHALLOW_UNET, residual_names


@dataclass(frozen=True)
class Tables:
    """What depends only on the timesteps, or only on the prompt.

    time_projections: network name → (steps, T). text_kv: network name → (G, tokens, K).
    """

    time_projections: dict[str, Tensor]
    text_kv: dict[str, Tensor]

    @property
    def groups(self) -> int:
        """G: 1, or 2 with guidance (unconditional first)."""
        return self.text_kv["unet"].shape[0]


@dataclass(frozen=True)
class Every:
    """How many calls of a `Denoiser` each network's result serves; 1 is exact.

    Between whole evaluations of the U-Net only its first and last layer run, and the ControlNet does not.
    """

    controlnet: int = 1
    unet: int = 1


class Denoiser:
    """ControlNet, then U-Net, on one clip: `denoise(latents, index, timestep) → noise_pred`.

    After the first call nothing is allocated outside the networks. All calls must have the same shape.
    """

    def __init__(
        self, engines: Mapping[str, Engine], tables: Tables, pose_embeddings: Tensor, conditioning_scale: float,
        guidance_scale: float, every: Every = Every(),
    ) -> None:  # fmt: skip
        """every: more than 1 for the U-Net needs engines with the shallow U-Net."""
        self.engines, self.every = engines, every
        self.tables, self.guidance_scale = tables, guidance_scale
        self.pose_embeddings = _for_groups(pose_embeddings, tables.groups)
        # The type is given, because a program may have set another default.
        device, dtype = engines["unet"].device, torch.float32
        self.conditioning_scale = torch.full((1,), conditioning_scale, dtype=dtype, device=device)
        # Buffers for guidance; its first step sizes them.
        self._batch, self._guided = (torch.empty(0, dtype=dtype, device=device) for _ in range(2))
        self.forget()

    def forget(self) -> None:
        """Compute everything anew in the next call, because the latents were changed."""
        self._num_calls = self._num_calls_with_residuals = 0
        self._residuals: dict[str, Tensor] = {}
        self._deep: dict[str, Tensor] = {}

    def _step(self, network: str, index: int) -> dict[str, Tensor]:
        return {"time_projections": self.tables.time_projections[network][index : index + 1],
                "text_kv": self.tables.text_kv[network]}  # fmt: skip

    def __call__(self, latents: Tensor, index: int, timestep: int) -> Tensor:
        """Predict the noise.

        Args: latents: (F, 4, h, w). index: into the timestep table.
        Returns: noise_pred of the same shape; the next call overwrites it.
        """
        batch = _for_groups(latents, self.tables.groups, self._batch)
        is_whole = self._num_calls % self.every.unet == 0
        noise_pred = self._predict(batch, index) if is_whole else self._predict_shallow(batch, index)
        self._num_calls += 1
        if self.tables.groups == 1:
            return noise_pred
        unconditional, conditional = noise_pred.chunk(2)
        return torch.sub(conditional, unconditional, out=self._guided).mul_(self.guidance_scale).add_(unconditional)

    def _predict(self, batch: Tensor, index: int) -> Tensor:
        self._deep = {}  # freed before new ones are made, like the residuals below
        if self._num_calls >= self._num_calls_with_residuals:
            self._residuals = {}
            self._residuals = self.engines["controlnet"](
                latents=batch, pose_embeddings=self.pose_embeddings, conditioning_scale=self.conditioning_scale,
                **self._step("controlnet", index))  # fmt: skip
            self._num_calls_with_residuals = self._num_calls + self.every.controlnet
        outputs = self.engines["unet"](latents=batch, **self._step("unet", index), **self._residuals)
        if self.every.unet > 1:
            first = residual_names(len(self._residuals) - 1)[0]
            self._deep = {"deep_features": outputs["deep_features"], first: self._residuals[first]}
        return outputs["noise_pred"]

    def _predict_shallow(self, batch: Tensor, index: int) -> Tensor:
        return self.engines[SHALLOW_UNET](latents=batch, **self._step("unet", index), **self._deep)["noise_pred"]


def _for_groups(frames: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Repeat (F, …) to (G·F, …), group-major, in `out` if it is given; one group is the tensor itself."""
    return frames if groups == 1 else torch.cat([frames] * groups, out=out)

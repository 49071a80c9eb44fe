"""What a render may be told.

Layer 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posecrafter_rt.errors import PoseCrafterError

MODES = ("controlvideo", "+selection", "+insertion", "+editing")
Resample = Literal["bilinear", "nearest", "unit_variance"]


@dataclass(frozen=True)
class RenderOptions:
    """Options of one render; the defaults are the paper's.

    mode: the method's four stages, each containing those before it: `controlvideo` (training frame 0 is the reference,
        nothing inserted or edited), `+selection` (Eq. 5), `+insertion`, `+editing` (PoseCrafter).
    num_inference_steps: of DDIM sampling, and of the inversion.
    prompt: the target prompt; None: the prompt of tuning. The source prompt of the inversion is always that of tuning.
    guidance_scale: 1 needs no unconditional pass; 3 suits attribute edits by prompt.
    conditioning_scale: weight of the ControlNet residuals.
    tau: the sampling step before which latents are edited, 1 … num_inference_steps.
    resample: how the latent edit samples; regions: which keypoint groups it edits.
    inversion_substeps: parts into which each step of the inversion is divided; 1 is the paper's. The inversion is of one
        frame and cached, so a fine one costs little. None: what the base recommends.
    """

    mode: str = "+editing"
    num_inference_steps: int = 50
    prompt: str | None = None
    guidance_scale: float = 1.0
    conditioning_scale: float = 1.0
    tau: int = 1
    resample: Resample = "bilinear"
    regions: tuple[str, ...] = ("face", "left_hand", "right_hand")
    inversion_substeps: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PoseCrafterError(f"unknown mode {self.mode!r}", f"choose one of {', '.join(MODES)}")
        if self.num_inference_steps < 1:
            raise PoseCrafterError(f"{self.num_inference_steps} denoising steps", "give 1 or more")
        if self.inversion_substeps is not None and self.inversion_substeps < 1:
            raise PoseCrafterError(f"{self.inversion_substeps} substeps of inversion", "give 1 or more")
        if not 1 <= self.tau <= self.num_inference_steps:
            raise PoseCrafterError(f"tau {self.tau} is not a sampling step", f"give 1 to {self.num_inference_steps}")
        if not self.guidance_scale >= 1:
            raise PoseCrafterError(f"guidance scale {self.guidance_scale}", "give 1 (no guidance) or more")

    @property
    def selects(self) -> bool:
        """Whether Eq. 5 chooses the reference frame."""
        return self.mode != "controlvideo"

    @property
    def inserts(self) -> bool:
        """Whether the reference pose goes before the targets and becomes the key frame."""
        return self.mode in ("+insertion", "+editing")

    @property
    def edits(self) -> bool:
        """Whether the face and hands of the inverted latents are moved to the target poses."""
        return self.mode == "+editing"

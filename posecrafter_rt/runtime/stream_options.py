"""What a stream may be told.

Layer 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method.editing import DEFAULT_REGIONS
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.options import (
    Decoder,
    RenderOptions,
    Resample,
    checked_regions,
    is_whole,
    make_numbers_plain,
)

MAX_STEPS = 8
MAX_WINDOW = 30  # with the reference and the frame itself 32, for which kernels have tiles of their own


@dataclass(frozen=True)
class StreamOptions:
    """Options of one stream.

    steps: denoising steps of a frame, 1 to 8; window: past frames that a frame attends to beside the reference, 0 to 30.
    is_pipelined: denoise the last `steps` poses at once: more frames a second on a GPU, each `steps - 1` frames later.
    unet_every: steps of a frame after which the networks run whole; between them the U-Net's first and last layer do, on what
        the others gave before, as in `RenderOptions`. 1: at every step. Not pipelined, where all steps are one call.
    decoder: `full`, `small` (see `RenderOptions`), or None: small where the engine has one.
    strength, inversion_substeps, prompt, conditioning_scale, resample, regions: see `RenderOptions`; strength None: what
        the base recommends, prompt None: that of tuning.
    live: how lost persons, still poses and jumps are met.
    """

    steps: int = 2
    window: int = 2  # more of them cost memory and time, and were not seen to give anything (docs/streaming.md)
    is_pipelined: bool = False
    unet_every: int = 1
    decoder: Decoder | None = None
    strength: float | None = None
    inversion_substeps: int = 10  # of one frame, and cached
    prompt: str | None = None
    conditioning_scale: float = 1.0
    resample: Resample = "bilinear"
    regions: tuple[str, ...] = DEFAULT_REGIONS
    live: LiveOptions = field(default_factory=LiveOptions)

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        object.__setattr__(self, "regions", checked_regions(self.regions))
        if not is_whole(self.steps) or not 1 <= self.steps <= MAX_STEPS:
            raise PoseCrafterError(f"a stream of {self.steps} steps", f"give 1 to {MAX_STEPS}")
        if not is_whole(self.unet_every) or self.unet_every < 1:
            raise PoseCrafterError(f"{self.unet_every} steps to keep features over", "give a whole number, 1 or more")
        if self.unet_every > 1 and self.is_pipelined:
            raise PoseCrafterError("a pipelined stream keeps no features over steps", "leave out one of the two")
        if not is_whole(self.window) or not 0 <= self.window <= MAX_WINDOW:
            raise PoseCrafterError(f"a stream that remembers {self.window} frames", f"give 0 to {MAX_WINDOW}")

    def as_render(self, recommended_strength: float, has_small_decoder: bool) -> RenderOptions:
        """The render whose sampling does these very steps: their number counts what is done, not the whole schedule's.

        Args: of the engine. Raises: PoseCrafterError for what `RenderOptions` refuses, and where no schedule has so many steps.
        """
        strength = recommended_strength if self.strength is None else self.strength
        decoder = self.decoder or ("small" if has_small_decoder else "full")
        for total in range(self.steps, 100 * MAX_STEPS):
            options = RenderOptions(
                num_inference_steps=total, sampler="dpmpp", strength=strength, prompt=self.prompt,
                inversion_substeps=self.inversion_substeps, conditioning_scale=self.conditioning_scale,
                resample=self.resample, regions=self.regions, decoder=decoder,
            )  # fmt: skip
            if total - options.start_step == self.steps:
                return options
        raise PoseCrafterError(f"no schedule has {self.steps} steps at strength {strength}", "give a larger strength")

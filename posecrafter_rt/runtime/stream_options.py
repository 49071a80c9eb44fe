"""The options of a stream.

Layer 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method.editing import DEFAULT_REGIONS, checked_regions
from posecrafter_rt.plain_numbers import is_whole, make_numbers_plain
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.options import Decoder, RenderOptions, Resample

MAX_STEPS = 8
MAX_WINDOW = 30  # 32 with the reference and the frame itself; kernels have tiles of that size


@dataclass(frozen=True)
class StreamOptions:
    """Options of one stream.

    steps: denoising steps per frame, 1 to 8. window: past frames that a frame attends to beside the reference, 0 to 30.
    is_pipelined: denoise the last `steps` poses at once. A GPU then gives more frames per second, but each comes
        `steps - 1` frames later.
    unet_every: run the networks whole only once in so many steps of a frame, as in `RenderOptions`. 1: at every step.
        More is impossible if pipelined, because all steps are then one call.
    decoder: `full` or `small` (see `RenderOptions`); None: `small` if the engine has one.
    strength, inversion_substeps, prompt, conditioning_scale, resample, regions: see `RenderOptions`. strength None:
        what the base recommends. prompt None: the prompt of tuning.
    live: how lost persons, still poses and jumps are treated.
    """

    steps: int = 2
    window: int = 2  # more cost memory and time, with no gain seen (docs/streaming.md)
    is_pipelined: bool = False
    unet_every: int = 1
    decoder: Decoder | None = None
    strength: float | None = None
    inversion_substeps: int = 10  # it covers one frame and is cached
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
        """Return the render options whose sampling does exactly these steps.

        `steps` counts the steps that are done, not those of the whole schedule.
        Args: recommended_strength: of the base. has_small_decoder: of the engine.
        Raises: PoseCrafterError for what `RenderOptions` refuses, and if no schedule has that many steps.
        """
        strength = recommended_strength if self.strength is None else self.strength
        decoder = self.decoder or ("small" if has_small_decoder else "full")
        for total in range(self.steps, 100 * MAX_STEPS):
            options = RenderOptions(
                num_inference_steps=total, sampler="dpmpp", strength=strength, prompt=self.prompt,
                inversion_substeps=self.inversion_substeps, conditioning_scale=self.conditioning_scale,
                resample=self.resample, regions=self.regions, decoder=decoder,
            )  # fmt: skip
            if round(total * strength) == self.steps:  # `start_step` leaves one step of few, whatever the strength
                return options
        raise PoseCrafterError(f"no schedule has {self.steps} steps at strength {strength}", "give a larger strength")

"""The options of a render.

Layer 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method.editing import DEFAULT_REGIONS, checked_regions
from posecrafter_rt.plain_numbers import is_whole, make_numbers_plain
from posecrafter_rt.runtime.segments import check_split, least_segment

if TYPE_CHECKING:
    from posecrafter_rt.method import DDIMSchedule

MODES = ("controlvideo", "+selection", "+insertion", "+editing")
Resample = Literal["bilinear", "nearest", "unit_variance"]
Sampler = Literal["ddim", "dpmpp", "unipc"]
Decoder = Literal["full", "small"]
LARGEST_SCALE = 1e30  # float32 may not hold larger scales


@dataclass(frozen=True)
class RenderOptions:
    """Options of one render. The defaults are the paper's, except for what is left to the base.

    mode: the method's four stages, each containing those before it: `controlvideo` (training frame 0 is the reference,
        nothing inserted or edited), `+selection` (Eq. 5), `+insertion`, `+editing` (PoseCrafter).
    num_inference_steps: steps of sampling and of the inversion.
    prompt: the target prompt; None: the prompt of tuning. The source prompt of the inversion is always that of tuning.
    guidance_scale: 1 needs no unconditional pass; 3 suits attribute edits by prompt.
    conditioning_scale: weight of the ControlNet residuals.
    tau: the sampling step before which latents are edited; 1 is the first that is done.
    resample: how the latent edit samples; regions: which keypoint groups it edits.
    inversion_substeps: parts into which each step of the inversion is divided; 1 is the paper's. The inversion covers
        one frame and is cached, so many parts cost little. None: what the base recommends.
    strength: partial inversion: the share of the steps that is done, in (0, 1]. Below 1 the reference is inverted only
        to the step where sampling then starts. That loses less of it and takes less time. 1 is the paper's. None: what
        the base recommends.
    sampler: `ddim`, the paper's, or one of second order, which needs fewer steps: `dpmpp` (DPM-Solver++) or `unipc`
        (UniPC). The inversion is always DDIM. It uses the sampler's timesteps and ends where the sampler starts.
    controlnet_every: compute the ControlNet residuals once in so many sampling steps; in between, the U-Net gets the
        last ones again. 1 is exact.
    unet_every: run the whole U-Net once in so many sampling steps. In between, only its first and last layer run, on
        the last features of the others, and the ControlNet residuals are kept. 1 is exact. More needs an engine with
        feature reuse, which engines have by default.
    decoder: `full`, the VAE's, or `small`, an approximation, if the engine has one.
    segment: the most frames to render jointly. Every segment has the inserted reference as its key frame. Memory then
        does not grow with the clip, but frames attend to their own segment only, which is an approximation. None: the
        whole clip jointly, exact. A clip that fits into one segment is exact, too. `auto`: as many as memory allows.
    overlap: frames that neighbouring segments share, at most a third of a segment; their clean latents are blended.
        Some neighbours share one more, so that all segments have one length.
    """

    mode: str = "+editing"
    num_inference_steps: int = 50
    prompt: str | None = None
    guidance_scale: float = 1.0
    conditioning_scale: float = 1.0
    tau: int = 1
    resample: Resample = "bilinear"
    regions: tuple[str, ...] = DEFAULT_REGIONS
    inversion_substeps: int | None = None
    strength: float | None = None
    sampler: Sampler = "ddim"
    controlnet_every: int = 1
    unet_every: int = 1
    decoder: Decoder = "full"
    segment: int | Literal["auto"] | None = None
    # With 4, the blend goes from one segment to the next in five steps of 1/5, over 1/5 s of video at 25 frames/s. Each
    # seam renders 4 frames twice: 1/5 more work in segments of 24 frames, 1/30 in segments of 124.
    overlap: int = 4

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        named = {
            "mode": MODES,
            "resample": get_args(Resample),
            "sampler": get_args(Sampler),
            "decoder": get_args(Decoder),
        }
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise PoseCrafterError(f"unknown {name} {getattr(self, name)!r}", f"choose one of {', '.join(choices)}")
        counts = {"denoising steps": self.num_inference_steps, "substeps of inversion": self.inversion_substeps,
                  "steps to keep residuals over": self.controlnet_every,
                  "steps to keep features over": self.unet_every}  # fmt: skip
        for what, count in counts.items():
            if count is not None and not (is_whole(count) and count >= 1):
                raise PoseCrafterError(f"{count} {what}", "give a whole number, 1 or more")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise PoseCrafterError(f"strength {self.strength}", "give more than 0, and 1 at most")
        last = self.num_inference_steps - (0 if self.strength is None else self.start_step)
        if not is_whole(self.tau) or not 1 <= self.tau <= last:
            raise PoseCrafterError(f"tau {self.tau} is not a sampling step", f"give 1 to {last}")
        if not 1 <= self.guidance_scale <= LARGEST_SCALE:
            raise PoseCrafterError(f"guidance scale {self.guidance_scale}", "give 1 (no guidance) or more, such as 3")
        if not abs(self.conditioning_scale) <= LARGEST_SCALE:  # NaN fails this, too
            raise PoseCrafterError(f"conditioning scale {self.conditioning_scale}", "give a number; 1 is the paper's")
        object.__setattr__(self, "regions", checked_regions(self.regions))
        self._check_segments()

    def _check_segments(self) -> None:
        if not is_whole(self.overlap) or self.overlap < 0:
            raise PoseCrafterError(f"an overlap of {self.overlap} frames", "give a whole number, 0 or more")
        segment = least_segment(self.overlap) if self.segment in (None, "auto") else self.segment
        if not isinstance(segment, int):
            raise PoseCrafterError(f"segments of {segment!r} frames", "give a number, or auto")
        check_split(segment, self.overlap)
        if self.segment is not None and not self.inserts:
            # Each segment would take its own first frame as key frame: nothing would hold them together.
            raise PoseCrafterError(f"mode {self.mode} cannot be rendered in segments: no key frame is common to them",
                                   "use +insertion or +editing, or no segments")  # fmt: skip

    def with_recommended(self, recommended: dict[str, Any]) -> RenderOptions:
        """Return the options with what was left to the base filled in. recommended: its values by option name."""
        return replace(self, **{name: value for name, value in recommended.items() if getattr(self, name) is None})

    @property
    def start_step(self) -> int:
        """The first sampling step that is done, counted from 0; `strength` must be set."""
        assert self.strength is not None
        return self.num_inference_steps - max(1, round(self.num_inference_steps * self.strength))

    def check_start(self, schedule: DDIMSchedule) -> None:
        """Raise PoseCrafterError if sampling would start at the schedule's last timestep, at which no noise is left.

        With leading and linspace spacing that is what a single step of DDIM does: every frame would be the reference.
        Args: schedule: that of the sampler; `strength` must be set.
        """
        steps, timesteps = self.num_inference_steps, schedule.timesteps(self.num_inference_steps)
        if timesteps[self.start_step] <= schedule.steps_offset:
            raise PoseCrafterError(
                f"{steps} denoising steps at strength {self.strength:g} start where no noise is left to remove",
                "give more steps, a larger strength, or the sampler dpmpp",
            )

    @property
    def groups(self) -> int:
        """Passes per step: 1, or 2 with guidance, the unconditional one first."""
        return 1 if self.guidance_scale == 1 else 2

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

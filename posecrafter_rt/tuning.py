"""One-shot tuning: make `tuned.ckpt` from a few frames of one person and their poses (Eq. 3, Eq. 20).

Layer 4: plain PyTorch; nothing here is needed to render.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from posecrafter_rt.atomic import partial_path, refuse_overwrite
from posecrafter_rt.checkpoint import REQUIRED_METADATA, Checkpoint
from posecrafter_rt.errors import (
    BackendUnavailable,
    CheckpointError,
    PoseCrafterError,
    PoseError,
    out_of_memory,
)
from posecrafter_rt.framing import check_canvas, check_one_pose_a_frame, resize_to, transform_keypoints
from posecrafter_rt.machine import check_device, cpu_gains_by_bf16
from posecrafter_rt.method import DDIMSchedule, tuning_steps
from posecrafter_rt.models.blocks import NormScope, channels_last, check_norm_scope
from posecrafter_rt.models.loading import (
    PoseModel,
    apply_tensors,
    load_base,
    load_controlvideo_weights,
    named_parameters,
)
from posecrafter_rt.models.settings import BaseSettings
from posecrafter_rt.models.small_decoder import describe_config, new_small_decoder
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.plain_numbers import make_numbers_plain
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, PoseSequence
from posecrafter_rt.poses.shown import shown_poses
from posecrafter_rt.tuning_losses import (
    TrainingSet,
    decoder_loss,
    decoder_parameters,
    denoiser_loss,
    drawing_on_cpu,
    encode,
    small_decoder_loss,
    teach,
)
from posecrafter_rt.tuning_run import Part, TuningRun, tuning_alone
from posecrafter_rt.video_io import stream_video, video_size

SAVE_EVERY_SECONDS = 30.0
LOSS_SMOOTHING = 0.05
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TuneOptions:
    """Options of tuning; None means the base's own setting (the paper's for SD 1.5).

    base: `embedded`, a diffusers folder, a hub id or a single file. controlnet, vae: the same, if not in the base.
    frames: number of training frames, taken uniformly from the video.
    steps: tuning steps of the denoiser. decoder_steps: those of the autoencoder's decoder, which follow.
        small_decoder_steps: those that then distill that decoder into a small one, for streams; 0: there is none.
    precision: of the activations (autocast); the trained weights stay float32. `auto`: that of `resolve_precision`, or
        the one in which the interrupted run began that this one continues.
    controlvideo_weights: the U-Net's and the ControlNet's file of a ControlVideo training, to start from instead of the
        base's own weights; with 0 steps they are used unchanged. norm_scope then defaults to `clip`, as they were
        trained.
    Raises: PoseCrafterError for a learning rate that is not a positive number, less than 1 frame, a negative number of
        steps, an unknown precision or norm_scope, a missing file, or a seed that 64 bits do not hold.
    """

    base: str = "embedded"
    controlnet: str | None = None
    vae: str | None = None
    frames: int = 8
    steps: int | None = None
    decoder_steps: int | None = None
    small_decoder_steps: int | None = None
    learning_rate: float | None = None
    prompt: str | None = None
    norm_scope: NormScope | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "bf16"
    device: str = "cpu"
    seed: int = 0
    gradient_checkpointing: bool = False
    controlvideo_weights: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise PoseCrafterError(f"learning rate {self.learning_rate}", "give a positive number")
        if self.frames < 1:
            raise PoseCrafterError(f"{self.frames} frames to tune on", "give 1 or more; the paper takes 8")
        if self.precision not in PRECISIONS:
            raise PoseCrafterError(f"unknown precision {self.precision!r}", f"choose one of {', '.join(PRECISIONS)}")
        if self.norm_scope is not None:
            check_norm_scope(self.norm_scope)
        for path in self.controlvideo_weights or ():
            if not Path(path).is_file():
                raise CheckpointError(f"there is no file {path}", "check the path")
        for steps in (self.steps, self.decoder_steps, self.small_decoder_steps):
            if steps is not None and steps < 0:
                raise PoseCrafterError(f"{steps} steps of tuning", "give 0 or more")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise PoseCrafterError(f"seed {self.seed}", "give a number that 64 bits hold, such as 0")


@dataclass(frozen=True)
class TuneStatus:
    """Passed to the progress callback after every step.

    part: what is being tuned. loss: exponentially smoothed loss of this part; see `tuning_losses`.
    """

    step: int
    steps: int
    loss: float
    part: Part


def choose_frames(num_available: int, num_wanted: int) -> np.ndarray:
    """Return the indices of the training frames, uniform from the first to the last; all if there are fewer."""
    count = min(num_wanted, num_available)
    return np.unique(np.linspace(0, num_available - 1, count).round().astype(int))


def trainable_parameters(model: PoseModel, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return the denoiser's parameters whose `unet.…` or `controlnet.…` name matches a pattern, in a fixed order.

    Raises: CheckpointError if nothing matches.
    """
    chosen = {
        name: parameter for name, parameter in named_parameters(model)
        if name.startswith(("unet.", "controlnet.")) and any(re.search(p, name) for p in patterns)
    }  # fmt: skip
    if not chosen:
        raise CheckpointError(f"no parameter of {model.base_id} matches {patterns}", "mend the base's posecrafter.json")
    return chosen


@drawing_on_cpu()
def tune(
    frames: np.ndarray,
    poses: PoseSequence,
    output: Path | str,
    options: TuneOptions = TuneOptions(),
    *,
    force: bool = False,
    resume: bool = True,
    on_step: Callable[[TuneStatus], None] | None = None,
) -> Checkpoint:
    """Tune the base on frames of one person and write the checkpoint.

    Args:
        frames: (n, H, W, 3) uint8 RGB, at the size to render; poses: n poses on their canvas.
        output: the checkpoint to write. An interrupted run leaves `output + ".partial"`, and the same call resumes it.
            A call with other frames or options raises OutputExists, unless `force` is given.
        force: overwrite an existing checkpoint, and the unfinished state of another run. resume: continue an
            interrupted run; False: start over.
        on_step: called after every step.
    Returns: the checkpoint, as written.
    Raises: PoseError if frames and poses differ in number; ShapeError for a size that the network cannot halve;
        OutputExists; ModelError; CheckpointError; OutOfMemory; PoseCrafterError if another process is tuning the same
        output, if the output cannot be written, or if the loss is no longer finite.
    """
    output = Path(output)
    refuse_overwrite(output, force)
    if len(frames) != len(poses):
        raise PoseError(f"{len(frames)} frames but {len(poses)} poses", "extract the poses from this very video")
    norm_scope = options.norm_scope or ("clip" if options.controlvideo_weights else None)  # as ControlVideo is trained
    model = load_base(options.base, controlnet=options.controlnet, vae=options.vae, norm_scope=norm_scope)
    given = {} if options.controlvideo_weights is None else load_controlvideo_weights(*options.controlvideo_weights)
    apply_tensors(model, given)
    model.architecture().check_size(frames.shape[1:3])
    settings = model.settings
    chosen = choose_frames(len(frames), options.frames)
    steps = step_counts(options, settings, len(chosen))
    precision = options.precision if options.precision != "auto" else resolve_precision(options.device, "auto")[1]
    if steps["small_decoder_steps"]:
        arch, generator = model.architecture(), torch.Generator().manual_seed(options.seed)
        model.small_decoder = new_small_decoder(arch.latent_channels, arch.vae_scale_factor, generator)
    checkpoint = Checkpoint(
        tensors={name: parameter.detach().clone() for name, parameter in named_parameters(model) if name in given},
        frames=frames[chosen],
        poses=PoseSequence(poses.keypoints[chosen], poses.canvas, poses.fps),
        metadata={
            **model.identity(),
            "prompt": settings.prompt if options.prompt is None else options.prompt, "size": list(frames.shape[1:3]),
            "norm_scope": model.unet.norm_scope, "seed": options.seed, "precision": precision,
            **steps,
            "small_decoder": None if model.small_decoder is None else describe_config(model.small_decoder),
            "learning_rate": options.learning_rate or settings.learning_rate,
        },
    )  # fmt: skip
    partial = partial_path(output)
    with tuning_alone(output):
        refuse_overwrite(output, force)  # another run may have written it since
        if not resume:
            partial.unlink(missing_ok=True)
        checkpoint.tensors.update(_optimise(model, checkpoint, options, partial, on_step, force))
        checkpoint.save(output, force=force)
        partial.unlink(missing_ok=True)
    return checkpoint


def step_counts(options: TuneOptions, settings: BaseSettings, num_frames: int) -> dict[str, int]:
    """Return the steps of each part, by their names in a checkpoint: those that are given, else the base's own."""
    recommended = {
        "steps": settings.steps or tuning_steps(num_frames), "decoder_steps": settings.decoder_steps,
        "small_decoder_steps": settings.small_decoder_steps,
    }  # fmt: skip
    given = {name: getattr(options, name) for name in recommended}
    return recommended | {name: steps for name, steps in given.items() if steps is not None}


def _start(checkpoint: Checkpoint, settings: BaseSettings) -> dict[str, Any]:
    """Return what a run starts from but its precision, for `TuningRun.restore`; `base_hash` is of the base's weights."""
    metadata = {name: value for name, value in checkpoint.metadata.items() if name != "precision"}
    content = replace(checkpoint, metadata=dict.fromkeys(REQUIRED_METADATA)).digest()
    return {**metadata, "the base's settings": settings.to_json(), "frames, poses or weights": content}


def _optimise(
    model: PoseModel,
    checkpoint: Checkpoint,
    options: TuneOptions,
    partial: Path,
    on_step: Callable[[TuneStatus], None] | None,
    force: bool,
) -> dict[str, Tensor]:
    model.to(device=options.device)
    data = encode(model, checkpoint, options.device)
    run = _begin(model, checkpoint.metadata, options)
    schedule = DDIMSchedule.from_config(model.scheduler_config)
    start = _start(checkpoint, model.settings)
    run.restore(partial, start, options.precision == "auto", force)
    checkpoint.metadata["precision"] = run.precision
    saved_at = time.monotonic()
    try:
        while run.step < run.steps:
            part, _ = run.position
            _step(model, data, run, options, schedule)
            if on_step is not None:
                on_step(TuneStatus(run.step, run.steps, run.loss, part))
            if time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                run.save(partial, start)
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        run.save(partial, start)
        raise
    except Exception as error:  # torch and Python have a type each for memory that ran out
        known = out_of_memory(error, _less_memory(options, run))
        if known is None:
            raise
        raise known from error
    return {name: parameter.detach().cpu() for name, parameter in run.parameters.items()}


def _less_memory(options: TuneOptions, run: TuningRun) -> str:
    """Return the hint for a run that has too little memory: it goes on with checkpointing, but not at another size."""
    smaller = "tune at a smaller --size, with --no-resume"
    if options.gradient_checkpointing or run.step >= run.steps_of["denoiser"]:  # the decoders do not checkpoint
        return smaller
    return f"add --gradient-checkpointing to the same command, which takes less memory, or {smaller}"


def _begin(model: PoseModel, metadata: dict[str, Any], options: TuneOptions) -> TuningRun:
    """Prepare the networks for training, and make the optimizer of the parameters that are trained."""
    settings = model.settings
    for name, network in model.modules().items():
        network.requires_grad_(False)
        if options.device == "cpu" and name != "text_encoder":
            channels_last(network)
    if options.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.controlnet.enable_gradient_checkpointing()
    parameters = trainable_parameters(model, settings.trainable)
    decoder = decoder_parameters(model.vae) if metadata["decoder_steps"] else {}
    small = {f"small_decoder.{name}": parameter for name, parameter in model.small_decoder.named_parameters()} \
        if model.small_decoder is not None else {}  # fmt: skip
    rates = ((parameters, metadata["learning_rate"]), (decoder, settings.decoder_learning_rate),
             (small, settings.small_decoder_learning_rate))  # fmt: skip
    groups = [{"params": list(group.values()), "base_lr": rate} for group, rate in rates if group]
    trained = parameters | decoder | small
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return TuningRun(
        {"denoiser": metadata["steps"], "decoder": metadata["decoder_steps"],
         "small decoder": metadata["small_decoder_steps"]},
        trained,
        torch.optim.AdamW(groups, weight_decay=settings.weight_decay),
        torch.Generator().manual_seed(options.seed), options.device, metadata["precision"],
    )  # fmt: skip


def _step(model: PoseModel, data: TrainingSet, run: TuningRun, options: TuneOptions, schedule: DDIMSchedule) -> None:
    part, step = run.position
    with _autocast(run, keep_range=part != "denoiser"):
        if part == "denoiser":
            loss = denoiser_loss(model, data, run.generator, schedule)
        elif part == "decoder":
            loss = decoder_loss(model.vae, data, run.generator)
        else:
            if run.lessons is None:  # made by the tuned decoder; seeded, so that a resumed run makes the same ones
                run.lessons = teach(model.vae, data, torch.Generator().manual_seed(options.seed))
            assert model.small_decoder is not None
            loss = small_decoder_loss(model.small_decoder, run.lessons, run.generator)
    decay = part != "denoiser" or model.settings.learning_rate_decay
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(step, run.steps_of[part], decay) * group["base_lr"]
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.parameters.values(), 1.0)
    value = loss.item()  # waits for a GPU; Ctrl-C counts only after that, so it must not be while the weights change
    if not math.isfinite(value):
        raise PoseCrafterError(f"the loss became {value} at step {run.step}",
                               "start over: --no-resume, with a lower --learning-rate or --precision fp32")  # fmt: skip
    run.is_torn = True
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    run.loss += (value - run.loss) * max(LOSS_SMOOTHING, 1 / (step + 1))
    run.drawn = run.generator.get_state()
    run.is_torn = False


def learning_rate_at(step: int, steps: int, decay: bool) -> float:
    """Return the factor on the learning rate: 1 (the paper's), or a short warm-up, then a cosine down to a tenth."""
    if not decay:
        return 1.0
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * float(np.cos(np.pi * step / steps)))


def _autocast(run: TuningRun, keep_range: bool) -> AbstractContextManager[None]:
    """Return the autocast context. keep_range: do not use float16, because a VAE's activations can overflow it."""
    dtypes = {"bf16": torch.bfloat16} | ({} if keep_range else {"fp16": torch.float16})
    if run.precision not in dtypes:
        return nullcontext()
    return torch.autocast(run.device, dtypes[run.precision])


def resolve_precision(device: str, precision: str) -> tuple[str, str]:
    """Replace `auto` by what this machine trains fastest with, and check both; return (device, precision).

    Device `auto`: CUDA if there is a GPU, else the CPU. Precision `auto`: bf16 if the GPU multiplies it or the CPU is
    faster with it; otherwise fp16 on a GPU, fp32 on a CPU.
    Raises: BackendUnavailable if CUDA is asked for but no GPU answers, or not that one; PoseCrafterError for an unknown
        device or precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device, "auto, cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailable(f"device {device!r} was asked for, but no NVIDIA GPU answers", "use --device cpu")
    if device != "cpu" and int(device[len("cuda:") :] or 0) >= (num_gpus := torch.cuda.device_count()):
        raise BackendUnavailable(f"device {device!r} was asked for, but the last GPU is cuda:{num_gpus - 1}",
                                 "choose one that `posecrafter-rt doctor` lists")  # fmt: skip
    if precision == "auto":
        # Not `is_bf16_supported`, which is true of GPUs that only emulate bf16, too, and asks only the current one.
        native = torch.cuda.get_device_capability(device) >= (8, 0) if device != "cpu" else cpu_gains_by_bf16()
        precision = "bf16" if native else "fp16" if device != "cpu" else "fp32"
    if precision not in PRECISIONS:
        raise PoseCrafterError(f"unknown precision {precision!r}", f"choose one of {', '.join(PRECISIONS)}")
    return device, precision


def base_size(base: str) -> tuple[int, int]:
    """Return the (height, width) that a base recommends, without loading its weights."""
    return locate_base(base).settings().size


def load_clip(
    video: Path | str, poses: PoseSequence, size: tuple[int, int], window: slice, num_wanted: int | None = None
) -> tuple[np.ndarray, PoseSequence]:
    """Load the frames of `window` at `size` (scaled to cover, centre-cropped) and their poses.

    Args: num_wanted: load only so many of them, chosen by `choose_frames`; None: all.
    Raises: VideoError; PoseError if the video and the poses differ in their number of frames or in aspect ratio, and
        whatever `shown_poses` raises.
    """
    num_shown = len(shown_poses(poses, window, video, least=CONFIDENCE_THRESHOLD))  # others are drawn black
    chosen = np.arange(len(poses))[window][choose_frames(num_shown, num_wanted or num_shown)]
    check_canvas(video, video_size(video), poses.canvas)
    frames = [resize_to(frame, size) if i in chosen else None for i, frame in enumerate(stream_video(video)[0])]
    check_one_pose_a_frame(video, len(frames), len(poses))
    return np.stack([frame for frame in frames if frame is not None]), transform_keypoints(poses, size)[chosen]

"""`posecrafter-rt tune`: a video and its poses → tuned.ckpt.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from posecrafter_rt.cli.arguments import AsJson, Force, parse_range, parse_size
from posecrafter_rt.cli.main import GOES_ON, heed_quota
from posecrafter_rt.cli.output import print_json, print_table, step_progress

app = typer.Typer()


@app.command()
def tune(  # noqa: PLR0913 - one argument for each option
    ctx: typer.Context,
    video: Annotated[Path, typer.Argument(help="The video of one person.", show_default=False)],
    poses: Annotated[Path, typer.Option(help="Its poses: what `posecrafter-rt poses extract` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint to write.")] = Path("tuned.ckpt"),
    base: Annotated[
        str,
        typer.Option(help="embedded, a diffusers folder, a hub id, or one file of weights (.safetensors, .ckpt, .pt)."),
    ] = "embedded",
    controlnet: Annotated[str | None, typer.Option(help="An openpose ControlNet, where the base has none.")] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="A VAE in place of the base's. A file without config.json cannot be checked to fit the base."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Training frames, taken uniformly.", min=1)] = 8,
    frame_range: Annotated[
        str | None,
        typer.Option("--range", metavar="START:END", help="Take the training frames from this part of the video only."),
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Picture size; else the base's.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoiser steps; else the base's, or Eq. 20's for the number of frames.", min=0)
    ] = None,
    decoder_steps: Annotated[
        int | None, typer.Option(help="Steps of the VAE's decoder, after the denoiser; else the base's.", min=0)
    ] = None,
    small_decoder_steps: Annotated[
        int | None,
        typer.Option(help="Steps of a small decoder for streams, distilled last; 0: none; else the base's.", min=0),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the denoiser; else the base's (0.003 for SD 1.5).")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the video shows; else the base's.")] = None,
    norm_scope: Annotated[str | None, typer.Option(help="GroupNorm over each `frame`, or the whole `clip`.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[
        int, typer.Option(help="Random seed; on the same CPU, in as many threads, it gives the same checkpoint.")
    ] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory and more time.")
    ] = False,
    controlvideo_weights: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="UNET CONTROLNET", help="Start from N-unet.pt and N-controlnet.pt of ControlVideo's training."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.")] = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Tune the base on a few frames of one person."""
    window, picture_size = parse_range(frame_range), parse_size(size)
    from posecrafter_rt.atomic import partial_path, refuse_overwrite, refuse_sources
    from posecrafter_rt.framing import check_canvas, check_one_pose_a_frame
    from posecrafter_rt.models.loading import locate_parts
    from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.poses.shown import shown_poses
    from posecrafter_rt.spec import check_multiple
    from posecrafter_rt.tuning import TuneOptions, load_clip, resolve_precision, tune
    from posecrafter_rt.video_io import count_frames, video_size

    refuse_overwrite(output, force)  # before minutes of work, not after them
    weights = (base, controlnet, vae, *(controlvideo_weights or ()))  # hub ids among them
    refuse_sources(output, video, poses, *(given for given in weights if given and Path(given).exists()))
    heed_quota()
    device, _ = resolve_precision(device, precision)  # an interrupted run continues in the precision that it began in
    options = TuneOptions(
        base=base, controlnet=controlnet, vae=vae, frames=frames, steps=steps, decoder_steps=decoder_steps,
        small_decoder_steps=small_decoder_steps, learning_rate=learning_rate, prompt=prompt, norm_scope=norm_scope, precision=precision, device=device, seed=seed,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing, controlvideo_weights=controlvideo_weights)  # fmt: skip
    try:
        frame_size = video_size(video)
        all_poses = read_openpose(poses, allow_missing=True, canvas=frame_size)
        # load_clip checks these again; this is before a base is downloaded.
        shown_poses(all_poses, window, poses, least=CONFIDENCE_THRESHOLD)
        check_canvas(video, frame_size, all_poses.canvas)
        if video.is_dir():  # of a video file only decoding tells how many frames it has
            check_one_pose_a_frame(video, count_frames(video), len(all_poses))
        found = locate_parts(base, controlnet, vae)  # refuses an unsupported one before the whole video is decoded
        picture_size = picture_size or found.base.settings().size
        check_multiple(picture_size, found.size_multiple)
        clip, clip_poses = load_clip(video, all_poses, picture_size, window, frames)
        with step_progress("tuning") as on_step:
            checkpoint = tune(clip, clip_poses, output, options, force=force, resume=resume,
                              on_step=lambda status: on_step(status.step, status.steps, f"{status.part} loss {status.loss:.4f}"))  # fmt: skip
    except KeyboardInterrupt:
        ctx.meta[GOES_ON] = resume and partial_path(output).exists()
        raise
    summary = {"checkpoint": str(output), "bytes": output.stat().st_size, **checkpoint.metadata}
    if as_json:
        print_json(summary)
    else:
        print_table((name.replace("_", " "), str(summary[name]))
                    for name in ("checkpoint", "base", "prompt", "size", "steps", "decoder_steps", "small_decoder_steps", "learning_rate", "norm_scope"))  # fmt: skip
        typer.echo(f"next: posecrafter-rt build-engine {shlex.quote(str(output))}", err=True)

"""`posecrafter-rt render`: an engine and poses → a video, a contact sheet and report.json.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from posecrafter_rt.cli.arguments import parse_range, parse_segment
from posecrafter_rt.cli.main import GOES_ON, heed_quota
from posecrafter_rt.cli.output import print_json, print_table, size_of, step_progress

app = typer.Typer()


@app.command()
def render(  # noqa: PLR0913 - one argument for each option
    ctx: typer.Context,
    engine: Annotated[Path, typer.Argument(help="What `posecrafter-rt build-engine` made.", show_default=False)],
    poses: Annotated[Path, typer.Option(help="Target poses: OpenPose JSON, one file or a folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The video; its .png and .report.json go beside it.")
    ] = Path("out.mp4"),
    frame_range: Annotated[
        str | None, typer.Option("--range", metavar="START:END", help="Render only these of the poses.")
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option(
            metavar="START:END",
            help="Re-render only these frames of --video, from its own poses; keep the others, cropped to the engine's size.",
        ),
    ] = None,
    video: Annotated[Path | None, typer.Option(help="The video, or folder of images, that --replace is for.")] = None,
    mode: Annotated[
        str, typer.Option(help="controlvideo, +selection, +insertion or +editing (PoseCrafter).")
    ] = "+editing",
    preset: Annotated[
        str,
        typer.Option(help="exact, balanced or fast: sets steps, sampler, substeps and features kept, unless given."),
    ] = "exact",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; else the preset's (exact: 50).", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, dpmpp or unipc; else the preset's (exact: ddim).")] = None,
    inversion_substeps: Annotated[
        int | None, typer.Option(help="Parts of each step of the inversion; else the preset's or the base's.", min=1)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Share of the noise schedule that is sampled, above 0, up to 1; else what the base recommends."
        ),
    ] = None,
    controlnet_every: Annotated[
        int | None,
        typer.Option(help="Run the ControlNet every so many steps; 1 is exact; else the preset's.", min=1),
    ] = None,
    unet_every: Annotated[
        int | None,
        typer.Option(help="Run the whole U-Net every so many steps; 1 is exact; else the preset's.", min=1),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="full, or small (faster, slightly less accurate, where the engine has one); else the preset's."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Target prompt; else that of tuning.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="1: none; 3 suits edits by prompt.")] = 1.0,
    control_scale: Annotated[float, typer.Option(help="Weight of the poses.")] = 1.0,
    tau: Annotated[int, typer.Option(help="Sampling step before which face and hands are moved.", min=1)] = 1,
    resample: Annotated[str, typer.Option(help="bilinear, nearest or unit_variance.")] = "bilinear",
    segment: Annotated[
        str | None,
        typer.Option(help="Frames rendered jointly, or auto, so that memory stays flat; else the whole clip."),
    ] = None,
    overlap: Annotated[int, typer.Option(help="Frames that neighbouring segments share and blend.")] = 4,
    person: Annotated[
        int | None, typer.Option(help="Which of several people in the poses, from 0; else the largest.")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Else that of --video, unless it is a folder; else of the poses, else 25.", min=0.1),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the outputs if they are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Render the person of ENGINE in every pose."""
    if (replace is None) != (video is None):
        raise typer.BadParameter("--replace says which frames, --video of what: give both")
    if replace is not None and frame_range is not None:
        raise typer.BadParameter("--range does not go with --replace, which names the poses to render by itself")
    window = parse_range(frame_range if replace is None else replace)
    from posecrafter_rt.atomic import refuse_among, refuse_sources
    from posecrafter_rt.avatar import Avatar
    from posecrafter_rt.method import check_shared_keypoints
    from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, DEFAULT_FPS
    from posecrafter_rt.poses.openpose_json import read_openpose
    from posecrafter_rt.poses.shown import shown_poses
    from posecrafter_rt.rendering import goes_on, output_paths, refuse_outputs, render_to_files
    from posecrafter_rt.runtime.presets import preset_options
    from posecrafter_rt.runtime.report import describe_adjustment
    from posecrafter_rt.runtime.stretch import open_stretch
    from posecrafter_rt.video_io import VideoWriter

    refuse_outputs(output, force)
    VideoWriter(output, fps or DEFAULT_FPS, force=True)  # checks the name and the rate before the engine is loaded
    for path in output_paths(output):
        refuse_sources(path, poses)
    refuse_among(output, poses, "poses")
    given = {"num_inference_steps": steps, "sampler": sampler, "inversion_substeps": inversion_substeps,
             "controlnet_every": controlnet_every, "unet_every": unet_every, "decoder": decoder}  # fmt: skip
    options = preset_options(
        preset, mode=mode, prompt=prompt, guidance_scale=guidance_scale, conditioning_scale=control_scale, tau=tau,
        resample=resample, strength=strength, segment=parse_segment(segment), overlap=overlap,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    heed_quota()
    least = CONFIDENCE_THRESHOLD if options.selects else 0.0  # what the reference is selected by
    try:
        target = read_openpose(poses, person=person, allow_missing=True)
        if video is None:
            target = shown_poses(target, window, poses, least=least)
        with Avatar.load(engine) as avatar, step_progress("loading") as on_step:
            stretch = None if video is None else open_stretch(video, window, avatar.size, target)
            if stretch is not None:
                beside = "choose a --replace whose frames, and the one on either side, show the person"
                window = stretch.rendered
                target = shown_poses(target, window, poses, instead=beside, least=least)
            if options.selects:  # the render checks this again, but knows only the frames that it is given
                check_shared_keypoints(avatar.poses, target, first=window.start or 0)
            rate = target.fps if stretch is None or stretch.video.is_dir() else stretch.fps
            target = dataclasses.replace(target, fps=fps or rate)
            report = render_to_files(avatar, target, output, options, stretch=stretch, force=force, on_step=on_step)
    except KeyboardInterrupt:
        ctx.meta[GOES_ON] = goes_on(output)
        raise
    if as_json:
        print_json(report)
        return
    seconds = report["seconds"]
    print_table([
        ("video", str(output)),
        ("beside it", ", ".join(path.name for path in output_paths(output)[1:])),
        *([("replaced", f"frames {stretch.start} to {stretch.stop - 1} of {stretch.video}")] if stretch else []),
        ("reference", f"training frame {report['reference_index']}, inversion {'cached' if report['inversion_cached'] else 'computed'}"),
        ("edits", f"{report['edited_regions']} regions moved, {len(report['skipped_regions'])} left (see the report)"),
        ("approximations", ", ".join(f"{name} {value}" for name, value in report["approximations"].items()) or "none"),
        *_segments_row(report),
        *(("adjusted", describe_adjustment(adjustment)) for adjustment in report["adjustments"]),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())),
        ("memory", size_of(report["peak_rss_bytes"])),
    ])  # fmt: skip


def _segments_row(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Describe the segments that were rendered, which may not be those asked for, if the clip was split."""
    resumed, reason = report["num_resumed"], report["segment_reason"]
    if report["num_segments"] == 1:
        return [("segments", f"none: {reason}")] if reason else []
    overlaps = report["overlaps"][:-1]  # nothing comes after the last one
    shared = " to ".join(map(str, sorted({min(overlaps), max(overlaps)})))
    text = f"{report['num_segments']} of {max(report['segments'])} frames at most, {shared} shared"
    notes = [text, *([reason] if reason else []), *([f"{resumed} from an interrupted run"] if resumed else [])]
    return [("segments", "; ".join(notes))]

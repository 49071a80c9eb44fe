"""`posecrafter-rt build-engine`: tuned.ckpt → an engine folder.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from posecrafter_rt.cli.arguments import AsJson, parse_lora, parse_size
from posecrafter_rt.cli.main import heed_quota
from posecrafter_rt.cli.output import print_json, print_table, size_of, stages

app = typer.Typer()


@app.command()
def build_engine(  # noqa: PLR0913 - one argument for each option
    checkpoint: Annotated[Path, typer.Argument(help="What `posecrafter-rt tune` wrote.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The folder; else the checkpoint's name with .engine for .ckpt or .safetensors."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto (the first choice here), tensorrt, openvino, torch or inductor.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto (what is fast here), fp32, bf16, fp16 or int8.")] = "auto",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Picture size, of tuning's shape; else that of tuning.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base is, if it moved since tuning.")] = None,
    controlnet: Annotated[str | None, typer.Option(help="Where its ControlNet is, if that moved.")] = None,
    vae: Annotated[str | None, typer.Option(help="Where its VAE is, if that moved.")] = None,
    refit: Annotated[
        Path | None,
        typer.Option(
            help="Reuse the networks of this engine, built from another checkpoint of the same base; only weights change."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="Fuse a LoRA for Stable Diffusion 1.5; repeatable."),
    ] = None,
    small_decoder: Annotated[
        str | None,
        typer.Option(
            help="A folder or hub id of a TAESD (AutoencoderTiny) of the base's VAE, in place of the tuned "
            "small decoder."
        ),
    ] = None,
    feature_reuse: Annotated[
        bool | None,
        typer.Option(
            "--feature-reuse/--no-feature-reuse",
            help="Also build what `render --unet-every` and preset balanced need; else as in --refit's engine, or yes.",
            show_default=False,
        ),
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="tensorrt: most frames rendered jointly, the reference included; else 64, or fewer beyond 512x512.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an output that is not an engine; try again what auto passed over before."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build an engine from a checkpoint. Where the same engine was built already, nothing is done."""
    picture_size, given = parse_size(size), [parse_lora(text) for text in lora or ()]
    from posecrafter_rt.building import BuildOptions, build_engine
    from posecrafter_rt.engines.folder import shared_bytes
    from posecrafter_rt.machine import watched_peak
    from posecrafter_rt.models.lora import Lora

    heed_quota()
    start = time.monotonic()
    with watched_peak() as peak_bytes, stages("building") as on_stage:
        options = BuildOptions(backend, precision, picture_size, base, refit, tuple(Lora(*one) for one in given),
                               small_decoder, feature_reuse, max_frames, controlnet, vae)  # fmt: skip
        result = build_engine(checkpoint, output, options, force=force, progress=on_stage)
        peak = peak_bytes()
    folder = result.folder
    built = (folder.path / name for name in folder.manifest["files"])
    num_bytes = sum(path.stat().st_size for path in built if path.is_file())  # another build may have replaced it
    shared = shared_bytes(folder.path, folder.manifest["files"])
    summary = {
        "engine": str(folder.path), "was_current": result.was_current, "backend": folder.manifest["backend"],
        "backend_reason": result.backend_reason, "precision": folder.manifest["precision"],
        "size": folder.manifest["size"], "loras": folder.manifest.get("loras", []), "bytes": num_bytes,
        "shared_bytes": shared, "seconds": round(time.monotonic() - start, 2), "peak_rss_bytes": peak,
    }  # fmt: skip
    if as_json:
        print_json(summary)
        return
    print_table([
        ("engine", f"{folder.path}{'  (was current: nothing to do)' if result.was_current else ''}"),
        ("backend", f"{summary['backend']} {summary['precision']} ({result.backend_reason})"),
        ("size", "x".join(map(str, folder.manifest["size"]))),
        *((f"LoRA {said['file']}", f"scale {said['scale']:g}") for said in summary["loras"]),
        ("on disk", size_of(num_bytes) + (f", {size_of(shared)} of it shared with other engines" if shared else "")),
        ("took", f"{summary['seconds']} s, {size_of(peak)} of memory"),
    ])  # fmt: skip
    typer.echo(f"next: posecrafter-rt render {shlex.quote(str(folder.path))} --poses poses.json -o out.mp4", err=True)

"""`posecrafter-rt demo`: the whole path on real footage.

Layer 8: arguments, the steps in order, the printed table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posecrafter_rt.cli.main import GOES_ON, heed_quota
from posecrafter_rt.cli.output import print_json, print_table, size_of, stages, step_progress
from posecrafter_rt.errors import OutputExists

app = typer.Typer()

ROWS = {"render": "render (+editing)", "controlvideo": "mode controlvideo", "repeated_reference": "reference repeated"}


@app.command()
def demo(  # noqa: PLR0913 - one argument for each option
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything the demo makes.")] = Path(
        "demo"
    ),
    tuning_steps: Annotated[int | None, typer.Option(help="Else the embedded base's own.", min=1)] = None,
    decoder_steps: Annotated[int | None, typer.Option(help="Else the embedded base's own.", min=0)] = None,
    small_decoder_steps: Annotated[int | None, typer.Option(help="Else the embedded base's own.", min=0)] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    force: Annotated[bool, typer.Option("--force", help="Do everything again, even if it was done before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json.")] = False,
) -> None:
    """Tune on 8 frames of a man speaking in a car, render frames that tuning never saw, and compare."""
    from posecrafter_rt.atomic import partial_path
    from posecrafter_rt.demo.run import Demo
    from posecrafter_rt.tuning import TuneOptions

    tuning = TuneOptions(
        steps=tuning_steps, decoder_steps=decoder_steps, small_decoder_steps=small_decoder_steps)  # fmt: skip
    heed_quota()
    run = Demo(output, steps, tuning, force)
    try:
        with step_progress("tuning") as on_step:
            run.tune(on_step)
    except KeyboardInterrupt:
        ctx.meta[GOES_ON] = partial_path(run.checkpoint).exists()
        raise
    except OutputExists as error:
        error.hint = (error.hint or "").replace("--steps", "--tuning-steps")  # which has that name in `tune`
        raise
    ctx.meta[GOES_ON] = not force
    with stages("building") as on_stage:
        run.build(on_stage)
    with step_progress("rendering") as on_step:
        scores = run.render(on_step)
    metrics = run.finish(scores)
    if as_json:
        print_json(metrics)
        return
    rows = [(label, f"{metrics[name]['psnr']:.2f}", f"{metrics[name]['ssim']:.3f}") for name, label in ROWS.items()]
    print_table(rows, header=("74 unseen frames against the truth", "PSNR dB", "SSIM"))
    seconds = run.seconds
    print_table([
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + f", all {sum(seconds.values()):.0f}"),
        ("peak memory", size_of(metrics["peak_rss_bytes"])),
        ("look at", f"{output}/contact_sheet.png, {output}/side_by_side.mp4"),
    ])  # fmt: skip

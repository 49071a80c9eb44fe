"""What each preset takes, stage by stage, for a long clip: time and memory, not quality (that is `quality.py --presets`).

Bench: `python -m bench.presets [ENGINE] [--json FILE] [--quick]` writes results/presets-<device>.json and .md, or FILE and its .md; with
--quick alone (the embedded base, 8 frames) it only prints. `--base random-sd15` has the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.flops import Counters, Setup, count_flops
from bench.processes import in_own_process
from bench.report import add_output_arguments, name_by_device, publish, table
from bench.runs import forget_inversions, moving_person
from bench.throughput import add_engine_arguments, find_engine, measure_peak
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.models.small_decoder import new_small_decoder
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.runtime.options import RenderOptions

Row = dict[str, Any]
STAGES = ("prepare", "invert", "denoise", "decode")
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"preset": "exact"},
    "exact, inversion cached": {"preset": "exact"},
    "balanced": {"preset": "balanced"},
    "fast": {"preset": "fast"},
    "fast, small decoder": {"preset": "fast", "decoder": "small"},
}
# What is to be reached on a card at 512 × 512 with 100 frames, in seconds.
TARGETS = {"RTX 3090": {"exact": 115, "balanced": 40, "fast": 12}, "H100": {"exact": 12, "balanced": 4, "fast": 1.5}}


def measure(engine: Path, way: str, num_frames: int) -> Row:
    """One render, after one of few steps, so that nothing is compiled in it; in a process of its own."""
    with Avatar.load(engine) as avatar:
        target = moving_person(num_frames, avatar.size, phase=1.0)
        options = avatar.resolve(**WAYS[way])
        avatar.render(target, options, num_inference_steps=max(3, options.num_inference_steps // 10))
        if not way.endswith("cached"):
            forget_inversions(avatar)
        else:
            avatar.render(target[:1], options)
        start = time.perf_counter()
        avatar.render(target, options)
        total = time.perf_counter() - start
        assert avatar.last_report is not None
        is_inverted = avatar.last_report.inversion_cached
        num_steps = options.num_inference_steps - options.start_step
        num_whole = math.ceil(num_steps / options.unet_every)
        return {"total_s": total, "seconds": avatar.last_report.seconds, "peak_bytes": peak_rss_bytes(),
                "peak_gpu_bytes": avatar.last_report.peak_gpu_bytes, "sampled": num_whole, "shallow": num_steps - num_whole,
                "inverted": 0 if is_inverted else count_inversion(avatar, options), "decoder": options.decoder}  # fmt: skip


def count_inversion(avatar: Avatar, options: RenderOptions) -> int:
    """Network evaluations of the inversion."""
    schedule, substeps = avatar.schedules[options.sampler], options.inversion_substeps
    assert substeps is not None
    return len(schedule.inversion_timesteps(options.num_inference_steps, substeps, options.start_step))


def count_flops_of(counters: Counters, setup: Setup, row: Row) -> int:
    """What a render computed, as the ledger counts; text and timestep tables are left out, which are next to nothing."""
    frame, picture = counters.latents(setup, 1), counters.pixels(setup, 1)
    poses = (setup.frames + 1) * counters.network("pose_embedding", picture).flops
    encoded = counters.network("vae_encoder", picture).flops if row["inverted"] else 0
    inverted = row["inverted"] * counters.exact_step(setup, 1).flops
    sampled = row["sampled"] * counters.exact_step(setup, setup.frames + 1).flops
    sampled += row["shallow"] * counters.shallow_step(setup, setup.frames + 1).flops
    if row["decoder"] == "small":
        small = new_small_decoder(counters.arch.latent_channels, counters.arch.vae_scale_factor, torch.Generator()).to(
            "meta"
        )
        decoded = count_flops(lambda: small(frame))
    else:
        decoded = counters.network("vae_decoder", frame).flops
    return poses + encoded + inverted + sampled + setup.frames * decoded


def markdown(document: Row) -> str:
    """The results as a table."""
    setup, facts = document["setup"], document["machine"]
    rows = {way: row for way, row in document["rows"].items() if "error" not in row}
    size = "×".join(map(str, setup["size"]))
    goals = next((goals for card, goals in TARGETS.items() if card in str(facts.get("gpu", ""))), {})
    if setup["size"] != [512, 512] or setup["frames"] != 100:
        goals = {}
    lines = [f"# Presets: {setup['frames']} frames at {size}, {setup['base']}, {setup['backend']} {setup['precision']}", "",
             f"Machine: {', '.join(f'{key} {value}' for key, value in facts.items())}.", "",
             "Seconds of one render after a shorter one, engine loaded; the inversion is in it unless it says cached. FLOPs are the",
             "ledger's; peak is that of a large matrix product in the engine's type.", ""]  # fmt: skip
    header = ("preset", "s", "goal", "frames/s", *STAGES, "TFLOP/s", "% of peak", "peak MB", "peak GPU MB")
    cells = []
    for way, row in rows.items():
        goal = f"{goals[way]:g}" if way in goals else ""
        stages = [f"{row['seconds'].get(stage, 0.0):.2f}" for stage in STAGES]
        memory = [f"{row[name] / 1e6:.0f}" for name in ("peak_bytes", "peak_gpu_bytes")]
        rate = row["flops"] / row["total_s"]
        speed = (f"{rate / 1e12:.3g}", f"{100 * rate / document['peak_flops_per_s']:.0f}")
        cells.append(
            (way, f"{row['total_s']:.2f}", goal, f"{setup['frames'] / row['total_s']:.1f}", *stages, *speed, *memory)
        )
    cells += [(way, f"failed: {row['error']}") for way, row in document["rows"].items() if "error" in row]
    return "\n".join([*lines, *table(header, cells)])


def parse() -> argparse.Namespace:
    """The command line; --quick changes the number of frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add_output_arguments(parser, "8 frames")
    options = parser.parse_args()
    options.frames = options.frames or (8 if options.quick else 100)
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="presets-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        engine = find_engine(options, folder)
        rows = {}
        for way in options.ways:
            rows[way] = in_own_process(measure, engine, way, options.frames)
            print(way, rows[way], file=sys.stderr, flush=True)
        with Avatar.load(engine) as avatar:
            manifest = avatar.folder.manifest
    setup = {"frames": options.frames, "base": Path(manifest["base"]).name,
             **{name: manifest[name] for name in ("size", "backend", "precision")}}  # fmt: skip
    peak = in_own_process(measure_peak, manifest["precision"])["flops_per_s"]
    counters, size = Counters(locate_base(manifest["base"]).configs), tuple(manifest["size"])
    for row in rows.values():
        if "error" not in row:
            row["flops"] = count_flops_of(counters, Setup(size, options.frames), row)
    document = {"setup": setup, "machine": machine(), "peak_flops_per_s": peak, "rows": rows}
    publish(name_by_device("presets", document["machine"]), document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

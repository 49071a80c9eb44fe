"""The FLOP ledger: what ControlVideo, PoseCrafter as published and this runtime compute, and what each identity saves.

Bench: `python -m bench.ledger [--json FILE] [--quick]` takes seconds and needs no weights. Writes results/ledger.json
and .md, or FILE and its .md. --quick takes the embedded base, 8 frames and 10 steps, and only prints unless --json is
given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.flops import Count, Counters, Setup
from bench.hardware import GPUS
from bench.report import new_parser, publish, table
from posecrafter_rt.models.sources import EMBEDDED_FOLDER, SD15_FOLDER

SHARE_OF_PEAK = 0.5
QUICK = Setup((128, 160), 8, 10)

# Estimates made before the networks were counted, for SD 1.5, 512², N = 100, 50 steps: PFLOP, and GFLOP per frame.
ESTIMATES = {
    "plain": 12.0, "published": 6.14, "exact": 5.80, "U-Net, images alone": 803, "ControlNet": 283,
    "pose embedding": 14.7, "temporal projections": 63, "key-frame K and V": 36, "VAE decoder": 2515,
}  # fmt: skip


def network_flops(counters: Counters, setup: Setup) -> dict[str, int]:
    """Return the FLOPs of every network and its notable parts, per frame and step unless the name says otherwise."""
    frames = setup.frames + 1
    latents, pictures = counters.latents(setup, 1), counters.pixels(setup, 1)
    image_step = counters.image_step(setup)
    step, clip = counters.plain_step(setup, 1), counters.plain_step(setup, frames)
    return {
        "U-Net, images alone": image_step["U-Net"],
        "ControlNet": image_step["ControlNet"],
        "pose embedding": step.parts["pose embedding"],
        "temporal projections": step.parts["temporal q, k, v"] + step.parts["temporal output"],
        # All else is linear in the number of frames; here every frame meets every other.
        "temporal attention products": (clip.flops - frames * step.flops) // (frames - 1),
        "key-frame K and V": step.parts["key-frame K and V"],
        "text K and V": step.parts["text K and V"],
        "timestep projections": step.parts["timestep projections"],
        "plain step, one frame of the clip": clip.flops // frames,
        "exact step, one frame of the clip": counters.exact_step(setup, frames).flops // frames,
        "VAE encoder": counters.network("vae_encoder", pictures).flops,
        "VAE decoder": counters.plain_decode(setup).flops,
        "VAE decoder, folded": counters.network("vae_decoder", latents).flops,
        "text encoder": counters.network("text_encoder", counters.input_ids()).flops,
    }


SAVED_PARTS = {
    "K and V of key-frame attention for the key frame only": "key-frame K and V",
    "text K and V once a prompt": "text K and V",
    "pose embedding once a pose": "pose embedding",
    "timestep projections as tables": "timestep projections",
    "conv_temp and attn_temp.to_out as one map": "temporal output",
    "doubling a picture and convolving it as one map": "doubling",
}


def published_to_exact(counters: Counters, setup: Setup, published: Count, exact: Count) -> dict[str, int]:
    """Return what each identity of METHOD saves of `published`. Layers are counted by hand, so the sum is a check."""
    saved = {what: published.parts[part] - exact.parts[part] for what, part in SAVED_PARTS.items()}
    saved["one encoding of one prompt"] = counters.network("text_encoder", counters.input_ids()).flops
    decoded = counters.plain_decode(setup)
    saved["the inserted frame is not decoded"] = decoded.flops - decoded.parts["doubling"]  # doubling is counted above
    return saved


def plain_to_published(counters: Counters, setup: Setup) -> dict[str, int]:
    """Return what inverting only one frame saves of `plain`, and what the inserted frame costs."""
    step, steps = counters.plain_step, setup.num_inference_steps
    encoded = counters.network("vae_encoder", counters.pixels(setup, 1)).flops
    decoded = counters.plain_decode(setup).flops
    inverted = step(setup, setup.frames).flops - step(setup, 1).flops
    inserted = step(setup, setup.frames + 1).flops - step(setup, setup.frames).flops
    return {
        "one frame is inverted, not all": steps * inverted + (setup.frames - 1) * encoded,
        "the reference is inserted (a cost)": -steps * inserted - decoded,
        "latents are edited (a cost)": -counters.edit(setup).flops,
    }


def make_ledger(configs: Path, setup: Setup) -> dict[str, Any]:
    """Return the whole ledger as plain numbers, in FLOPs unless a name says otherwise."""
    counters = Counters(configs)
    counts = {"plain": counters.plain(setup), "published": counters.published(setup), "exact": counters.exact(setup)}
    return {
        "setup": {"size": list(setup.size), "frames": setup.frames, "steps": setup.num_inference_steps,
                  "guidance_scale": 1, "torch": torch.__version__},
        "algorithms": {name: {"total": count.total, "stages": dict(count.stages), "parts": dict(count.parts)}
                       for name, count in counts.items()},
        "identities": {
            "plain to published": plain_to_published(counters, setup),
            "published to exact": published_to_exact(counters, setup, counts["published"], counts["exact"]),
        },
        "inversion_cached": sum(counts["exact"].stages[stage] for stage in ("encode", "invert")),
        "unconditional_pass": counts["exact"].stages["sample"],
        "plain_with_insertion": counters.baseline(setup, setup.frames + 1, setup.frames + 1, edits=True).total,
        "networks": network_flops(counters, setup),
        "projection": {"share_of_peak": SHARE_OF_PEAK, "seconds": {
            gpu.name: {name: count.total / (SHARE_OF_PEAK * gpu.tensor_flops) for name, count in counts.items()}
            for gpu in GPUS}},
    }  # fmt: skip


def estimate(name: str, value: float, is_real_size: bool) -> tuple[str, str]:
    """Return an earlier estimate and how far the count is from it, or two empty strings."""
    if not is_real_size or name not in ESTIMATES:
        return "", ""
    return f"{ESTIMATES[name]:g}", f"{100 * (value / ESTIMATES[name] - 1):+.1f} %"


def markdown(ledger: dict[str, Any], base: str) -> str:
    """Format the ledger as tables."""
    setup, algorithms = ledger["setup"], ledger["algorithms"]
    is_real_size = base == "SD 1.5" and setup["frames"] == 100
    totals = {name: algorithm["total"] for name, algorithm in algorithms.items()}
    height, width = setup["size"]
    lines = [f"# FLOPs of {base} at {height}×{width}, {setup['frames']} frames, {setup['steps']} steps", ""]
    lines += ["Counted on shapes by `python -m bench.ledger`: matrix products, convolutions and attentions; a multiply-add",
              "is 2. Nothing here was timed. **plain**: ControlVideo's algorithm (every frame inverted). **published**:",
              "PoseCrafter as its paper has it (one inversion). Both compute everything anew in every step, as",
              "`bench/plain.py` does. **exact**: this runtime, its inversion cache empty. Guidance 1 throughout.", ""]  # fmt: skip
    rows = [(name, f"{total / 1e15:.3f}", f"{totals['plain'] / total:.3f}×", f"{totals['published'] / total:.3f}×",
             *estimate(name, total / 1e15, is_real_size)) for name, total in totals.items()]  # fmt: skip
    lines += table(("algorithm", "PFLOP", "plain / it", "published / it", "estimate", "off by"), rows)
    inserted = ledger["plain_with_insertion"]
    lines += [f"Plain renders {setup['frames']} frames, for ControlVideo inserts none; with the reference inserted, inverted",
              f"and decoded along it would be {inserted / 1e15:.3f} PFLOP, {inserted / totals['exact']:.3f}× exact.", ""]  # fmt: skip
    lines += ["## What each identity saves", ""]
    rows = [(what, pair.replace("to", "→"), f"{saved / 1e12:,.2f}", f"{100 * saved / totals[pair.split()[0]]:.2f} %")
            for pair, identities in ledger["identities"].items() for what, saved in identities.items()]  # fmt: skip
    lines += table(("identity", "between", "TFLOP saved", "of the former"), rows)
    lines += [f"Not in these sums: a cached inversion saves {ledger['inversion_cached'] / 1e12:,.2f} TFLOP of a later render;",
              f"guidance other than 1 would add {ledger['unconditional_pass'] / 1e12:,.0f} TFLOP, its unconditional pass,",
              "which all three do without.", "", "## Stages (TFLOP)", ""]  # fmt: skip
    names = list(dict.fromkeys(stage for algorithm in algorithms.values() for stage in algorithm["stages"]))
    rows = [(stage, *(f"{algorithm['stages'].get(stage, 0) / 1e12:,.2f}" for algorithm in algorithms.values()))
            for stage in names]  # fmt: skip
    lines += table(("stage", *algorithms), rows)
    lines += ["## Networks (GFLOP of one frame, in one step)", ""]
    rows = [(name, f"{flops / 1e9:,.2f}", *estimate(name, flops / 1e9, is_real_size))
            for name, flops in ledger["networks"].items()]  # fmt: skip
    lines += table(("what", "GFLOP", "estimate", "off by"), rows)
    lines += ["The ControlNet's figure holds its pose embedding; key-frame and text K and V are those of both networks;",
              "temporal projections are q, k, v, to_out and conv_temp. How custom operators are counted: key-frame and",
              "temporal attention 4 · queries · keys · channels, whatever their kernel; affine_warp_paste 8 an element of",
              "every frame and region, as if each region were the whole latent.", ""]  # fmt: skip
    lines += [f"## Projection, not a measurement: seconds at {SHARE_OF_PEAK:.0%} of 16-bit tensor peak", ""]
    rows = [(gpu, *(f"{seconds:,.0f}" if seconds >= 20 else f"{seconds:,.1f}" for seconds in row.values()))
            for gpu, row in ledger["projection"]["seconds"].items()]  # fmt: skip
    lines += table(("GPU", *algorithms), rows)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = new_parser(__doc__, "the embedded base, 8 frames, 10 steps")
    options = parser.parse_args()
    base, configs, setup = (
        ("embedded base", EMBEDDED_FOLDER, QUICK) if options.quick else ("SD 1.5", SD15_FOLDER, Setup())
    )
    ledger = make_ledger(configs, setup)
    publish("ledger", ledger, markdown(ledger, base), options.json, options.quick)


if __name__ == "__main__":
    main()

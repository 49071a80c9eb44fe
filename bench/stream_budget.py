"""Computes on paper what a stream needs: bytes of memory, FLOPs of a frame, and the time that these would take on GPUs.

Bench: `python -m bench.stream_budget [--json FILE] [--quick]` takes a minute at most and needs no weights. Writes
results/stream_budget.json and .md, or FILE and its .md. Nothing in it is timed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.flops import Counters, Setup
from bench.hardware import GPUS
from bench.ledger import SHARE_OF_PEAK
from bench.report import new_parser, publish, table
from posecrafter_rt.engines.base import DTYPES
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.models.sources import EMBEDDED_FOLDER, SD15_FOLDER
from posecrafter_rt.runtime.options import Decoder
from posecrafter_rt.spec import STREAM_NETWORKS, Architecture, network_specs

# Folder of the configurations, (height, width), and bytes per cached number in the engines that the base usually has.
BASES = {
    "the embedded base": (EMBEDDED_FOLDER, (128, 160), 4),
    "Stable Diffusion 1.5": (SD15_FOLDER, (512, 512), 2),
}
STEPS, WINDOWS, PAPER_WINDOW = (1, 2, 4), (0, 4, 8), 4
Row = dict[str, Any]


def memory_bytes(arch: Architecture, steps: int, window: int, element_bytes: int) -> dict[str, int]:
    """Return the bytes that streams keep. stream: keys and values of one's temporal attention. avatar: shared by all.

    What they share are the reference's keys and values of every step: those of key-frame attention in both networks,
    and those of temporal attention, from which each stream's first slot is copied. arch: must have a size.
    """
    specs = network_specs(arch)
    kept = [tensor for name in STREAM_NETWORKS for tensor in specs[name].inputs if "_kv_" in tensor.name]

    def num_bytes(kind: str, slots: int) -> int:
        shapes = [resolve_shape(tensor.dims, {"frames": steps, "window": slots})
                  for tensor in kept if tensor.name.startswith(kind)]  # fmt: skip
        return element_bytes * sum(math.prod(shape) for shape in shapes)

    return {"stream": num_bytes("temporal", window + 1), "avatar": num_bytes("keyframe", 1) + num_bytes("temporal", 1)}


def step_flops(counters: Counters, size: tuple[int, int], window: int) -> dict[str, int]:
    """Return the FLOPs of the two networks for one frame at one step, by name."""
    specs = network_specs(replace(counters.arch, size=size))
    flops = {}
    for name in STREAM_NETWORKS:
        inputs = [torch.empty(resolve_shape(tensor.dims, {"frames": 1, "window": window + 1}),
                              dtype=DTYPES.get(tensor.dtype, torch.float32), device="meta")
                  for tensor in specs[name].inputs]  # fmt: skip
        flops[name.removesuffix("_stream")] = counters.network(name, *inputs).flops
    return flops


def frame_flops(counters: Counters, size: tuple[int, int], steps: int, window: int, decoder: Decoder) -> dict[str, int]:
    """Return the FLOPs of a frame, by stage."""
    setup = Setup(size, frames=1)
    full = counters.network("vae_decoder", counters.latents(setup, 1))
    return {
        "edit": counters.edit(setup).flops,
        "pose embedding": counters.network("pose_embedding", counters.pixels(setup, 1)).flops,
        **{name: steps * flops for name, flops in step_flops(counters, size, window).items()},
        "decode": (full if decoder == "full" else counters.small_decoder(setup)).flops,
    }


def count_base(configs: Path, size: tuple[int, int], element_bytes: int) -> Row:
    """Return memory by steps and window, FLOPs of a frame by steps, and seconds on GPUs at a share of their peak."""
    counters = Counters(configs)
    arch = replace(counters.arch, size=size)
    memory = [{"steps": steps, "window": window, **memory_bytes(arch, steps, window, element_bytes)}
              for steps in STEPS for window in WINDOWS]  # fmt: skip
    frames = []
    decoders: tuple[Decoder, ...] = ("full", "small")
    for steps, decoder in product(STEPS, decoders):
        flops = frame_flops(counters, size, steps, PAPER_WINDOW, decoder)
        seconds = {gpu.name: sum(flops.values()) / (SHARE_OF_PEAK * gpu.tensor_flops) for gpu in GPUS}
        frames.append({"steps": steps, "decoder": decoder, "flops": flops, "seconds": seconds})
    return {"size": list(size), "element_bytes": element_bytes, "memory": memory, "frames": frames}


def markdown(document: Row) -> str:
    """Format the results as tables."""
    lines = ["# A stream on paper", "",
             "Counted on shapes by `python -m bench.stream_budget`; nothing here was timed.", "",
             "## Memory (MB)", "",
             "A stream: steps × (window + 1) × the sum over temporal layers of positions × 2 · channels, × bytes.",
             "For all streams of an avatar and its options together: the reference's keys and values of every step and",
             "layer.", ""]  # fmt: skip
    cells = []
    for name, base in document["bases"].items():
        what = f"{name}, {'×'.join(map(str, base['size']))}, {base['element_bytes']} bytes"
        for row in base["memory"]:
            megabytes = (f"{row[part] / 1e6:,.1f}" for part in ("stream", "avatar"))
            cells.append((what, str(row["steps"]), str(row["window"]), *megabytes))
    lines += table(("base", "steps", "window", "each stream", "its avatar"), cells)
    lines += [f"## FLOPs of a frame (GFLOP), window {document['window']}", ""]
    stages = list(next(iter(document["bases"].values()))["frames"][0]["flops"])
    cells = [(name, str(row["steps"]), row["decoder"], *(f"{row['flops'][stage] / 1e9:,.1f}" for stage in stages),
              f"{sum(row['flops'].values()) / 1e9:,.1f}")
             for name, base in document["bases"].items() for row in base["frames"]]  # fmt: skip
    lines += table(("base", "steps", "decoder", *stages, "all"), cells)
    share = f"{100 * document['share_of_peak']:g} %"
    lines += [f"## Projection, not a measurement: ms of a frame at {share} of 16-bit tensor peak", "",
              "In brackets frames a second. Of the large base alone: the small one never comes near a GPU's peak.",
              ""]  # fmt: skip
    name, base = list(document["bases"].items())[-1]
    cells = []
    for row in base["frames"]:
        times = (f"{1e3 * seconds:.1f} ({1 / seconds:.1f})" for seconds in row["seconds"].values())
        cells.append((f"{name}, {row['steps']} step{'s' * (row['steps'] > 1)}, {row['decoder']} decoder", *times))
    return "\n".join(lines + table(("", *(gpu.name for gpu in GPUS)), cells))


def main() -> None:
    """Parse the arguments, count, print, write both files."""
    parser = new_parser(__doc__, "the embedded base alone")
    options = parser.parse_args()
    bases = {name: count_base(*what) for name, what in list(BASES.items())[: 1 if options.quick else None]}
    document = {"window": PAPER_WINDOW, "share_of_peak": SHARE_OF_PEAK, "bases": bases}
    publish("stream_budget", document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

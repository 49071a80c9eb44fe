"""Times one denoising step (ControlNet + U-Net) by every backend and precision, with its distance from PyTorch float32.

Bench: `python -m bench.engines [--base embedded] [--size 128x160] [--frames 1 4 16] [--quick]` builds every backend that
can run here, calls them in turns and writes results/engines-<base>.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import RESULTS, picture_size, table, write_report
from bench.timing import compare, machine
from posecrafter_rt.engines import Engine, get_backend, names
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.models.loading import PoseModel, load_base
from posecrafter_rt.spec import network_specs

REFERENCE = "torch fp32"
PRECISIONS = ("fp32", "bf16")


def build_and_load(model: PoseModel, name: str, precision: str, folder: Path) -> tuple[dict[str, Engine], float]:
    """A backend's networks, compiled on their first call, and the seconds that building them took."""
    backend, arch = get_backend(name), model.architecture()
    networks = folder / f"{name}-{precision}"
    networks.mkdir()
    start = time.perf_counter()
    backend.build(model, arch, networks, precision, lambda stage: None)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    cache = folder / f"{name}-{precision}-compiled"
    cache.mkdir()
    return backend.load(networks, arch, precision, cache), seconds  # type: ignore[arg-type]


def denoising_step(engines: Mapping[str, Engine], inputs: dict[str, dict[str, Tensor]]) -> Callable[[], Tensor]:
    """What the render loop does in one step: the ControlNet's residuals go into the U-Net."""

    def call() -> Tensor:
        residuals = engines["controlnet"](**inputs["controlnet"])
        return engines["unet"](**{**inputs["unet"], **residuals})["noise_pred"]

    return call


def psnr_db(output: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio over the reference's range."""
    error = (output.float() - reference).square().mean()
    span = reference.max() - reference.min()
    return float(10 * torch.log10(span.square() / error.clamp_min(1e-30)))


@torch.no_grad()
def run(base: str, size: tuple[int, int], frame_counts: list[int], budget_s: float) -> list[dict[str, Any]]:
    """One row for each backend, precision and frame count."""
    model = load_base(base)
    model.fold()
    specs = network_specs(model.architecture())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        built: dict[str, tuple[dict[str, Engine], float]] = {}
        for name in reversed(names()):
            for precision in PRECISIONS:
                reason = get_backend(name).unsupported_reason(precision)  # type: ignore[arg-type]
                if reason is None:
                    built[f"{name} {precision}"] = build_and_load(model, name, precision, Path(folder))
                else:
                    print(f"{name} {precision}: {reason}", file=sys.stderr)
        for frames in frame_counts:
            sizes = {"frames": frames, "groups": 1, "steps": 1, "window": 9, "height": size[0], "width": size[1]}
            inputs = {network: random_inputs(specs[network], sizes) for network in ("controlnet", "unet")}
            calls = {name: denoising_step(engines, inputs) for name, (engines, _) in built.items()}
            first = {}
            for name, call in calls.items():
                start = time.perf_counter()
                first[name] = (call().clone(), time.perf_counter() - start)
            for name, timing in compare(calls, budget_s=budget_s, min_repeats=2).items():
                rows.append({
                    "engine": name, "frames": frames, **timing.to_json(), "build_s": round(built[name][1], 1),
                    "first_call_s": round(first[name][1], 2), "psnr_db": round(psnr_db(first[name][0], first[REFERENCE][0]), 1),
                })  # fmt: skip
                print(rows[-1], file=sys.stderr)
    return rows


def to_markdown(result: dict[str, Any]) -> str:
    """A row for each engine, a pair of columns for each frame count; times relative to float32 PyTorch."""
    rows, counts = result["rows"], result["frame_counts"]
    cells = {(row["engine"], row["frames"]): row for row in rows}
    lines = [
        f"Base `{result['base']}`, {result['size'][0]}x{result['size'][1]} pixels, one denoising step (ControlNet + U-Net), "
        f"milliseconds (times faster than `{REFERENCE}`); {result['machine']['processor']}, "
        f"{result['machine']['torch_threads']} threads. PSNR: of the step's output against `{REFERENCE}`, the lowest.",
        "",
    ]
    table_rows = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [cells[engine, count] for count in counts]
        times = [f"{row['median_ms']:.1f} ({cells[REFERENCE, row['frames']]['median_ms'] / row['median_ms']:.2f}×)"
                 for row in own]  # fmt: skip
        lowest = min(row["psnr_db"] for row in own)
        last = (f"{min(lowest, 99):.1f}" if engine != REFERENCE else "", f"{own[0]['build_s']:.1f}",
                f"{own[0]['first_call_s']:.1f}")  # fmt: skip
        table_rows.append((engine, *times, *last))
    header = ("engine", *(f"{count} frames" for count in counts), "PSNR dB", "build s", "first call s")
    return "\n".join(lines + table(header, table_rows))


def main() -> None:
    """Parse the arguments, measure, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded", help="as for `posecrafter-rt tune`")
    parser.add_argument("--size", type=picture_size, default=(128, 160), help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="half a second for each engine instead of four")
    arguments = parser.parse_args()
    size = arguments.size
    path = arguments.json or RESULTS / f"engines-{Path(arguments.base).name}.json"
    rows = run(arguments.base, size, arguments.frames, 0.5 if arguments.quick else 4.0)
    result = {"machine": machine(), "base": Path(arguments.base).name, "size": size, "frame_counts": arguments.frames,
              "rows": rows}  # fmt: skip
    write_report(path, result, to_markdown(result))


if __name__ == "__main__":
    main()

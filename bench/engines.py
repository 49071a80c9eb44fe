"""Times one denoising step (ControlNet + U-Net) in every engine that can run here; compares it with PyTorch float32.

Bench: `python -m bench.engines [--base embedded] [--size 128x160] [--frames 1 4 16] [--json FILE] [--quick]` measures
every backend in every precision, and the engines of `bench.onnx_engines`. Each is built and run in processes of its
own, in turns. An engine that fails at one number of frames keeps its results for the numbers before. Writes
results/engines-<base>-<size>-<device>.json and .md, or FILE and its .md. --quick measures two engines unless others are
named, at up to four frames, and only prints unless --json is given. `--base random-sd15` has the size of Stable
Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.onnx_engines import ENGINES, Network
from bench.processes import in_own_process
from bench.report import name_by_device, new_parser, picture_size, publish, table
from bench.runs import wait_for_gpu
from bench.timing import machine, time_call
from bench.untrained import write_random_base
from posecrafter_rt.engines import ONLY_OF, PRECISIONS, get_backend, names
from posecrafter_rt.errors import is_out_of_memory
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.machine import peak_rss_bytes, watched_peak
from posecrafter_rt.models.loading import PoseModel, load_base
from posecrafter_rt.spec import Architecture, network_specs

REFERENCE = "torch fp32"
QUICK = (REFERENCE, "openvino fp32")  # engines that take minutes to build, such as inductor, run only if named
TARGET_SPEEDUP, TARGET_PSNR_DB = 5.0, 40.0  # of the fastest engine, compared with REFERENCE
ARCHITECTURE = "architecture.json"
SO_FAR = "so-far.json"  # what `measure` has so far, in case its process dies
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One engine. name: a key of `ENGINES`, or a backend and a precision; folder: for its networks and its outputs."""

    name: str
    base: str
    size: tuple[int, int]
    folder: Path


def candidates() -> list[str]:
    """Return the name of every engine."""
    backends = [f"{name} {precision}" for name in reversed(names()) for precision in PRECISIONS
                if ONLY_OF.get(precision, name) == name]  # fmt: skip
    return [*backends, *ENGINES]


def unsupported_reason(name: str) -> str | None:
    """Return why an engine cannot run here, or None. OpenVINO in fp16 or int8 compiles its operations to find out."""
    if name in ENGINES:
        return None
    backend, precision = name.split()
    return get_backend(backend).unsupported_reason(precision)  # type: ignore[arg-type]


def build(job: Job) -> Row:
    """Write an engine's networks. Returns: build_s, without loading the base, and the processes' peak memory."""
    model = load_base(job.base)
    model.fold()
    arch = replace(model.architecture(), size=job.size)
    job.folder.mkdir()
    (job.folder / ARCHITECTURE).write_text(json.dumps(arch.to_json()))
    start = time.perf_counter()
    with watched_peak() as peak_bytes:
        write_networks(job.name, model, arch, job.folder)
        return {"build_s": time.perf_counter() - start, "build_peak_bytes": peak_bytes()}


def write_networks(name: str, model: PoseModel, arch: Architecture, folder: Path) -> None:
    if name in ENGINES:
        ENGINES[name].build(model, arch, folder)
        return
    backend, precision = name.split()
    get_backend(backend).build(model, arch, folder, precision, lambda stage: None)  # type: ignore[arg-type]


def load_networks(name: str, arch: Architecture, folder: Path) -> dict[str, Network]:
    """Load the networks, by name; some are compiled at their first call."""
    if name in ENGINES:
        return ENGINES[name].load(folder, arch)
    backend, precision = name.split()
    return dict(get_backend(backend).load(folder, arch, precision, folder / "compiled"))  # type: ignore[arg-type]


@torch.no_grad()
def measure(job: Job, frame_counts: list[int], budget_s: float) -> Row:
    """Time a step for each number of frames. Outputs, and the results so far, are written to `job.folder`.

    Returns: load_s; peak_bytes; and by number of frames the timings of a step in ms, and first_s of the first one in
    seconds.
    """
    arch = Architecture.from_json(json.loads((job.folder / ARCHITECTURE).read_text()))
    (job.folder / "compiled").mkdir(exist_ok=True)
    start = time.perf_counter()
    networks = load_networks(job.name, arch, job.folder)
    row: Row = {"load_s": time.perf_counter() - start, "steps": {}}
    specs = network_specs(arch)
    for frames in frame_counts:
        sizes = {"frames": frames, "groups": 1, "steps": 1, "window": 9, "height": job.size[0], "width": job.size[1]}
        inputs = {name: {key: tensor.to(getattr(networks[name], "device", "cpu"))
                         for key, tensor in random_inputs(specs[name], sizes).items()}
                  for name in ("controlnet", "unet")}  # fmt: skip

        def step(inputs: dict[str, dict[str, Tensor]] = inputs) -> Tensor:
            residuals = networks["controlnet"](**inputs["controlnet"])
            return networks["unet"](**{**inputs["unet"], **residuals})["noise_pred"]

        start = time.perf_counter()
        output = step().clone().cpu()
        first_s = time.perf_counter() - start
        torch.save(output, job.folder / f"{frames}.pt")
        wait_for_gpu()
        row["steps"][str(frames)] = {**time_call(step, budget_s=budget_s, min_repeats=2).to_json(), "first_s": first_s}
        row["peak_bytes"] = peak_rss_bytes()
        complete = job.folder / f"{SO_FAR}.new"
        complete.write_text(json.dumps(row))
        complete.rename(job.folder / SO_FAR)  # a process may be killed at any time
    return row


def measure_apart(job: Job, frame_counts: list[int], budget_s: float) -> Row:
    """Run `measure` in a process of its own. If it ends early: the steps until then, and `failed` with the reason."""
    so_far = job.folder / SO_FAR
    so_far.unlink(missing_ok=True)  # left by an earlier round
    row = in_own_process(measure, job, frame_counts, budget_s)
    if "error" not in row:
        return row
    kept: Row = json.loads(so_far.read_text()) if so_far.exists() else {"steps": {}}
    left = [str(frames) for frames in frame_counts if str(frames) not in kept["steps"]]
    return {**kept, "failed": {left[0]: row["error"]}} if left else kept


def psnr_db(output: Tensor, reference: Tensor) -> float | None:
    """Return the peak signal-to-noise ratio; the peak is the reference's range (max - min). None: not finite."""
    error = (output.float() - reference).square().mean()
    span = reference.max() - reference.min()
    quality = float(10 * torch.log10(span.square() / error.clamp_min(1e-30)))
    return quality if math.isfinite(quality) else None  # which JSON does not have


def best_of(runs: list[Row]) -> Row:
    """Return the run with the most frame counts, each with the least time of all runs; an error if none has a time."""
    farthest = max(runs, key=lambda run: len(run["steps"]))  # the first one in a tie
    failed = {frames: reason for run in runs for frames, reason in run.get("failed", {}).items()
              if frames not in farthest["steps"]}  # fmt: skip
    if not farthest["steps"]:
        return {"error": next(iter(failed.values()))}
    fastest = {frames: min((run["steps"][frames] for run in runs if frames in run["steps"]), key=lambda step: step["median_ms"])
               for frames in farthest["steps"]}  # fmt: skip
    return {**farthest, "steps": fastest, **({"failed": failed} if failed else {})}


def run(jobs: list[Job], frame_counts: list[int], budget_s: float, rounds: int) -> list[Row]:
    """Build and measure all engines. Returns: a row for each."""
    rows = {job.name: in_own_process(build, job) for job in jobs}
    runs: dict[str, list[Row]] = {job.name: [] for job in jobs if "error" not in rows[job.name]}
    for _ in range(rounds):
        for job in jobs:
            if job.name in runs:
                runs[job.name].append(measure_apart(job, frame_counts, budget_s))
                print(job.name, runs[job.name][-1], file=sys.stderr, flush=True)
    outputs = {job.name: job.folder for job in jobs}
    for name, measured in runs.items():
        rows[name] |= best_of(measured)
    known = rows[REFERENCE].get("steps", {})
    for name, row in rows.items():
        for frames in row.get("steps", {}).keys() & known:
            output, reference = (torch.load(outputs[which] / f"{frames}.pt") for which in (name, REFERENCE))
            row["steps"][frames]["psnr_db"] = psnr_db(output, reference)
    return [{"engine": name, **row} for name, row in rows.items()]


def cell_of(reason: str) -> str:
    """Describe a failure in a cell: lack of memory, or the exception's name. The full line is below the table."""
    kind, is_exception, _ = reason.partition(":")
    if is_out_of_memory(reason) or "Memory" in kind:
        return "out of memory"
    return kind if is_exception else "process died"


def time_cell(row: Row, base: Row, frames: str) -> str:
    """Return a frame count's milliseconds, with the speed-up over `base` if that has it; or why there are none."""
    if frames not in row["steps"]:
        reason = row.get("failed", {}).get(frames)
        return "–" if reason is None else cell_of(reason)
    median_ms = row["steps"][frames]["median_ms"]
    return f"{median_ms:.1f}" + (f" ({base[frames]['median_ms'] / median_ms:.2f}×)" if frames in base else "")


def to_markdown(document: Row) -> str:
    """Format a row for each engine and a column for each frame count; times are also relative to float32 PyTorch."""
    setup, facts = document["setup"], document["machine"]
    (height, width), counts = setup["size"], [str(frames) for frames in setup["frame_counts"]]
    rows = [row for row in document["rows"] if "error" not in row]
    base: Row = next((row["steps"] for row in rows if row["engine"] == REFERENCE), {})
    lines = [f"# One denoising step by each engine: {setup['base']}, {height}x{width}", "",
             f"{facts.get('gpu', facts['processor'])}, {facts['torch_threads']} threads, {facts['torch']}. Milliseconds of ControlNet "
             f"and U-Net (times faster than `{REFERENCE}`), the least median of {setup['rounds']} rounds in turns. PSNR: of the step's",
             f"output to `{REFERENCE}`'s, the lowest. First: the first step of {counts[0]} frames, where some compile. Build: of all",
             "networks; ONNX Runtime's of these two. Memory: the peak of the process that runs it, over what did run.", ""]  # fmt: skip
    cells = []
    for row in rows:
        near = [] if row["engine"] == REFERENCE else row["steps"].values()
        quality = [step["psnr_db"] for step in near if "psnr_db" in step]
        lowest = "" if not quality else "not finite" if None in quality else f"{min(99.0, *quality):.1f}"
        first = row["steps"].get(counts[0])
        cells.append((row["engine"], *(time_cell(row, base, frames) for frames in counts),
                      lowest, f"{row['build_s']:.0f}",
                      f"{first['first_s']:.1f}" if first else "", f"{row['peak_bytes'] / 1e6:.0f}"))  # fmt: skip
    header = ("engine", *(f"{frames} frames" for frames in counts), "PSNR dB", "build s", "first s", "peak MB")
    lines += table(header, cells)
    lines += [f"- {row['engine']}, {frames} frames: {reason}" for row in rows
              for frames, reason in row.get("failed", {}).items()]  # fmt: skip
    lines += [f"- {row['engine']}: {row['error']}" for row in document["rows"] if "error" in row]
    lines += [f"- {name}: {reason}" for name, reason in document["not_here"].items()]
    return "\n".join([*lines, "", *judged(rows, base, counts), ""])


def judged(rows: list[Row], base: Row, counts: list[str]) -> list[str]:
    """Name the fastest engine of sufficient quality and judge the target, over the frame counts that `base` has."""
    shared = [frames for frames in counts if frames in base]
    if not shared:
        return [f"None is judged: `{REFERENCE}` did not run."]
    good = [row for row in rows
            if all((row["steps"].get(frames, {}).get("psnr_db") or 0.0) >= TARGET_PSNR_DB
                   for frames in shared)]  # fmt: skip
    if not good:
        return [f"None is judged: `{REFERENCE}` itself is not finite."]

    def speedup(row: Row) -> float:
        return float(min(base[frames]["median_ms"] / row["steps"][frames]["median_ms"] for frames in shared))

    best = max(good, key=speedup)
    verdict = "met" if speedup(best) >= TARGET_SPEEDUP else "missed"
    where = "where it gains least" + ("" if shared == counts else f" of {', '.join(shared)} frames")
    return [f"Fastest of those with {TARGET_PSNR_DB:g} dB at least: {best['engine']}, {speedup(best):.2f} times as fast as "
            f"`{REFERENCE}` {where}. Target {TARGET_SPEEDUP:g}: {verdict}."]  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. --quick changes the defaults, the rounds and the time for each engine."""
    parser = new_parser(__doc__, f"half a second for each engine instead of four, one round, {' and '.join(QUICK)}")
    parser.add_argument("--base", default="embedded", help="as for `posecrafter-rt tune`, or random-sd15")
    parser.add_argument("--size", type=picture_size, default=(128, 160), help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument(
        "--engines", nargs="+", choices=candidates(), metavar="NAME", help=f"else all; {REFERENCE} always"
    )
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    options.frames = options.frames or ([1, 4] if options.quick else [1, 4, 16])
    options.engines = options.engines or (list(QUICK) if options.quick else candidates())
    return options


def main() -> None:
    """Build, measure, write both files."""
    options = parse()
    budget_s, rounds = (0.5, 1) if options.quick else (4.0, options.rounds)
    wanted = {REFERENCE, *options.engines}
    reasons = {name: unsupported_reason(name) for name in candidates() if name in wanted}
    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        folder = Path(temporary)
        base = str(write_random_base(folder / "base")) if options.base == "random-sd15" else options.base
        jobs = [Job(name, base, options.size, folder / name.replace(" ", "-").replace(",", ""))
                for name, reason in reasons.items() if reason is None]  # fmt: skip
        rows = run(jobs, options.frames, budget_s, rounds)
    setup = {"base": Path(options.base).name, "size": options.size, "frame_counts": options.frames, "rounds": rounds}
    document = {"setup": setup, "machine": machine(), "rows": rows,
                "not_here": {name: reason for name, reason in reasons.items() if reason is not None}}  # fmt: skip
    name = name_by_device("engines-{base}-{0}x{1}".format(*options.size, **setup), document["machine"])
    publish(name, document, to_markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

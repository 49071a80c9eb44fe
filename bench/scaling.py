"""Measures how a render's cost grows with the frames, the size and the steps: seconds, memory, and log-log slopes.

Bench: `python -m bench.scaling [--backend torch] [--json FILE] [--quick]` renders with the embedded base in float32,
jointly and in segments, and writes results/scaling.json and .md (scaling-<backend> for another backend), or FILE and
its .md. --quick only prints unless --json is given. --axes measures only some axes. Each point has a process of its own
and a warm-up of one frame. It is the fastest of its repetitions; long renders are not repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.processes import in_own_process
from bench.report import new_parser, publish, table
from bench.runs import forget_inversions, moving_person
from bench.timing import machine
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines import names
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.runtime.options import RenderOptions

AXES = {"frames": "frames", "segments": "frames, in segments", "pixels": "pixels", "steps": "steps"}  # by argument
TARGET_SLOPE = 1.0
TARGET_GROWTH = 0.03
BUDGET_S = 15.0  # after so many seconds of renders, none is repeated
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is rendered. Along each axis the other quantities stay at `num_frames`, the base's size and `steps`.

    frames: of joint renders; long: of renders in segments of `segment` frames; sides: picture sides relative to the
    base's.
    """

    frames: tuple[int, ...] = (1, 4, 16, 64, 256)
    long: tuple[int, ...] = (64, 256, 1000)
    sides: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    steps_axis: tuple[int, ...] = (2, 4, 8, 16)  # a single one is refused, because it does nothing
    num_frames: int = 8
    steps: int = 4
    segment: int = 24
    repeats: int = 3


QUICK = Plan((1, 4), (8, 16), (0.5, 1.0), (2, 4), 4, 2, 8, 1)


def measure(engine: Path, num_frames: int, options: RenderOptions, repeats: int) -> Row:
    """Render a moving person, inverting each time. Returns: seconds by stage of the fastest render, and peak memory.

    growth: for a render in more than two segments, how much larger the memory of any later one was than the second's.
    """
    runs: list[dict[str, float]] = []
    with Avatar.load(engine) as avatar:
        for frames in (1, *[num_frames] * repeats):
            if sum(sum(run.values()) for run in runs[1:]) > BUDGET_S:
                break  # a long render is its own average
            forget_inversions(avatar)
            for _ in avatar.iter_render(moving_person(frames, avatar.size, phase=1.0), options):
                pass
            assert avatar.last_report is not None
            runs.append(avatar.last_report.seconds)
            peaks = avatar.last_report.segment_peaks
    seconds = min(runs[1:], key=lambda run: sum(run.values()))
    growth = {"growth": max(peaks[2:]) / peaks[1] - 1} if len(peaks) > 2 else {}
    return {"seconds": seconds, "total_s": sum(seconds.values()), "peak_bytes": peak_rss_bytes(), **growth}


def build(folder: Path, side: float, backend: str) -> Row:
    """Build an engine of the embedded base in float32 in `folder`; its picture sides are multiplied by `side`."""
    checkpoint = folder / "tuned.ckpt"
    if not checkpoint.exists():
        untrained_checkpoint("embedded").save(checkpoint)
    height, width = (round(length * side) for length in (128, 160))
    path = folder / f"{height}x{width}.engine"
    build_engine(checkpoint, path, BuildOptions(backend, "fp32", size=(height, width)))
    return {"engine": str(path), "pixels": height * width, "size": [height, width]}


def measure_axes(plan: Plan, folder: Path, backend: str, axes: Collection[str] = AXES) -> dict[str, list[Row]]:
    """Measure every point of these AXES; `at` is where a point lies."""
    engines: dict[float, Row] = {}  # by side

    def point(axis: str, at: float, side: float, num_frames: int, steps: int, segment: int | None = None) -> Row:
        if side not in engines:
            engines[side] = in_own_process(build, folder, side, backend)
        built = engines[side]
        options = RenderOptions(num_inference_steps=steps, strength=1.0, inversion_substeps=1, segment=segment,
                                overlap=min(4, plan.segment // 3))  # fmt: skip
        measured = built if "error" in built else in_own_process(
            measure, Path(built["engine"]), num_frames, options, plan.repeats)  # fmt: skip
        row = {
            "at": at,
            "size": built.get("size"),
            "frames": num_frames,
            "steps": steps,
            "segment": segment,
            **measured,
        }
        print(f"{axis} {at:g}: {row.get('error') or format(row['total_s'], '.2f') + ' s'}", flush=True)
        return {**row, "at": built["pixels"] if axis == "pixels" and "pixels" in built else at}

    frames, steps = plan.num_frames, plan.steps
    points: dict[str, list[tuple[Any, ...]]] = {
        "frames": [(count, 1.0, count, steps) for count in plan.frames],
        "frames, in segments": [(count, 1.0, count, steps, plan.segment) for count in plan.long],
        "pixels": [(side, side, frames, steps) for side in plan.sides],
        "steps": [(count, 1.0, frames, count) for count in plan.steps_axis],
    }
    return {axis: [point(axis, *where) for where in points[axis]] for name, axis in AXES.items() if name in axes}


def slope(rows: Sequence[Row], quantity: str = "total_s") -> float | None:
    """Return the least-squares slope of log(quantity) over log(at); None with fewer than two points that succeeded."""
    points = [(row["at"], row[quantity]) for row in rows if "error" not in row]
    if len(points) < 2:
        return None
    at, cost = np.log(np.array(points, float)).T
    return float(np.polyfit(at, cost, 1)[0])


def summarise(axes: dict[str, list[Row]]) -> dict[str, Row]:
    """Return for each axis the slope over all points, and between the last two, where fixed costs weigh least."""
    return {axis: {"slope": slope(rows), "last_slope": slope(rows[-2:]), "memory_slope": slope(rows[-2:], "peak_bytes")}
            for axis, rows in axes.items()}  # fmt: skip


def judged(growth: float) -> str:
    """Format how much memory grew, and whether that meets the target."""
    return f"{growth:+.1%}: {'met' if abs(growth) <= TARGET_GROWTH else 'missed'}"


def judged_slope(axis: str, found: float | None) -> str:
    """Format an axis's slope over all points, and in frames, whether that meets the target."""
    if found is None:
        return ""
    if not axis.startswith("frames"):
        return f"{found:.2f}"
    return f"{found:.3f}: {'met' if found <= TARGET_SLOPE else 'missed'}"  # 1.003 would else read as met


def markdown(document: Row) -> str:
    """Format the results as tables."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    info = document["machine"]
    engine = f"{document.get('backend', 'torch')} fp32"
    lines = [f"# Cost of a render, embedded base, {engine}, {info['processor']}, {info['torch_threads']} threads", "",
             "Log-log slopes: 1 is proportional. The last is that between the two largest points; memory is the process's "
             f"peak, weights and libraries included. Target in frames: {TARGET_SLOPE:g} at most. Growth: how much more memory "
             f"any segment after the second took. Target: {TARGET_GROWTH:.0%} at most.", ""]  # fmt: skip
    slopes = document["slopes"]
    lines += table(("axis", "slope in time", "last", "last in memory"),
                   [(axis, judged_slope(axis, found["slope"]), number(found["last_slope"]), number(found["memory_slope"]))
                    for axis, found in slopes.items()])  # fmt: skip
    for axis, rows in document["axes"].items():
        lines += [f"## {axis[0].upper()}{axis[1:]}", ""]
        cells = []
        for row in rows:
            if "error" in row:
                cells.append((f"{row['at']:g}", f"failed: {row['error']}", *[""] * 6))
                continue
            stages = (f"{row['seconds'].get(name, 0.0):.2f}" for name in ("prepare", "invert", "denoise", "decode"))
            growth = judged(row["growth"]) if "growth" in row else ""
            cells.append((f"{row['at']:g}", f"{row['total_s']:.2f}", *stages, f"{row['peak_bytes'] / 1e6:.0f}", growth))
        lines += table((axis.split(",")[0], "s", "prepare", "invert", "denoise", "decode", "peak MB", "growth"), cells)
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = new_parser(__doc__, "few frames and steps, each point once")
    parser.add_argument("--backend", choices=names(), default="torch")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    arguments = parser.parse_args()
    backend = arguments.backend
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        axes = measure_axes(QUICK if arguments.quick else Plan(), Path(folder), backend, arguments.axes)
    document = {"machine": machine(), "backend": backend, "slopes": summarise(axes), "axes": axes}
    name = "scaling" if backend == "torch" else f"scaling-{backend}"
    publish(name, document, markdown(document), arguments.json, arguments.quick)


if __name__ == "__main__":
    main()

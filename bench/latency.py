"""Measures how long a pose takes to become a frame, how evenly frames come, and what is lost; also through a server.

Bench: `python -m bench.latency [ENGINE | --checkpoint demo/tuned.ckpt] [--json FILE] [--quick]` plays the
demonstration's poses at a camera's pace to `Avatar.stream` and to `posecrafter-rt serve`, and writes
results/latency-<device>.json and .md, or FILE and its .md. --quick takes a few seconds for each and starts one server;
it only prints unless --json is given. If a server's packages are missing, the servers are left out. On a GPU `--base
random-sd15 --size 512x512 --rate 60` has the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.live import BUDGET_FRAMES, Camera, RunFailed, measure_serve, measure_stream
from bench.report import name_by_device, new_parser, publish, table
from bench.throughput import add_engine_arguments, find_engine, is_sd15, setup_of
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.demo.footage import TARGET, load_poses
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.runtime.stream_options import StreamOptions

Row = dict[str, Any]


class Targets(NamedTuple):
    """What a stream of so many steps should reach; no frame may be overdue.

    of: a description of the case. threads: how many the targets are for; None: any number.
    """

    of: str
    steps: int
    fps: float
    p95_ms: float
    first_frame_s: float = 1.0
    threads: int | None = None

    def judge(self, row: Row) -> dict[str, tuple[str, bool]]:
        """Return, by target, what was measured and whether that meets it."""
        p95, first = row["latency_ms"]["p95"], row["first_frame_s"]
        return {
            f"at least {self.fps:g} frames/s": (f"{row['fps']:.1f}", row["fps"] >= self.fps),
            f"p95 pose to frame at most {self.p95_ms:g} ms": (f"{p95:.0f} ms", p95 <= self.p95_ms),
            f"first frame within {self.first_frame_s:g} s": (f"{first:.2f} s", first <= self.first_frame_s),
            "no frame overdue": (f"{row['num_overdue']} of {row['num_frames']}", row["num_overdue"] == 0),
        }


def targets_for(setup: Row, facts: Row) -> Targets | None:
    """Return the targets for a base and a size on this machine, if there are any."""
    gpu, size = facts.get("gpu"), setup["size"]
    if size == [128, 160] and setup["base"] == "embedded" and gpu is None:
        return Targets("the embedded base at 128×160 on two cores", 4, 20, 150, threads=2)
    if size == [512, 512] and is_sd15(setup) and gpu is not None:
        is_hopper = any(name in gpu for name in ("H100", "H200"))
        return Targets("Stable Diffusion 1.5 at 512×512", 2, 40 if is_hopper else 16, 200)
    return None


def benchmark(engine: Path, options: argparse.Namespace) -> Row:
    """Measure every way of streaming in this process, unload its networks, then measure the servers."""
    rows: list[Row] = []
    plain = {"window": options.window, "decoder": options.decoder}
    streams = []
    for steps in options.steps:
        kinds: list[Row] = [{}, *({"unet_every": every} for every in (2, 4) if every <= steps)]
        kinds += [{"is_pipelined": True}] if steps > 1 else []
        streams += [StreamOptions(steps=steps, **kind, **plain) for kind in kinds]

    def add(way: str, stream: StreamOptions, measure: Callable[[], Row]) -> None:
        row: Row = {"way": way, "steps": stream.steps, "is_pipelined": stream.is_pipelined,
                    "unet_every": stream.unet_every}  # fmt: skip
        try:
            row |= measure()
        except RunFailed as error:
            row["error"] = str(error)
        rows.append(row)
        print(row, file=sys.stderr)

    begin = time.perf_counter()
    with Avatar.load(engine) as avatar:
        load_s = time.perf_counter() - begin
        camera = Camera(transform_keypoints(load_poses(), avatar.size)[TARGET], options.rate, options.seconds)
        for stream in streams:
            add("stream", stream, partial(measure_stream, avatar, stream, camera))
        manifest, used = avatar.folder.manifest, options.decoder or ("small" if avatar.has_small_decoder else "full")
    for stream in streams:
        if not options.quick or stream == StreamOptions(steps=options.steps[-1], **plain):
            add("serve", stream, partial(measure_serve, engine, stream, camera))
    setup = {**setup_of(manifest), "window": options.window, "decoder": used, "rate": options.rate,
             "seconds": options.seconds}  # fmt: skip
    return {"machine": machine(), "setup": setup, "load_s": round(load_s, 3), "rows": rows}


def name_of(row: Row) -> str:
    """Return a row's name in the tables."""
    steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
    every = f", U-Net every {row['unet_every']}" if row.get("unet_every", 1) > 1 else ""
    return f"{row['way']}, {steps}" + every + (", pipelined" if row["is_pipelined"] else "")


def markdown(document: Row) -> str:
    """Format the results as tables."""
    setup, facts = document["setup"], document["machine"]
    rows = [row for row in document["rows"] if "error" not in row]
    size = "×".join(map(str, setup["size"]))
    lines = [
        f"# Latency of a stream at {size}, {setup['backend']} {setup['precision']}", "",
        f"Machine: {', '.join(f'{key} {value}' for key, value in facts.items())}.", "",
        f"Poses of the demonstration's footage, {setup['rate']:g} a second for {setup['seconds']:g} s, window "
        f"{setup['window']}, {setup['decoder']} decoder; the newest pose wins.",
        "Times in ms. Pose to frame: from when the pose is there to when its frame is there as an array; with serve",
        "over a WebSocket on loopback, JPEG decoded. Jitter: how intervals between frames change from one to the next.",
        "Behind: how much older a frame's pose is than the newest. Overdue: frames that came later after the pose that",
        "follows theirs than a frame takes. Repeats: poses that had not moved, for which nothing was computed.",
        "Frame: the step that gave it alone, without what its pose waited; with serve as the server says.", "",
    ]  # fmt: skip
    header = ("way", "p50", "p95", "p99", "jitter std", "jitter p95", "frames/s", "dropped", "behind p50", "behind p95",
              "behind max", "overdue", "repeats", "frame p50", "frame p95", "frame p99")  # fmt: skip
    cells = []
    for row in rows:
        times = [*row["latency_ms"].values(), *row["jitter_ms"].values()]
        behind = [f"{value:.0f}" for value in row["behind_ms"].values()]
        frame = [f"{row['frame_ms'][rank]:.1f}" if "frame_ms" in row else "" for rank in ("p50", "p95", "p99")]
        cells.append((name_of(row), *(f"{value:.1f}" for value in times), f"{row['fps']:.1f}",
                      f"{row['num_dropped']} of {row['num_poses']}", *behind,
                      f"{row['num_overdue']} of {row['num_frames']}", str(row["num_repeats"]), *frame))  # fmt: skip
    cells += [(name_of(row), row["error"]) for row in document["rows"] if "error" in row]
    lines += [
        *table(header, cells), "## To the first frame (s)", "",
        f"Loading the engine into a process took {document['load_s']:.2f} s. Start: of a stream, the first of its",
        "options, which samples the reference, to its first frame; of a server, from its process's start to serving.",
        "First frame: of a later stream; of a client, from connecting.", "",
    ]  # fmt: skip
    cells = [
        (name_of(row), f"{row.get('open_s', row.get('start_s')):.2f}", f"{row['first_frame_s']:.2f}") for row in rows
    ]
    lines += table(("way", "start", "first frame"), cells)
    staged = [row for row in rows if "stages_ms" in row]
    if staged:
        lines += ["## Where a frame's time goes (ms)", "",
                  f"Means of {BUDGET_FRAMES} frames, one after another without a camera; frames/s: what that comes to.",
                  ""]  # fmt: skip
        cells = [(name_of(row), *(f"{value:.1f}" for value in row["stages_ms"].values()),
                  f"{1e3 / row['stages_ms']['all']:.1f}") for row in staged]  # fmt: skip
        lines += table(("way", *staged[0]["stages_ms"], "frames/s"), cells)
    return "\n".join(lines + judged(document, rows))


def judged(document: Row, rows: list[Row]) -> list[str]:
    """Compare the targets with what was measured."""
    targets, threads = targets_for(document["setup"], document["machine"]), document["machine"].get("torch_threads")
    rows = [row for row in rows if targets is not None and row["steps"] == targets.steps]
    if targets is None or not rows:
        return []
    if targets.threads not in (None, threads):
        return [
            "## Targets",
            "",
            f"None is judged: those for {targets.of} are for {targets.threads} threads, not {threads}.",
        ]
    verdicts = [targets.judge(row) for row in rows]
    cells = [(name, *(f"{value}: {'met' if is_met else 'missed'}" for value, is_met in (one[name] for one in verdicts)))
             for name in verdicts[0]]  # fmt: skip
    return [f"## Targets for {targets.of}", "", *table(("target", *map(name_of, rows)), cells)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. --quick changes the seconds, and how many servers are started."""
    parser = new_parser(__doc__, "3 seconds each; a server of the last of --steps alone")
    add_engine_arguments(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--window", type=int, default=StreamOptions().window)
    parser.add_argument("--decoder", choices=["full", "small"], help="else small where the engine has one")
    parser.add_argument("--rate", type=float, default=25.0, help="poses a second")
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (3.0 if options.quick else 20.0)
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="latency-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        document = benchmark(find_engine(options, folder), options)
    name = name_by_device("latency", document["machine"])
    publish(name, document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

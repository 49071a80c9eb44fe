"""Measures what a render costs outside its networks: the sampler's arithmetic and the Python code in between.

Bench: `python -m bench.loop [ENGINE] [--json FILE] [--quick]` writes results/loop-<device>.json and .md, or FILE and
its .md. --quick takes few frames and one round, and only prints unless --json is given. `--base random-sd15` has the
size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.processes import in_own_process
from bench.report import name_by_device, new_parser, publish, table
from bench.runs import moving_person, wait_for_gpu
from bench.throughput import add_engine_arguments, find_engine, setup_of
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines import Engine
from posecrafter_rt.engines.manifest import read_manifest

Row = dict[str, Any]
TARGET_SHARE = 0.03  # of the denoising loop's time


class Clocked:
    """An engine that times its calls; it waits for the GPU after each."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.spec, self.device = engine, engine.spec, engine.device
        self.has_own_threads = engine.has_own_threads
        self.seconds = 0.0

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        start = time.perf_counter()
        outputs = self.engine(**inputs)
        wait_for_gpu()
        self.seconds += time.perf_counter() - start
        return outputs


def measure(path: Path, num_frames: int, num_inference_steps: int, rounds: int) -> Row:
    """Time `rounds` renders and return the one with the median share outside the networks, in seconds of its denoising.

    The inversion is cached, so the denoisers run only while denoising. A render before has compiled everything.
    `steps` are those that are done: a base's recommended strength leaves out the first ones.
    """
    rows = []
    with Avatar.load(path) as avatar:
        target = moving_person(num_frames, avatar.size, phase=1.0)
        done = num_inference_steps - avatar.resolve(num_inference_steps=num_inference_steps).start_step
        avatar.render(target, num_inference_steps=num_inference_steps)
        for _ in range(rounds):
            clocked = {name: Clocked(engine) for name, engine in avatar.engines.items()}
            avatar.networks.engines = clocked  # type: ignore[assignment]
            avatar.render(target, num_inference_steps=num_inference_steps)
            avatar.networks.engines = {name: clock.engine for name, clock in clocked.items()}
            assert avatar.last_report is not None and avatar.last_report.inversion_cached
            networks = {name: clocked[name].seconds for name in ("controlnet", "unet")}
            denoise = avatar.last_report.seconds["denoise"]
            outside = denoise - sum(networks.values())
            rows.append({"denoise_s": denoise, **networks, "outside_s": outside, "share": outside / denoise})
    return {"frames": num_frames, "steps": done, "rounds": rounds, **median_round(rows)}


def median_round(rows: list[Row]) -> Row:
    """Return the round with the median share; of an even number of rounds, the greater of the middle two."""
    return sorted(rows, key=lambda row: row["share"])[len(rows) // 2]


def markdown(document: Row) -> str:
    """Format the results as a table."""
    setup, facts = document["setup"], document["machine"]
    height, width = setup["size"]
    lines = [f"# The denoising loop: {setup['base']}, {height}x{width}, {setup['backend']} {setup['precision']}", "",
             f"{facts.get('gpu', facts['processor'])}, {facts['torch_threads']} threads. Milliseconds of one step; outside: everything "
             f"but the two networks' calls; of the rounds the one with the median share. Target: {TARGET_SHARE:.0%} of the loop at most.",
             ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        if "error" in row:
            cells.append((str(row["frames"]), f"failed: {row['error']}", "", "", "", ""))
            continue
        verdict = "met" if row["share"] <= TARGET_SHARE else "missed"
        times = (f"{1e3 * row[name] / row['steps']:.2f}" for name in ("denoise_s", "controlnet", "unet", "outside_s"))
        cells.append((str(row["frames"]), *times, f"{row['share']:.2%}: {verdict}"))
    return "\n".join([*lines, *table(("frames", "a step", "ControlNet", "U-Net", "outside", "share"), cells)])


def main() -> None:
    """Parse the arguments, measure each number of frames in a process of its own, write both files."""
    parser = new_parser(__doc__, "1 and 4 frames, one round")
    add_engine_arguments(parser)
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=10, help="as `render --steps`: strength may leave some out")
    options = parser.parse_args()
    counts, rounds = options.frames or ((1, 4) if options.quick else (1, 4, 16)), 1 if options.quick else 5
    with tempfile.TemporaryDirectory(prefix="loop-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        engine = find_engine(options, folder)
        rows = [{"frames": count, **in_own_process(measure, engine, count, options.steps, rounds)} for count in counts]
        setup = setup_of(read_manifest(engine))
    document = {"setup": setup, "machine": machine(), "rows": rows}
    publish(name_by_device("loop", document["machine"]), document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

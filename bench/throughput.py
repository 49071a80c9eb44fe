"""Compares this runtime with the published algorithms and with diffusers' pipeline, end to end, in one run, in turns.

Bench: `python -m bench.throughput [--json FILE] [--quick]` writes results/throughput-<base>-<device>.json, .md and
.svg, or FILE and those beside it. --quick takes 4 frames, 2 steps and one round, and only prints unless --json is
given. All contenders run on the GPU if torch sees one, else on the CPU, where `taskset` limits the cores of all alike.
`--base random-sd15` has the size of Stable Diffusion 1.5 and random weights. On a CPU, give it
`--size 256x256 --frames 4 --steps 2`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders import METHODS, WARM_UP_STEPS, Job, run
from bench.flops import Counters, Setup
from bench.kernels import measure_peak
from bench.plot import Bar, stacked_bars
from bench.processes import in_own_process
from bench.report import name_by_device, new_parser, picture_size, publish, quality_cell, result_path, table, write_json
from bench.runs import moving_person, psnr_unless_equal
from bench.timing import machine
from bench.untrained import untrained_checkpoint, write_random_base
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines import ONLY_OF, choose_backend, choose_precision
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.engines.manifest import read_manifest
from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.models.sources import locate_base
from posecrafter_rt.poses.keypoints import PoseSequence

FULL_FRAMES, FULL_STEPS = 100, 50
TARGET_PSNR_DB, TARGET_MEMORY = 40.0, 0.6
TARGET_SPEEDUPS = {"any type": 2.5, "the same type": 1.2}  # over published; twice that over plain
STAGES = ("prepare", "invert", "denoise", "decode")
NOT_COUNTED = "not counted"
Row = dict[str, Any]


def make_checkpoint(base: str, size: tuple[int, int] | None, path: Path) -> Row:
    """Write an untrained checkpoint. Called in a process of its own, so that the base does not stay in memory."""
    if base == "random-sd15":
        base = str(write_random_base(path.with_name("random-sd15")))
    untrained_checkpoint(base, size).save(path)
    return {}


def find_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """Return the given checkpoint, or an untrained one over the base, which is made unless `folder` has it already."""
    if options.checkpoint is not None:
        return options.checkpoint
    size = "" if options.size is None else "-{}x{}".format(*options.size)
    path = folder / f"{Path(options.base).name}{size}.ckpt"
    if not path.exists():
        made = in_own_process(make_checkpoint, options.base, options.size, path)
        if "error" in made:
            raise SystemExit(f"error: no checkpoint could be made: {made['error']}")
    return path


def build(checkpoint: Path, folder: Path, backend: str, precision: str) -> Row:
    """Build an engine. build_s: how long it took, 0 if it was there already."""
    start = time.perf_counter()
    result = build_engine(checkpoint, folder, BuildOptions(backend, precision))
    return {"build_s": 0.0 if result.was_current else time.perf_counter() - start}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `find_engine` reads."""
    parser.add_argument("engine", type=Path, nargs="?", help="an engine; else one is built")
    parser.add_argument("--checkpoint", type=Path, help="a tuned one, instead of an untrained one over --base")
    parser.add_argument("--base", default="embedded", help="as `tune --base` takes it, or random-sd15")
    parser.add_argument("--size", type=picture_size, help="HxW; else the base's own")
    parser.add_argument("--backend", default="auto", help="auto of a --quick run: torch")
    parser.add_argument("--precision", default="auto", help="as `build-engine` takes it")
    parser.add_argument("--work", type=Path, help="keep what is built here for the next run")


def find_engine(options: argparse.Namespace, folder: Path) -> Path:
    """Return the given engine, or build one from the checkpoint or from an untrained one over the base."""
    if options.engine is not None:
        engine: Path = options.engine
        return engine
    checkpoint, backend = find_checkpoint(options, folder), options.backend
    if options.quick and backend == "auto" and options.precision not in ONLY_OF:
        backend = "torch"  # built in a second; what `auto` takes may need most of a quick run
    engine = folder / f"{checkpoint.stem}-{backend}-{options.precision}.engine"
    built = in_own_process(build, checkpoint, engine, backend, options.precision)
    if "error" in built:
        raise SystemExit(f"error: no engine could be built: {built['error']}")
    return engine


def is_sd15(setup: Row) -> bool:
    """Whether the base of a `setup_of` is Stable Diffusion 1.5, or has its size."""
    return setup["base"] in ("random-sd15", "stable-diffusion-v1-5")


def setup_of(manifest: Row) -> Row:
    """Return what a result says of the engine that was measured."""
    return {"base": Path(manifest["base"]).name, **{name: manifest[name] for name in ("size", "backend", "precision")}}


def make_contenders(job: Job, methods: list[str], engines: list[str], folder: Path) -> dict[str, Row]:
    """Return the contenders by name, each with its job; engines are built now, in `folder`.

    Args: job: what all have in common; its precision is that of all but `exact`. methods: some of METHODS' values.
        engines: `backend:precision` of `exact`; either may be auto.
    """
    contenders: dict[str, Row] = {}
    for engine in engines if "exact" in methods else []:
        backend_name, _, wanted = engine.partition(":")
        try:
            precision = choose_precision(wanted, backend_name)
            backend, _ = choose_backend(backend_name, precision)
        except BackendUnavailable as error:
            contenders[f"exact, {engine}"] = {"job": job, "error": str(error)}
            continue
        name = f"exact, {backend.name} {precision}"
        if name not in contenders:
            path = folder / f"{job.checkpoint.stem}-{backend.name}-{precision}.engine"
            built = in_own_process(build, job.checkpoint, path, backend.name, precision)
            contenders[name] = {"job": replace(job, method="exact", engine=path, precision=precision), **built}
    for method in methods:
        if method != "exact":
            contenders[f"{method}, {job.precision}"] = {"job": replace(job, method=method)}
    for index, contender in enumerate(contenders.values()):
        contender["job"] = replace(contender["job"], output=folder / f"frames-{index}.npy")
    return contenders


def median(runs: list[Row]) -> Row:
    """Return the medians over runs of everything that a run measured."""
    stages = list(dict.fromkeys(stage for one in runs for stage in one["seconds"]))
    seconds = {stage: statistics.median(one["seconds"].get(stage, 0.0) for one in runs) for stage in stages}
    names = ("startup_s", "total_s", "loaded_peak_bytes", "peak_bytes", "peak_gpu_bytes")
    return {**{name: statistics.median(one[name] for one in runs) for name in names}, "seconds": seconds}


def extrapolate(method: str, row: Row, frames: int, num_inference_steps: int) -> float:
    """Estimate the seconds that 100 frames in 50 steps would take if all stages were linear in both.

    `plain` inverts every frame, `exact` and `published` one; those two also sample one frame more, the reference.
    """
    seconds, steps = row["seconds"], FULL_STEPS / num_inference_steps
    is_clip_of_its_own = not method.startswith(("exact", "published"))
    more = FULL_FRAMES / frames if is_clip_of_its_own else (FULL_FRAMES + 1) / (frames + 1)
    inverted = steps * (FULL_FRAMES / frames if is_clip_of_its_own else 1.0)
    rest = sum(seconds.get(stage, 0.0) for stage in ("prepare", "decode")) * FULL_FRAMES / frames
    return seconds.get("invert", 0.0) * inverted + seconds["denoise"] * steps * more + rest


def flops_of(counters: Counters, method: str, setup: Setup) -> int:
    """Return the FLOPs of one render."""
    if method in ("exact", "published"):
        count = counters.exact(setup) if method == "exact" else counters.published(setup)
        return count.total
    if method.startswith("plain"):
        return counters.plain(setup).total
    step = sum(counters.image_step(setup).values())
    once = counters.network("text_encoder", counters.input_ids()).flops + counters.plain_decode(setup).flops
    return setup.frames * (setup.num_inference_steps * step + once)


def measure(contenders: dict[str, Row], rounds: int) -> dict[str, list[Row]]:
    """Run all in turns, each time in a fresh process, so that a drift of the machine's load affects all alike."""
    runs: dict[str, list[Row]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            result = {"error": contender["error"]} if "error" in contender else in_own_process(run, contender["job"])
            runs[name].append(result)
            said = result.get("error") or "{total_s:.2f} s, after {startup_s:.0f} s to get ready".format(**result)
            print(f"round {number + 1}: {name}: {said}", flush=True)
    return runs


def device_of(job: Job) -> str:
    """Return the type of the device that a contender runs on: an `openvino` engine never runs on a GPU."""
    return torch_device().type if job.engine is None else str(read_manifest(job.engine)["device"]["type"])


def reference_of(names: Iterable[str]) -> str | None:
    """Return whose frames PSNR is to: the first `exact` in fp32, else `published` in fp32; None: neither ran."""
    full = [name for name in names if name.endswith("fp32")]
    return next((name for method in ("exact", "published") for name in full if name.startswith(method)), None)


def summarise(contenders: dict[str, Row], runs: dict[str, list[Row]], counters: Counters, setup: Setup) -> list[Row]:
    """Return one row per contender; `exact` and `published` have a PSNR if one of them ran in fp32."""
    peaks: dict[tuple[str, str], float] = {}
    rows: list[Row] = []
    chosen = reference_of(name for name in contenders if not any("error" in one for one in runs[name]))
    reference = None if chosen is None else np.load(contenders[chosen]["job"].output)
    for name, contender in contenders.items():
        job: Job = contender["job"]
        failed = next((one["error"] for one in runs[name] if "error" in one), None)
        if failed is not None:
            rows.append({"contender": name, "error": failed})
            continue
        row = median(runs[name])
        of = (job.precision, device_of(job))
        if of not in peaks:
            peaks[of] = in_own_process(measure_peak, *of).get("flops_per_s", float("nan"))
        flops = flops_of(counters, job.method, setup)
        total = row["total_s"]
        row |= {"contender": name, "build_s": contender.get("build_s"), "frames_per_s": setup.frames / total,
                "s_per_100_frames": 100 * total / setup.frames, "flops": flops, "flops_per_s": flops / total,
                "percent_of_peak": 100 * flops / total / peaks[of],
                "extrapolated_s": extrapolate(job.method, row, setup.frames, setup.num_inference_steps)}  # fmt: skip
        if reference is not None and job.method in ("exact", "published"):
            row["psnr_db"] = psnr_unless_equal(reference, np.load(job.output))
        rows.append({**row, "runs": runs[name]})
    return rows


def _peaks(rows: list[Row]) -> dict[str, float]:
    """Return the peak memory to compare: the GPU's if one is used, but not that of engines that bypass torch there."""
    counter = "peak_gpu_bytes" if any(row["peak_gpu_bytes"] for row in rows) else "peak_bytes"
    return {row["contender"]: row[counter] for row in rows
            if row[counter] and not row["contender"].startswith("exact, tensorrt")}  # fmt: skip


def _ratios(rows: list[Row]) -> list[str]:
    """Compare times and memory with those of `exact`, if it ran."""
    exact = [row for row in rows if row["contender"].startswith("exact")]
    if not exact:
        return []
    header = ("contender", *(f"over {row['contender']}" for row in exact), "peak memory over the least of exact")
    peaks, cells = _peaks(rows), []
    least = min((peaks[row["contender"]] for row in exact if row["contender"] in peaks), default=None)
    for row in rows:
        name = row["contender"]
        ratios = [f"{row['total_s'] / other['total_s']:.2f}×" for other in exact]
        cells.append((name, *ratios, f"{peaks[name] / least:.2f}×" if least and name in peaks else NOT_COUNTED))
    return ["## Times of each contender over those of `exact`", "", *table(header, cells)]


def judged(rows: list[Row], precision: str) -> list[str]:
    """Judge every engine of `exact` that is close enough, and whether one meets both speed and memory targets."""
    exact = [row for row in rows if row["contender"].startswith("exact")]
    if exact and not any("psnr_db" in row for row in exact):
        return [
            "## Targets",
            "",
            "None is judged: neither `exact` nor `published` ran in fp32, so no quality was compared.",
            "",
        ]
    near = [row for row in exact if row["psnr_db"] is None or row["psnr_db"] >= TARGET_PSNR_DB]  # None: equal frames
    engines = {"any type": near, "the same type": [row for row in near if row["contender"].endswith(precision)]}
    peaks, cells, verdicts = _peaks(rows), [], []
    for baseline, times in (("published", 1.0), ("plain", 2.0)):
        of_baseline = next((row for row in rows if row["contender"] == f"{baseline}, {precision}"), None)
        for types, of_types in engines.items():
            if of_baseline is None or not of_types:
                continue
            target, fast, lean = times * TARGET_SPEEDUPS[types], [], []
            for row in of_types:
                name, ratio = row["contender"], of_baseline["total_s"] / row["total_s"]
                memory = peaks[name] / peaks[of_baseline["contender"]] if name in peaks else math.nan
                fast += [name] * (ratio >= target)
                lean += [name] * (memory <= TARGET_MEMORY)
                verdict = "" if math.isnan(memory) else "met" if name in lean else "missed"
                cells.append((f"{name}, against {baseline}, {types}",
                              f"{ratio:.2f}", f"≥ {target:g}", "met" if name in fast else "missed",
                              f"{memory:.2f}" if verdict else NOT_COUNTED, f"≤ {TARGET_MEMORY:g}", verdict))  # fmt: skip
            both = [name for name in fast if name in lean]
            uncounted = {row["contender"] for row in of_types} - peaks.keys()
            verdicts.append(f"- {target:g} times as fast as {baseline}, {types}: {_who(fast)}; {TARGET_MEMORY:g} of its memory: "
                            f"{_who(lean, uncounted)}; both in one engine: {_who(both, uncounted & {*fast})}.")  # fmt: skip
    header = ("engine", "times as fast", "target", "", "peak memory", "target", "")
    return ["## Targets", "", *table(header, cells), *verdicts, ""] if cells else []


def _who(contenders: list[str], uncounted: Set[str] = frozenset()) -> str:
    """Say who meets a target. If nobody does, it is missed, unless somebody's memory was not counted."""
    return f"met by {' and '.join(contenders)}" if contenders else NOT_COUNTED if uncounted else "**missed**"


def absent(rows: list[Row]) -> list[str]:
    """Return the methods without a row. A row's name ends with its precision, or with its engine and precision."""
    present = [row["contender"].rpartition(", ")[0] for row in rows]
    return [method for method in METHODS.values() if method not in present]


def headline(setup: Row) -> str:
    """Say what was rendered."""
    size = "×".join(map(str, setup["size"]))
    return f"{setup['frames']} frames at {size}, {setup['steps']} steps, {setup['base']}"


def picture(document: Row) -> str:
    """Draw the seconds by contender and stage."""
    bars = []
    for row in document["rows"]:
        parts = {stage: row["seconds"].get(stage, 0.0) for stage in STAGES} if "error" not in row else {}
        bars.append(Bar(row["contender"], parts, f"{row['total_s']:.2f} s" if parts else "failed"))
    return stacked_bars(headline(document["setup"]), bars)


def markdown(document: Row) -> str:
    """Format the results as tables."""
    setup, rows = document["setup"], [row for row in document["rows"] if "error" not in row]
    frames, steps = setup["frames"], setup["steps"]
    facts = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    lines = [f"# {headline(setup)}", "", f"Machine: {facts}.", ""]
    on_gpu, reference = any(row["peak_gpu_bytes"] for row in rows), reference_of(row["contender"] for row in rows)
    compared = "nothing: none ran in fp32" if reference is None else f"the frames of `{reference}`"
    lines += [f"Medians of {setup['rounds']} rounds in turns; each run in a process of its own, after a warm-up by the same clip",
              f"(steps: {setup['warm_up_steps']}). exact: this runtime, its inversion cache empty; what an avatar keeps is there: prompt",
              "tables, the reference's latents and pose embedding. published, plain: see `bench/plain.py`. PSNR is to",
              f"{compared}. Peak memory is the process's. FLOPs are the ledger's, of a first",
              "render, convolutions as if done directly, which `openvino` does not in fp32; peak is that of a large matrix product in",
              "the same type, of int8 in float32. At fp16 `exact` keeps its VAE in float32, unless the processor has VNNI, the others do not."]  # fmt: skip
    if on_gpu:
        lines += ["Peak GPU memory is the most that torch had allocated at once, and what recorded CUDA graphs hold; by it the",
                  "contenders are compared, but for those that run on the processor, and TensorRT, whose plans and weights it does",
                  "not count."]  # fmt: skip
    header = ("contender", "s", "frames/s", "s per 100 frames", "peak MB", *(["peak GPU MB"] if on_gpu else []), "startup s",
              "GFLOP/s", "% of peak", "PSNR dB")  # fmt: skip
    cells = []
    for row in rows:
        gpu = [f"{row['peak_gpu_bytes'] / 1e6:.0f}"] if on_gpu else []
        cells.append((row["contender"], f"{row['total_s']:.2f}", f"{row['frames_per_s']:.3g}",
                      f"{row['s_per_100_frames']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}", *gpu, f"{row['startup_s']:.1f}",
                      f"{row['flops_per_s'] / 1e9:.1f}", f"{row['percent_of_peak']:.0f}", quality_cell(row, "psnr_db")))  # fmt: skip
    cells += [(row["contender"], f"failed: {row['error']}") for row in document["rows"] if "error" in row]
    cells += [(method, "not run") for method in absent(document["rows"])]
    lines += ["", *table(header, cells), "## Stages (s)", ""]
    cells = []
    for row in rows:
        built = "" if row["build_s"] is None else f"{row['build_s']:.1f}"
        cells.append((row["contender"], *(f"{row['seconds'].get(stage, 0.0):.2f}" for stage in STAGES), built))
    lines += [*table(("contender", *STAGES, "build"), cells), *_ratios(rows), *judged(rows, setup["precision"])]
    if (frames, steps) != (FULL_FRAMES, FULL_STEPS):
        lines += [f"## Extrapolated, not measured: {FULL_FRAMES} frames in {FULL_STEPS} steps", ""]
        lines += table(("contender", "s"), [(row["contender"], f"{row['extrapolated_s']:,.0f}") for row in rows])
    return "\n".join(lines)


def result_name(facts: Row) -> str:
    return name_by_device(f"throughput-{Path(facts['setup']['base']).name}", facts["machine"])


def benchmark(options: argparse.Namespace, folder: Path) -> Row:
    """Make what is missing, measure, sum up. If summing up is cut off, the result's file still has the runs."""
    checkpoint = find_checkpoint(options, folder)
    tuned = Checkpoint.load(checkpoint)
    size = (tuned.frames.shape[1], tuned.frames.shape[2])
    target = moving_person(options.frames, size, phase=1.0)
    if options.poses is not None:
        target = PoseSequence.load(options.poses)[: options.frames]
    setup = Setup(size, len(target), options.steps)
    job = Job("exact", checkpoint, None, options.precision, target, options.steps, folder)
    methods = [method for name, method in METHODS.items() if name in options.contenders]
    contenders = make_contenders(job, methods, options.engines, folder)
    runs = measure(contenders, options.rounds)
    base = options.base if options.checkpoint is None else tuned.metadata["base"]
    used = {name: getattr(options, name) for name in ("steps", "precision", "rounds")}
    facts = {"setup": {"base": base, "size": list(size), "frames": len(target), **used,
                       "warm_up_steps": WARM_UP_STEPS[torch_device().type]}, "machine": machine()}  # fmt: skip
    path = result_path(result_name(facts), options.json, options.quick)
    if path is not None:
        write_json(path, {**facts, "runs": runs})
    counters = Counters(locate_base(tuned.metadata["base"]).configs)
    return {**facts, "rows": summarise(contenders, runs, counters, setup)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. --quick only changes defaults."""
    parser = new_parser(__doc__, "4 frames, 2 steps, one round, the engine `torch`")
    parser.add_argument("--base", default="embedded", help="as `tune --base` takes it, or random-sd15")
    parser.add_argument("--size", type=picture_size, help="HxW; else the base's own")
    parser.add_argument("--checkpoint", type=Path, help="a tuned one, instead of an untrained one over --base")
    parser.add_argument("--poses", type=Path, help="target poses, instead of made-up ones")
    for count in ("--frames", "--steps", "--rounds"):
        parser.add_argument(count, type=int)
    parser.add_argument("--engines", nargs="+", help="backend:precision of `exact`; PSNR is to the first in fp32")
    parser.add_argument("--precision", default="fp16" if torch_device().type == "cuda" else "fp32",
                        choices=list(TORCH_DTYPES), help="of the other contenders")  # fmt: skip
    parser.add_argument("--contenders", nargs="+", choices=list(METHODS), default=[name for name in METHODS if name != "compile"],
                        help="compile: plain under torch.compile, which takes minutes")  # fmt: skip
    parser.add_argument("--work", type=Path, help="keep checkpoint and engines here for the next run")
    options = parser.parse_args(arguments)
    same = options.precision
    defaults: Row = {
        "frames": 24,
        "steps": 20,
        "rounds": 3,
        "engines": [f"torch:{same}", f"auto:{same}", "auto:auto", "torch:fp32"],
    }
    if options.quick:
        defaults = {"frames": 4, "steps": 2, "rounds": 1, "engines": [f"torch:{same}"]}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="throughput-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        document = benchmark(options, folder)
    publish(result_name(document), document, markdown(document), options.json, options.quick, picture(document))


if __name__ == "__main__":
    main()

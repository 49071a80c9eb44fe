"""Measures what a second identity costs: building its engine anew, after the first filled the caches, and by `--refit`.

Bench: `python -m bench.refit [--base embedded] [--size HxW] [--backend NAME …] [--json FILE] [--quick]` measures every
backend that can run here, each build in a process of its own, and writes results/refit-<base>-<device>.json and .md, or
FILE and its .md. --quick takes one round, and `torch` unless others are named; it only prints unless --json is given.
`--base random-sd15` has the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.processes import in_own_process
from bench.report import name_by_device, new_parser, picture_size, publish, table
from bench.timing import machine
from bench.untrained import untrained_checkpoint, write_random_base
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines import choose_precision, get_backend, names
from posecrafter_rt.machine import watched_peak
from posecrafter_rt.models.loading import load_base
from posecrafter_rt.tuning import trainable_parameters
from posecrafter_rt.tuning_losses import decoder_parameters

Row = dict[str, Any]
TARGET_S = 5.0  # of a refit
QUICK = "torch"  # the others need most of a minute, or minutes, to build the first
WAYS = {"first_s": "first, nothing cached", "anew_s": "second, anew", "refit_s": "second, refitted"}


def make_identities(base: str, size: tuple[int, int] | None, paths: list[Path]) -> Row:
    """Write checkpoints that differ in everything that tuning this base changes. tuned: how many numbers these are."""
    if base == "random-sd15":
        base = str(write_random_base(paths[0].with_name(base)))
    blank = untrained_checkpoint(base, size)
    model = load_base(base, dtype=torch.float16)  # 3 GB at Stable Diffusion 1.5's size
    tuned = dict(trainable_parameters(model, model.settings.trainable))
    if model.settings.decoder_steps:
        tuned |= decoder_parameters(model.vae)
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: parameter.float() + 0.01 * torch.randn(parameter.shape, generator=generator)
                   for name, parameter in tuned.items()}  # fmt: skip
        Checkpoint({**blank.tensors, **tensors}, blank.frames, blank.poses, {**blank.metadata, "seed": seed}).save(path)
    return {"tuned": sum(parameter.numel() for parameter in tuned.values())}


def build(checkpoint: Path, engine: Path, options: BuildOptions, cache: Path) -> Row:
    """Time one build, including what it loads, and its processes' peak memory. cache: folder for what it keeps."""
    os.environ.update(POSECRAFTER_CACHE=str(cache), TORCHINDUCTOR_CACHE_DIR=str(cache / "torch"))
    start = time.perf_counter()
    with watched_peak() as peak_bytes:
        result = build_engine(checkpoint, engine, options)
        assert not result.was_current
        return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


def measure(backend: str, identities: list[Path], folder: Path, rounds: int) -> Row:
    """Time a backend in the precision of `auto`: the first identity's build, medians of `rounds` of the second's."""
    precision = choose_precision("auto", backend)
    row: Row = {"backend": backend, "precision": precision}
    options, source = BuildOptions(backend, precision), folder / "first.engine"
    plan = [("first_s", identities[0], source, options)]
    for number in range(rounds):
        for way, chosen in (("anew_s", options), ("refit_s", replace(options, refit=source))):
            plan.append((way, identities[1], folder / f"{way}-{number}.engine", chosen))
    runs: dict[str, list[Row]] = {way: [] for way in WAYS}
    for way, checkpoint, engine, chosen in plan:
        run = in_own_process(build, checkpoint, engine, chosen, folder / "cache")
        print(backend, way, run, file=sys.stderr, flush=True)
        if "error" in run:
            return {**row, "error": f"{WAYS[way]}: {run['error']}"}
        runs[way].append(run)
        if engine != source:
            shutil.rmtree(engine)
    row |= {way: statistics.median(run["seconds"] for run in of_way) for way, of_way in runs.items()}
    return {**row, "refit_peak_bytes": max(run["peak_bytes"] for run in runs["refit_s"])}


def candidates() -> dict[str, str | None]:
    """Return every backend, and why it cannot run here, if so."""
    return {name: get_backend(name).unsupported_reason(choose_precision("auto", name)) for name in names()}


def markdown(document: Row) -> str:
    """Format the results as a table, and list what failed or cannot run here."""
    setup, facts = document["setup"], document["machine"]
    size, device = "×".join(map(str, setup["size"])), facts.get("gpu", facts["processor"])
    lines = [f"# A second identity's engine: {setup['base']}, {size}, {setup['tuned']:,} tuned numbers", "",
             f"{device}, {facts['torch_threads']} threads, {facts['torch']}. Seconds of `build_engine`, all that it reads and",
             f"flushes to the disk in them; the second's are medians of {setup['rounds']}, beside the graphs and code that the",
             f"first left. Target of a refit: {TARGET_S:g} s.", ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        if "error" in row:
            continue
        verdict = "met" if row["refit_s"] <= TARGET_S else "missed"
        cells.append((f"{row['backend']} {row['precision']}", *(f"{row[way]:.1f}" for way in WAYS), verdict,
                      f"{row['refit_peak_bytes'] / 1e6:.0f}"))  # fmt: skip
    lines += table(("backend", *WAYS.values(), f"≤ {TARGET_S:g} s", "peak MB of the refit"), cells) if cells else []
    lines += [f"- {row['backend']}: {row['error']}" for row in document["rows"] if "error" in row]
    lines += [f"- {name}: {reason}" for name, reason in document["not_here"].items()]
    return "\n".join([*lines, ""])


def parse() -> argparse.Namespace:
    """Parse the command line. --quick only changes defaults."""
    parser = new_parser(__doc__, f"one round, of {QUICK} unless others are named")
    parser.add_argument("--base", default="embedded", help="as `tune --base` takes it, or random-sd15")
    parser.add_argument("--size", type=picture_size, help="HxW; else the base's own")
    parser.add_argument("--backend", nargs="+", choices=names(), help="else all that can run here")
    options = parser.parse_args()
    options.backend = options.backend or ([QUICK] if options.quick else names())
    return options


def main() -> None:
    """Parse the arguments, make two identities, measure each backend, write both files."""
    options = parse()
    rounds = 1 if options.quick else 3
    reasons = {name: reason for name, reason in candidates().items() if name in options.backend}
    with tempfile.TemporaryDirectory(prefix="refit-") as temporary:
        folder, rows = Path(temporary), []
        identities = [folder / "first.ckpt", folder / "second.ckpt"]
        made = in_own_process(make_identities, options.base, options.size, identities)
        if "error" in made:
            raise SystemExit(f"error: no checkpoints could be made: {made['error']}")
        for name in [name for name, reason in reasons.items() if reason is None]:
            (folder / name).mkdir()
            rows.append(measure(name, identities, folder / name, rounds))
            shutil.rmtree(folder / name)
        size = Checkpoint.load(identities[0]).metadata["size"]
    setup = {"base": Path(options.base).name, "size": size, "rounds": rounds, **made}
    document = {"setup": setup, "machine": machine(), "rows": rows,
                "not_here": {name: reason for name, reason in reasons.items() if reason is not None}}  # fmt: skip
    name = name_by_device(f"refit-{setup['base']}", document["machine"])
    publish(name, document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()

"""Times the tiles of the Triton attention kernels on this GPU, and updates the table where another tile is faster.

Bench: `python -m bench.kernel_tune [--json FILE] [--budget-s N]` ranks kernel_search's candidates by its model, compiles
the best in one process per core, times them at SD 1.5's shapes, 16-bit heads before fp32's, and writes
results/kernel-tune-<device>.json and .md, or FILE and its .md. `--write [PYTHON...]` then puts those tiles into
kernels/configs.json that are more than 3 % faster and spill under no Triton; each PYTHON is the interpreter of an
environment with another Triton, as for kernel_search. With `--from FILE` it takes the times of an earlier run, which
needs no GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import kernel_trials
from bench.hardware import GPUS, Gpu
from bench.kernel_choice import Record, make_tile, markdown, settle
from bench.kernel_fits import DTYPES, REPRESENTATIVES, OtherTriton, Use
from bench.kernel_search import FRAME_CLASSES, keyframe_candidates, temporal_candidates, try_tile, write_table
from bench.kernel_trials import Tile, Trial
from bench.kernels import measure_peaks
from bench.report import name_by_device, new_parser, publish
from bench.timing import machine
from bench.workloads import HEADS, LEVELS, Attention
from posecrafter_rt.kernels.configs import TABLE, table_capability
from posecrafter_rt.machine import usable_cores

KEYFRAME_FRAMES = 16
TEXT_TOKENS = 77
CLIPS = (9, 17, 32, 101)
KEPT = 12  # candidates per row that are timed, beside the table's tile
FINALISTS = 4  # candidates that are timed again, in turns with the table's tile
ROUNDS = 3
TRIAL_S = 0.03  # budget of one timing
STALL_S = 40.0  # if no job ends for so long, the missing ones died with their processes
RANK_SHARE, WARM_SHARE = 0.35, 0.5  # at most, of the time left
ROUND_S = 15.0  # with less time left, a round is not started
KEYS = ("capability", "element_bytes", "max_head_size", "max_frames")


@dataclass(frozen=True)
class Row:
    """A row of the table. key: the columns that identify it; cases: the problems of SD 1.5 that it serves."""

    use: Use
    key: tuple[tuple[str, int], ...]
    tile: Tile
    cases: tuple[Attention, ...]

    @property
    def max_frames(self) -> int:
        return dict(self.key).get("max_frames", 0)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.use.element_bytes][0]

    @property
    def name(self) -> str:
        clips = f" F≤{self.max_frames}" if self.max_frames else ""
        return f"{self.use.op.partition('_')[0]} {8 * self.use.element_bytes}-bit d≤{self.use.head_class}{clips}"

    @property
    def kernels(self) -> list[Attention]:
        """One case for each machine code, which within a row depends only on whether 16 divides the number of keys."""
        return list({case.num_keys % 16 == 0: case for case in self.cases}.values())

    def candidates(self) -> list[Tile]:
        if self.use.op == "keyframe_attention":
            return list(keyframe_candidates(self.use.head_class, self.use.element_bytes))
        return list(temporal_candidates(self.max_frames, self.use.head_class, self.use.element_bytes))


def find_cases(op: str, head_class: int, shorter: int, max_frames: int) -> tuple[Attention, ...]:
    """Return SD 1.5's attentions with a head of this class; temporal ones over clips longer than `shorter` frames."""
    levels = [level for level in LEVELS if level[1] // HEADS == REPRESENTATIVES[head_class]]
    if op == "keyframe_attention":
        keys = [(tokens, channels, keys) for tokens, channels in levels for keys in (tokens, TEXT_TOKENS)]
        return tuple(Attention(op, KEYFRAME_FRAMES, tokens, channels, num) for tokens, channels, num in keys)
    clips = [frames for frames in CLIPS if shorter < frames <= max_frames]
    return tuple(Attention(op, num, *level, num) for level in levels if level != LEVELS[3] for num in clips)  # 8²: tiny


def read_rows(capability: int, element_bytes: int) -> list[Row]:
    """Return the table's rows that SD 1.5 uses, for one of the table's capabilities."""
    rows = []
    for op, entries in json.loads(TABLE.read_text()).items():
        entries = [e for e in entries if (e["capability"], e["element_bytes"]) == (capability, element_bytes)]
        for entry in entries:
            key = {name: value for name, value in entry.items() if name in KEYS}
            head_class, max_frames = key["max_head_size"], key.get("max_frames", 0)
            siblings = [other.get("max_frames", 0) for other in entries if other["max_head_size"] == head_class]
            shorter = max((frames for frames in siblings if frames < max_frames), default=0)
            tile = make_tile(op, {name: value for name, value in entry.items() if name not in KEYS})
            if cases := find_cases(op, head_class, shorter, max_frames):
                use = Use(op, (capability,), element_bytes, head_class)
                rows.append(Row(use, tuple(key.items()), tile, cases))
    return rows


def in_time(until: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a job of the pool; a job that is still queued when its time is over does nothing."""
    return function(*arguments) if time.monotonic() < until else None


def gather(pool: Any, until: float, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Return the jobs' results in order; None for jobs that ran out of time or whose process crashed."""
    waiting = [pool.apply_async(in_time, (until, function, job)) for job in jobs]
    done, last = 0, time.monotonic()
    while done < len(jobs) and time.monotonic() < until:
        ready = sum(job.ready() for job in waiting)
        if ready > done:
            done, last = ready, time.monotonic()
        elif time.monotonic() - last > STALL_S:
            print(f"warning: {len(jobs) - done} of {len(jobs)} jobs were lost: processes crashed", file=sys.stderr)
            break
        time.sleep(0.02)
    return [result_of(job) if job.ready() else None for job in waiting]


def result_of(job: Any) -> Any:
    """Return a finished job's result. If it raised, warn and return None, because the other jobs still count."""
    try:
        return job.get()
    except Exception as error:
        print(f"warning: a job failed: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def rank(gpu: Gpu, use: Use, frames: int, tile: Tile) -> float:
    """Return a tile's modelled cost; infinite if it spills, does not fit or is refused."""
    trial = try_tile(gpu, use, frames, tile)
    return float("inf") if trial is None else trial[0]


def rank_rows(pool: Any, until: float, gpu: Gpu, rows: list[Row]) -> dict[Row, list[tuple[Tile, float]]]:
    """Return each row's tiles to time, with their modelled cost: the table's tile, then the cheapest."""
    jobs = [(row, tile) for row in rows for tile in row.candidates()]
    clips = {row: FRAME_CLASSES.get(row.max_frames, 0) for row in rows}
    costs = gather(pool, until, rank, [(gpu, row.use, clips[row], tile) for row, tile in jobs])
    print(f"ranked {len(jobs) - costs.count(None)} of {len(jobs)} candidates", file=sys.stderr)
    ranked: dict[Row, list[tuple[Tile, float]]] = {}
    for row in rows:
        found = {tile: cost for (of, tile), cost in zip(jobs, costs, strict=True) if of is row and cost is not None}
        current = found.pop(row.tile, float("inf"))
        cheapest = sorted(((tile, cost) for tile, cost in found.items() if cost < float("inf")), key=lambda tc: tc[1])
        ranked[row] = [(row.tile, current), *cheapest[:KEPT]]
    return ranked


def warm_rows(pool: Any, until: float, ranked: dict[Row, list[tuple[Tile, float]]]) -> dict[Row, list[Record]]:
    """Compile the tiles to time, beginning with every row's first tile. Returns: each row's candidates, as reported."""
    depths = range(max(len(tiles) for tiles in ranked.values()))
    pairs = [(row, *tiles[depth]) for depth in depths for row, tiles in ranked.items() if depth < len(tiles)]
    jobs = [(row, tile, case) for row, tile, _ in pairs for case in row.kernels]
    errors = gather(pool, until, kernel_trials.warm, [(case, row.dtype, tile) for row, tile, case in jobs])
    candidates: dict[Row, list[Record]] = {row: [] for row in ranked}
    for row, tile, cost in pairs:
        of_tile = [error for job, error in zip(jobs, errors, strict=True) if job[0] is row and job[1] == tile]
        dropped = "not compiled in time" if None in of_tile else next(filter(None, of_tile), "")
        modelled = cost if cost < float("inf") else None
        candidates[row].append({"tile": asdict(tile), "modelled": modelled, "dropped": dropped})
    return candidates


def time_row(row: Row, candidates: list[Record], device: str, deadline: float) -> Record:
    """Check and time a row's candidates, the best again in turns with the table's tile; add the times to them."""
    trials = [Trial(case, row.dtype, device) for case in row.cases]
    for candidate in candidates:
        if not candidate["dropped"]:
            time_once(candidate, make_tile(row.use.op, candidate["tile"]), trials, deadline)
    timed = [candidate for candidate in candidates if "first_ms" in candidate]
    is_current = [candidate["tile"] == asdict(row.tile) for candidate in timed]
    current = [candidate for candidate, yes in zip(timed, is_current, strict=True) if yes]
    others = [candidate for candidate, yes in zip(timed, is_current, strict=True) if not yes]
    finalists = current + sorted(others, key=lambda other: sum(other["first_ms"]))[:FINALISTS]
    rounds = [
        [[trial.time_ms(make_tile(row.use.op, one["tile"]), TRIAL_S) for trial in trials] for one in finalists]
        for _ in range(ROUNDS)
    ]
    for candidate, *times in zip(finalists, *rounds, strict=True):
        candidate["ms"] = [sorted(of_case)[ROUNDS // 2] for of_case in zip(*times, strict=True)]
    cases = [
        asdict(case) | {"sdpa_ms": trial.reference_ms(TRIAL_S)} for case, trial in zip(row.cases, trials, strict=True)
    ]
    return {"op": row.use.op, "key": dict(row.key), "name": row.name, "current": asdict(row.tile), "cases": cases,
            "candidates": candidates}  # fmt: skip


def time_once(candidate: Record, tile: Tile, trials: list[Trial], deadline: float) -> None:
    """Add a candidate's first times, or why it has none: no time was left, or a result is wrong."""
    if time.monotonic() > deadline:
        candidate["dropped"] = "no time left"
        return
    for trial in trials:
        if fault := trial.fault(tile):
            candidate["dropped"] = f"WRONG: {fault}"
            print(f"WRONG: {tile} at {trial.problem}, {trial.dtype}: {fault}", file=sys.stderr, flush=True)
            return
    candidate["first_ms"] = [trial.time_ms(tile, TRIAL_S) for trial in trials]


def measure(pool: Any, capability: tuple[int, int], device: str, deadline: float) -> Record:
    """Time the candidates of every row, 16-bit rows first, until the deadline."""
    of_table = table_capability(capability)
    gpus = {gpu.capability: gpu for gpu in GPUS}
    gpu = gpus.get(capability[0] * 10 + capability[1], gpus[of_table])
    document: Record = {"machine": machine(), "rows": [], "not_measured": [], "error": None}
    document["peaks"] = measure_peaks(device, [torch.float16], 0.3)
    for element_bytes in DTYPES:
        rows = read_rows(of_table, element_bytes)
        if (left := deadline - time.monotonic()) < ROUND_S or document["error"]:
            document["not_measured"] += [row.name for row in rows]
            continue
        ranked = rank_rows(pool, time.monotonic() + RANK_SHARE * left, gpu, rows)
        say("compiling the best", deadline)
        left = deadline - time.monotonic()
        candidates = warm_rows(pool, time.monotonic() + WARM_SHARE * left, ranked)
        say("timing", deadline)
        for row in rows:
            if time.monotonic() > deadline or document["error"]:
                document["not_measured"].append(row.name)
                continue
            try:
                document["rows"].append(time_row(row, candidates[row], device, deadline))
            except Exception as error:  # after a CUDA fault nothing more runs here: report what was measured
                document["error"] = f"{row.name}: {error}"
            say(row.name, deadline)
    return document


def say(what: str, deadline: float) -> None:
    print(f"{what}; {deadline - time.monotonic():.0f} s left", file=sys.stderr, flush=True)


def measure_here(budget_s: float) -> Record:
    """Run `measure` on this machine's GPU, with one process per core."""
    deadline = time.monotonic() + budget_s
    with multiprocessing.get_context("spawn").Pool(usable_cores()) as pool:
        return measure(pool, torch.cuda.get_device_capability(), "cuda", deadline)


def main() -> int:
    """Measure or read, print and write. Returns 1 if a result was wrong, or the GPU failed or is missing."""
    parser = new_parser(__doc__, "twenty seconds")
    parser.add_argument("--budget-s", type=float, default=140.0, help="seconds to measure for")
    parser.add_argument("--from", dest="source", type=Path, help="take an earlier run's times")
    parser.add_argument("--write", action="store_true", help="put what is faster into kernels/configs.json")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters with other Tritons, for --write")
    options = parser.parse_args()
    if options.source is not None:
        document = json.loads(options.source.read_text())
    elif torch.cuda.is_available():
        document = measure_here(20.0 if options.quick else options.budget_s)
    else:
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    is_written = not options.quick and options.source is None
    name = name_by_device("kernel-tune", document["machine"])
    publish(name, document, markdown(document), options.json, not is_written)
    if options.write:
        others = [OtherTriton(python) for python in options.pythons]
        write_table(settle(document, others))
        for other in others:
            other.close()
        print("kernels/configs.json is written; check it under every Triton: pytest tests/kernels/test_compile.py")
    wrong = any(one["dropped"].startswith("WRONG") for record in document["rows"] for one in record["candidates"])
    return int(wrong or document["error"] is not None)


if __name__ == "__main__":
    sys.exit(main())

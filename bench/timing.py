"""The one timing helper: warm-up, many repetitions, median and spread; on a GPU with cold caches and events.

Bench: imported by the scripts here that measure; `python -m bench.timing` prints what it costs to time nothing.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from posecrafter_rt.machine import cpu_name

FLUSH_BYTES = 256 << 20  # beyond any L2
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, from `repeats` calls."""

    median_ms: float
    p95_ms: float
    min_ms: float
    repeats: int

    def to_json(self) -> dict[str, float | int]:
        """Return plain numbers, rounded to what a clock can resolve."""
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}


def summarise(times_ms: list[float]) -> Timing:
    """Return the median, 95th percentile and minimum of repeated calls."""
    ordered = sorted(times_ms)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return Timing(statistics.median(ordered), p95, ordered[0], len(ordered))


def time_call(call: Callable[[], Any], *, budget_s: float = 1.0, min_repeats: int = 5, is_cold: bool = True) -> Timing:
    """Time `call` on the GPU if torch sees one, else on the CPU.

    Args:
        budget_s: about how long to measure; at least `min_repeats` calls count, on a GPU about 200 at most.
            Warm-up calls do not count: the first tenth on the CPU, four calls on a GPU.
        is_cold: on a GPU, flush L2 before every call, as a network's other layers would.
    """
    if torch.cuda.is_available():
        return _time_cuda(call, budget_s, min_repeats, is_cold)
    return time_on_cpu(call, budget_s, min_repeats)


def compare(calls: dict[str, Callable[[], Any]], **options: Any) -> dict[str, Timing]:
    """Time several calls, on the CPU in turns, so that a drift of the machine's load affects all alike.

    On a GPU they are timed one after another. Args: options: as of `time_call`; `budget_s` is that of each call.
    """
    if torch.cuda.is_available():
        return {name: time_call(call, **options) for name, call in calls.items()}
    rounds = 4
    budget_s = options.get("budget_s", 1.0) / rounds
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += _sample_cpu(call, budget_s, options.get("min_repeats", 5))
    return {name: summarise(times) for name, times in samples.items()}


def _sample_cpu(call: Callable[[], Any], budget_s: float, min_repeats: int) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < min_repeats + 1 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times[max(1, len(times) // 10) :]  # the first tenth warms up


def time_on_cpu(call: Callable[[], Any], budget_s: float, min_repeats: int = 5) -> Timing:
    """Time a call on the CPU by the wall clock, whether or not there is a GPU."""
    return summarise(_sample_cpu(call, budget_s, min_repeats))


def _time_cuda(call: Callable[[], Any], budget_s: float, min_repeats: int, is_cold: bool) -> Timing:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if is_cold else None
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(min_repeats, min(200, int(budget_s / (time.perf_counter() - started + 2e-4))))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        if flush is not None:
            flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return summarise([begin.elapsed_time(end) for begin, end in pairs])


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on, as it is now.

    Processor, threads, load, versions, commit, and the GPU with its driver and clocks.
    """
    info: dict[str, Any] = {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        info |= _driver(properties)
    return info


def _commit() -> dict[str, str]:
    """Return the code's commit, with `+` if tracked files differ from it; nothing without git or a repository."""
    if not (ROOT / ".git").exists():  # a source archive may lie in somebody else's repository
        return {}
    # No locks: a benchmark must not block a commit that somebody makes meanwhile.
    command = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": output.strip()}


def _driver(properties: Any) -> dict[str, str]:
    # By UUID, because CUDA_VISIBLE_DEVICES renumbers the cards for torch but not for nvidia-smi.
    uuid = getattr(properties, "uuid", None)  # not every build of torch tells
    cards = ["0"] if uuid is None else [f"GPU-{uuid}", "0"]  # of a part of a card (MIG) it is the part's
    names = ("driver_version", "clocks.sm", "clocks.mem", "power.limit")
    for card in cards:
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={card}"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        return dict(zip(names, (value.strip() for value in output.split(",")), strict=False))
    return {}


if __name__ == "__main__":
    print(machine(), time_call(lambda: None, budget_s=0.2).to_json())

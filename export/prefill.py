"""Trace the graphs of several networks at once, each in one process, into the cache that their export reads.

Layer 4: tracing is Python in one thread, so other cores help only through other processes (`prefill_worker`).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.export.graphs import graph_key
from posecrafter_rt.export.onnx import export_graph
from posecrafter_rt.machine import available_bytes, usable_cores
from posecrafter_rt.models.empty import describe_modules
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import ALL_NETWORKS, Architecture, network_specs

MAX_WORKERS = 2  # beside this process; more would gain little: one network takes over a quarter of the total time
WORKER_BYTES = 1_500_000_000  # libraries, the largest graph and the text encoder, at Stable Diffusion 1.5's size
LONGEST_FIRST = ("unet_stream", "unet", "controlnet_stream", "controlnet", "vae_decoder", "time_tables")

log = logging.getLogger(__name__)


def prefill(model: PoseModel, arch: Architecture, graphs: BlobCache, progress: Callable[[str], None]) -> None:
    """Trace, together with other processes, those of a model's networks that `graphs` lacks.

    This does nothing if there is nothing to share, only one core, too little memory, or a cache that cannot be written.
    `export_network` traces what is still missing, including what another process failed at.
    Args: model: folded, float32, on the CPU. progress: called if there is something to wait for.
    """
    networks, specs = model.networks(), network_specs(arch)
    missing = missing_graphs(model, arch, graphs)
    missing.sort(key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))
    num_workers = count_workers(len(missing))
    if num_workers == 0 or not _is_writable(graphs.folder):
        return
    progress("tracing the networks")
    task = {
        "folder": str(graphs.folder.absolute()),
        "modules": describe_modules(model),
        "architecture": arch.to_json(),
        "parent": os.getpid(),
    }
    with start_workers(num_workers, json.dumps(task), missing) as names:
        for name in names:
            export_graph(networks[name], specs[name], arch, graphs)


def missing_graphs(model: PoseModel, arch: Architecture, graphs: BlobCache) -> list[str]:
    """Return the names of the networks that are still to be traced. This reads no graph."""
    networks, specs = model.networks(), network_specs(arch)
    return [name for name in networks if not graphs.holds(graph_key(networks[name], specs[name], arch))]


def count_workers(num_missing: int) -> int:
    """Return how many processes to start beside this one for so many graphs, as cores and memory allow."""
    free = available_bytes()
    num_fitting = MAX_WORKERS if free is None else free // WORKER_BYTES - 1  # this process needs as much
    return max(0, min(usable_cores() - 1, num_missing - 1, num_fitting, MAX_WORKERS))


def _is_writable(folder: Path) -> bool:
    """Return whether workers can hand over graphs there. If not, everything would be traced twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def start_workers(number: int, task: str, names: Sequence[str]) -> Iterator[Iterator[str]]:
    """Start workers and yield the names left to this process: each time the next that nobody has taken.

    At the end of the block the workers are waited for. If it fails or is interrupted, they are killed at once.
    Args: task: see `prefill_worker`; names: of networks, in the order in which they are taken.
    """
    # Each byte of a pipe goes to one reader. Here it is an index into ALL_NETWORKS, so reading it takes that name.
    source, sink = os.pipe()
    os.write(sink, bytes(ALL_NETWORKS.index(name) for name in names))
    os.close(sink)
    workers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as errors:
        try:
            for _ in range(number):
                try:
                    workers.append(_start(task, source, errors))
                except OSError as error:
                    log.warning("no process can be started to trace networks beside this one: %s", error)
                    break
            yield iter(lambda: take_name(source), None)
            if any([worker.wait() != 0 for worker in workers]):  # a list, so that all are waited for
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"status {[worker.returncode for worker in workers]}"
                log.warning("a process that traced networks failed: %s; its part is done again", reason)
        finally:
            os.close(source)
            for worker in workers:
                worker.kill()
                worker.wait()


def _start(task: str, source: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a worker that takes names from `source`."""
    # Not multiprocessing: it would run the caller's own script again in every process.
    code = f"import sys; sys.path[:] = {sys.path!r}; from posecrafter_rt.export.prefill_worker import main; main()"
    command = [sys.executable, "-c", code, task]
    return subprocess.Popen(command, stdin=source, stdout=subprocess.DEVNULL, stderr=errors)


def take_name(source: int) -> str | None:
    """Take and return the next name that nobody has taken; None if none is left."""
    taken = os.read(source, 1)
    return ALL_NETWORKS[taken[0]] if taken else None

"""A worker process of `prefill`: traces networks from a model's description, without weights, into the cache.

Layer 4: its first argument is the task as JSON. It takes names of networks from its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

POLL_SECONDS = 0.5


def main() -> None:
    """Work until no name is left, or until the process that started this one is gone.

    The task has: folder, that of the cache; modules, see `describe_modules`; architecture, see `Architecture.to_json`;
    parent, the id of the process that started this one.
    """
    task = json.loads(sys.argv[1])
    threading.Thread(target=end_with, args=(task["parent"],), daemon=True).start()
    _trace_all(task)


def end_with(parent: int) -> None:
    """End this process as soon as its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _trace_all(task: dict[str, Any]) -> None:
    from pathlib import Path

    from posecrafter_rt.blob_cache import BlobCache
    from posecrafter_rt.export.onnx import export_graph
    from posecrafter_rt.export.prefill import take_name
    from posecrafter_rt.spec import Architecture, network_specs

    networks, arch = unfilled_networks(task["modules"]), Architecture.from_json(task["architecture"])
    specs, graphs = network_specs(arch), BlobCache(Path(task["folder"]))
    while (name := take_name(sys.stdin.fileno())) is not None:
        export_graph(networks[name], specs[name], arch, graphs)


def unfilled_networks(description: str) -> dict[str, Any]:
    """Build every network on the CPU with uninitialised weights, which take no memory while nobody touches them.

    On the meta device, graphs might differ where they depend on the device.
    """
    from posecrafter_rt.models.empty import empty_modules
    from posecrafter_rt.models.networks import build_networks

    modules = empty_modules(description)
    for module in modules.values():
        module.requires_grad_(False)
        if next(module.parameters()).is_meta:
            assert not list(module.buffers()), "a buffer's values are part of a graph"
            module.to_empty(device="cpu")
    return build_networks(**modules)  # type: ignore[arg-type]

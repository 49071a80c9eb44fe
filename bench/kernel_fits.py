"""Checks that a tile spills no register wherever the table would use it, under this interpreter's Triton or another's.

Bench: bench/kernel_search.py and bench/kernel_tune.py start `python -m bench.kernel_fits` in an environment with
another Triton. It reads one question per line of standard input, as JSON, and writes one answer per line of standard
output.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from posecrafter_rt.kernels.compile import compile_keyframe, compile_temporal
from posecrafter_rt.kernels.configs import TemporalConfig, TileConfig

REPRESENTATIVES = {48: 40, 80: 80, 160: 160, 256: 256}
DTYPES = {2: (torch.float16, torch.bfloat16), 4: (torch.float32,)}
TARGETS = {86: (86, 89), 90: (90,)}  # the capabilities that a row of the table serves


@dataclass(frozen=True)
class Use:
    """A row of the table without its tile: where the tile would be used."""

    op: str
    capabilities: tuple[int, ...]
    element_bytes: int
    head_class: int


def fits(use: Use, tile: TileConfig | TemporalConfig) -> bool:
    """Return whether every variant of the kernel compiles and none spills."""
    targets = tuple(target for capability in use.capabilities for target in TARGETS[capability])
    head_size = REPRESENTATIVES[use.head_class]
    try:
        if isinstance(tile, TileConfig):
            keyframe = itertools.product(targets, DTYPES[use.element_bytes])
            return not any(compile_keyframe(c, dtype, head_size, tile).spill_bytes for c, dtype in keyframe)
        # Padded heads take more registers, and tiles in chunks have none to spare.
        sizes = (head_size, use.head_class - 8) if tile.chunk else (head_size,)
        temporal = itertools.product(targets, DTYPES[use.element_bytes], sizes, (False, True))
        return not any(
            compile_temporal(c, t, d, tile, mask="shared" if m else "none").spill_bytes for c, t, d, m in temporal
        )
    except Exception as error:  # the compiler raises many kinds; a refused tile does not fit
        print(f"    refused: {use} {tile}: {type(error).__name__}", file=sys.stderr)
        return False


class OtherTriton:
    """Asks the Triton of another environment the same question. Close it when done."""

    def __init__(self, python: str) -> None:
        self._worker = subprocess.Popen(
            [python, "-m", "bench.kernel_fits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fits(self, use: Use, tile: TileConfig | TemporalConfig) -> bool:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        print(json.dumps({"use": asdict(use), "tile": asdict(tile)}), file=self._worker.stdin, flush=True)
        return json.loads(self._worker.stdout.readline())

    def close(self) -> None:
        self._worker.communicate()


def answer(question: dict[str, Any]) -> bool:
    use = Use(**(question["use"] | {"capabilities": tuple(question["use"]["capabilities"])}))
    kind = TileConfig if use.op == "keyframe_attention" else TemporalConfig
    return fits(use, kind(**question["tile"]))


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

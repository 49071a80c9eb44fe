"""A plugin for pytest that gives a processor without AMX one in software, native/amx.h: `pytest -p tests.emulated_amx tests/engines`.

The operations of `openvino` are compiled with it, and the tests of their tiles run. It is slow, and tells nothing about time.
"""

from __future__ import annotations

from posecrafter_rt import machine
from tests.native.amx_flags import in_software

AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
found = frozenset(machine.cpu_features())
machine.cpu_features = lambda: found | AMX  # before others import it

from posecrafter_rt.engines import openvino_operations as operations  # noqa: E402

tiled, *others = operations.VECTORS
if not found >= AMX:
    operations.VECTORS = (tiled._replace(flags=in_software(tiled.flags)), *others)

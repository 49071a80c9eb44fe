"""Facts about this machine that torch does not tell: processor, memory, installed versions.

Layer 0: reads /proc on Linux; elsewhere the answers are empty.
"""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not say."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_device() -> dict[str, str]:
    """The processor as the device that an engine is built for."""
    return {"type": "cpu", "name": cpu_name()}


def cpu_features() -> set[str]:
    """Instruction-set flags, such as avx512_bf16 and amx_bf16."""
    return set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's BF16)."""
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"})


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed (this package itself is not, when run from a checkout)."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

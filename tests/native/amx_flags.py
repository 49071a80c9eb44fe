"""What the operations are compiled with so that AMX is software, amx.h beside this."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HEADER = Path(__file__).with_name("amx.h")


def in_software(flags: Iterable[str]) -> tuple[str, ...]:
    """A compiler's flags for a processor with AMX as those for one that has all else."""
    others = (flag for flag in flags if not flag.startswith("-mamx"))
    return *others, "-include", str(HEADER), "-D__AMX_INT8__", "-D__AMX_BF16__"

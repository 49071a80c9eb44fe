"""Take numbers of any library's types in options, which are hashed and written as JSON.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def is_whole(count: object) -> bool:
    """Return whether `count` is a whole number, of any library's type."""
    return isinstance(count, Integral)


def make_numbers_plain(options: Any) -> None:
    """Convert numbers of any library's types to Python's own, in place: options are hashed and written as JSON."""
    for name, value in vars(options).items():
        is_plain = any(type(value) is kind for kind in (bool, int, float))  # numpy's float64 is a float, too
        if isinstance(value, Real) and not is_plain:
            object.__setattr__(options, name, int(value) if isinstance(value, Integral) else float(value))

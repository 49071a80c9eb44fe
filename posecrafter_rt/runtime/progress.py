"""Callbacks that are told of a render's steps: (stage, step, steps).

Layer 5.
"""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[str, int, int], None]  # stage, step, steps


def ignore(stage: str, step: int, steps: int) -> None:
    """Do nothing: nobody asked to be told."""


def naming_segment(told: OnStep, index: int, num_left: int) -> OnStep:
    """Return a callback that adds the segment to the stage's name if there are several. num_left: with this one."""
    count = index + num_left
    return told if count == 1 else lambda stage, *step: told(f"segment {index + 1} of {count}: {stage}", *step)

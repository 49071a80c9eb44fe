"""What tests of commands share: how much memory one takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from typer.testing import Result

PeakBytes = Callable[[Callable[[], Result]], tuple[Result, int]]


@pytest.fixture
def peak_bytes() -> PeakBytes:
    """Runs a command twice, first for the modules that it imports; returns its result and the most that Python and numpy held."""

    def measure(command: Callable[[], Result]) -> tuple[Result, int]:
        command()
        tracemalloc.start()
        try:
            result = command()
            return result, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure

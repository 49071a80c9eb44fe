"""What is told of other libraries' errors in a line of ours."""

from __future__ import annotations

import pytest

from posecrafter_rt.errors import OutOfMemory, first_line, is_out_of_memory, last_line


@pytest.mark.parametrize(("message", "first", "last"), [
    ("one", "one", "one"),
    ("\n one\ntwo\n", "one", "two"),
    ("", "OSError", "OSError"),
    (" \n", "OSError", "OSError"),
    ("a" * 300, "a" * 200, "a" * 300),
])  # fmt: skip
def test_a_line_of_an_error_is_never_missing(message: str, first: str, last: str) -> None:
    error = OSError(message)
    assert (first_line(error), last_line(error)) == (first, last)


@pytest.mark.parametrize(("error", "expected"), [
    (MemoryError(), True),
    (OutOfMemory("no room"), True),
    (RuntimeError("std::bad_alloc"), True),
    ("Error Code 2: OutOfMemory (no further information)", True),
    ("Error Code 1: Cuda Runtime (cudaErrorMemoryAllocation)", True),
    (RuntimeError("memory format"), False),
    ("Error Code 4: Internal Error", False),
])  # fmt: skip
def test_memory_that_ran_out_is_told_by_type_or_by_what_is_said(error: Exception | str, expected: bool) -> None:
    assert is_out_of_memory(error) == expected

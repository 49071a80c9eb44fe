"""What is told of other libraries' errors in a line of ours."""

from __future__ import annotations

import pytest

from posecrafter_rt.errors import first_line, last_line


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

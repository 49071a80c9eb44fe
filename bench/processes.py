"""Runs each measurement in a process of its own, so that its imports, memory and time are its own.

Bench: `in_own_process` is called by everything that measures whole renders, builds or engines; `answer` is its other
end.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
"""When this process imported this module. In a process of `in_own_process` that is right after Python has started."""
CHILD = "import pickle, sys; sys.path = pickle.load(sys.stdin.buffer); from bench.processes import answer; answer()"


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `function` in a fresh process, which imports only what it needs. If that process dies, it is only reported.

    Returns: what the function returned, or {"error": one line}.
    """
    spec = sys.modules["__main__"].__spec__  # with `python -m bench.x`, functions belong to __main__
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        result = Path(folder) / "result"
        asked = [sys.path, (None if spec is None else spec.name, result), (function, arguments)]
        subprocess.run([sys.executable, "-c", CHILD], input=b"".join(map(pickle.dumps, asked)), check=False)
        if not result.exists():
            return {"error": "the process died, most likely for lack of memory"}
        returned: dict[str, Any] = pickle.loads(result.read_bytes())
        return returned


class _Unpickler(pickle.Unpickler):
    """Looks up names of the asking process's __main__ under its real module name, and imports that only when needed."""

    main: str

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(self.main if module == "__main__" else module, name)


def answer() -> None:
    """Do what `in_own_process` wrote to this process's standard input."""
    main, result = pickle.load(sys.stdin.buffer)
    unpickler = _Unpickler(sys.stdin.buffer)
    unpickler.main = main
    try:
        function, arguments = unpickler.load()
        returned = function(*arguments)
    except Exception as error:  # as one line: many compilers' exceptions cannot be sent to another process
        returned = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    complete = result.with_name("complete")
    complete.write_bytes(pickle.dumps(returned))
    complete.rename(result)  # a process that dies while writing has not answered

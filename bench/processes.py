"""A process of its own for each run, so that what it imports, the memory it takes and the time it needs are its own.

Bench: `in_own_process` is called by whatever measures whole renders, builds or engines; `answer` is the other end of it.
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
"""When this process imported this module: in one of `in_own_process`, right after Python itself."""
CHILD = "import pickle, sys; sys.path = pickle.load(sys.stdin.buffer); from bench.processes import answer; answer()"


def in_own_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `function` in a fresh process, which imports what it needs and no more; a run that dies is reported, not fatal.

    Returns: what it returned, or {"error": one line}.
    """
    spec = sys.modules["__main__"].__spec__  # of `python -m bench.x`, whose functions are there __main__'s
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        result = Path(folder) / "result"
        asked = [sys.path, (None if spec is None else spec.name, result), (function, arguments)]
        subprocess.run([sys.executable, "-c", CHILD], input=b"".join(map(pickle.dumps, asked)), check=False)
        if not result.exists():
            return {"error": "the process died, most likely for lack of memory"}
        returned: dict[str, Any] = pickle.loads(result.read_bytes())
        return returned


class _Unpickler(pickle.Unpickler):
    """Finds what was __main__'s in the asking process by its module's name, importing that only where it is asked for."""

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
    except Exception as error:  # to a line here: many a compiler's exception cannot be sent to another process
        returned = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    complete = result.with_name("complete")
    complete.write_bytes(pickle.dumps(returned))
    complete.rename(result)  # a process that dies in writing has not answered

"""How commands print: their results go to standard output, as a table for people or JSON for machines.

Layer 8.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 400
NOT_KNOWN = "how long this takes is not known yet"


def print_json(value: Any) -> None:
    """Print a value as JSON, alone on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(rows: Iterable[tuple[str | Text, ...]], header: tuple[str, ...] | None = None) -> None:
    """Print rows in aligned columns without lines, if there are rows or a header; text is never taken as markup."""
    rows = list(rows)
    if not rows and header is None:
        return
    table = Table(box=None, show_header=header is not None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for index in range(len(header or rows[0])):
        table.add_column(header[index] if header else "", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH  # a file or pipe has no edge to fold lines at
    console.print(table)


def print_heading(text: str) -> None:
    """Print a line that opens a section."""
    Console(highlight=False).print(Text(text, "bold"))


def size_of(num_bytes: int) -> str:
    """Format bytes for people: `812 B`, `3.4 MB`, `1.2 GB` (powers of 1000)."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


@contextmanager
def step_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar with time left on standard error; yields a function of (step, steps, note)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, note="")
        yield lambda step, steps, note: progress.update(task, completed=step, total=steps, note=note)


class _TimeLeft(ProgressColumn):
    """Shows the time until `ends`, a moment of the monotonic clock; nothing if that is None or past."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        seconds = 0.0 if ends is None else ends - time.monotonic()
        return Text(f"about {duration_of(seconds)} left" if seconds > 0 else "")


@contextmanager
def stages(title: str) -> Iterator[Callable[[str, float | None], None]]:
    """Show the current stage on standard error, with a bar and the time left if known; if not known at first, say so.

    Yields a function of the next stage's name and of the seconds left then, or None.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _TimeLeft())
    with Progress(*columns, console=console, transient=True) as progress:
        task, total, is_first = progress.add_task(title, total=None, ends=None), 0.0, True

        def on_stage(stage: str, seconds_left: float | None) -> None:
            nonlocal total, is_first
            line, ends, known = f"{title}: {stage}", None, ""
            if seconds_left is not None:
                total, ends = max(total, seconds_left), time.monotonic() + seconds_left
                progress.update(task, total=total, completed=total - seconds_left)
                known = f", about {duration_of(seconds_left)} left"
            else:
                progress.tasks[0].total, total = None, 0.0  # `update` takes None for no change
                if is_first:
                    console.print(f"{title}: {NOT_KNOWN}", soft_wrap=True)
            is_first = False
            progress.update(task, description=line, ends=ends)
            if not console.is_terminal:
                console.print(line + known)

        yield on_stage


def duration_of(seconds: float) -> str:
    """Format seconds for people: `5 s`, `3 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

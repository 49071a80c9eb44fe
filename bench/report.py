"""How every benchmark reports: as a Markdown table, and as a JSON file with its Markdown and its picture beside it.

Bench: imported by the scripts here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table's lines and an empty line; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def quality_cell(row: dict[str, Any], key: str) -> str:
    """Format a `psnr_unless_equal` for a table: "same" for None, and nothing if the row has none."""
    return "" if key not in row else "same" if row[key] is None else f"{row[key]:.1f}"


def new_parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a benchmark's parser, with the --json and --quick that all have.

    doc: the module's docstring. quick: what --quick reduces, to a minute and a half at most.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="write here, and tables and pictures beside it, instead of to bench/results"
    )
    parser.add_argument("--quick", action="store_true", help=f"{quick}; prints, and writes only with --json")
    return parser


def write_json(path: Path, document: Any) -> None:
    """Write a document, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_report(path: Path, document: Any, markdown: str, picture: str | None = None) -> None:
    """Write a document to `path`, its text to the .md beside it, and its picture, if it has one, to the .svg."""
    write_json(path, document)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    if picture is not None:
        path.with_suffix(".svg").write_text(picture, encoding="utf-8")


def result_path(name: str, path: Path | None, is_quick: bool) -> Path | None:
    """Return where a result goes: `path` if one was given, else results/, where a quick run writes nothing (None)."""
    return path or (None if is_quick else RESULTS / f"{name}.json")


def publish(
    name: str, document: Any, markdown: str, path: Path | None, is_quick: bool, picture: str | None = None
) -> None:
    """Print a text, and write all files of a result (see `result_path`)."""
    path = result_path(name, path, is_quick)
    if path is not None:
        write_report(path, document, markdown, picture)
    print(markdown)


def name_by_device(name: str, machine: dict[str, Any]) -> str:
    """Add the device's name to a result's name: ("kernels", `timing.machine()`) → "kernels-cpu"."""
    return f"{name}-" + re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "cpu").lower()).strip("-")


def picture_size(text: str) -> tuple[int, int]:
    """Parse `512x768` → (512, 768), height first. Raises: ValueError, which argparse turns into its usual line."""
    height, width = map(int, text.split("x"))
    return height, width

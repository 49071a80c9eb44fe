"""Options that several commands share, and parsers of their values: sizes, segments, frame ranges, LoRAs.

Layer 8: a value that cannot be parsed is bad usage (exit code 2).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse `512x768` → (512, 768), height first; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise typer.BadParameter(f"{text!r} is not a size; write HEIGHTxWIDTH, such as 512x768")
    return int(match[1]), int(match[2])


def parse_segment(text: str | None) -> int | Literal["auto"] | None:
    """Parse `48` → 48; `auto` and None stay as they are."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise typer.BadParameter(f"{text!r} is no number of frames; write one, such as 48, or auto")
    return int(text)


def parse_range(text: str | None) -> slice:
    """Parse `46:120` → frames 46 to 119; either side may be missing; None means all frames."""
    if text is None:
        return slice(None)
    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a range of frames; write START:END, such as 0:36 (END is not in it)")
    start, end = (int(part) if part else None for part in match.groups())
    if end is not None and (start or 0) >= end:
        raise typer.BadParameter(f"{text!r} holds no frame; START must be before END")
    return slice(start, end)


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse `style.safetensors:0.8` → that file and 0.8, or 1 without a scale. An existing file's name has no scale."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: {scale!r} is not a number; write FILE:SCALE, such as {path}:0.8") from None

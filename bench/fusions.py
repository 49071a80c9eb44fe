"""Counts the bytes that each fusion around the attentions saves, and says which fusions are kept.

Bench: `python -m bench.fusions [--json FILE] [--quick]` prints the table of docs/operators.md and writes results/fusions.json
and .md, or FILE and its .md. It only counts; nothing is run or timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.hardware import REGISTERS
from bench.report import new_parser, publish
from bench.workloads import FRAMES, LEVELS

ELEMENT_BYTES = 2
CALLS = 5  # calls of each attention in one step of SD 1.5's U-Net, at each of the first three levels: 2 down, 3 up
TEMPORAL_LEVELS = LEVELS[:3]
ROWS = 64  # rows of a program's tile: positions × query frames
SUM_COLUMNS = REGISTERS // 2 // ROWS  # columns of fp32 sums that fit in half of the registers, for a tile's rows


@dataclass(frozen=True)
class Fusion:
    """One candidate.

    saved: the bytes that a call no longer moves, as a function of (clip, frame, channels): the bytes of an (F, L, C)
    tensor, those of an (L, C) tensor, and C. Every tensor that a kernel reads or writes counts once; weights do not
    count.
    """

    name: str
    saved: Callable[[int, int, int], int]
    verdict: str


def out_projection_saved(clip: int, frame: int, channels: int) -> int:
    """Return the bytes that are saved if the attention kernel also projects the output; negative if it moves more.

    The attention's result is then neither written nor read. But a row of the product needs all heads, and its C sums do
    not fit in the registers at once, so q, k and v are read once more for each slice of the output after the first.
    """
    slices = -(-channels // SUM_COLUMNS)
    return 2 * clip - 3 * clip * (slices - 1)


FUSIONS = (
    Fusion(
        "temporal: frames read and written in place, against transposed copies of q, k, v and the result",
        lambda clip, frame, channels: 4 * 2 * clip,
        "kept: the kernel's strides",
    ),
    Fusion(
        "temporal: q, k, v as slices of one projection, whose input is read once and not thrice",
        lambda clip, frame, channels: 2 * clip,
        "kept: the kernel's strides",
    ),
    Fusion(
        "temporal: residual add inside the attention kernel",
        lambda clip, frame, channels: 0,
        "no: the output projection lies between",
    ),
    Fusion(
        "temporal: output projection inside the attention kernel",
        out_projection_saved,
        "no: a loss but for the first level",
    ),
    Fusion(
        "temporal: residual add in the output projection's epilogue",
        lambda clip, frame, channels: 2 * clip,
        "no kernel of ours: a matrix product's",
    ),
    Fusion(
        "key frame: K and V not expanded to the clip's frames (written, then read)",
        lambda clip, frame, channels: 2 * 2 * clip,
        "kept: the kernel's indexing",
    ),
    Fusion(
        "key frame: K and V projected for one frame and not for all (input read twice, both written)",
        lambda clip, frame, channels: 4 * (clip - frame),
        "kept: models/blocks.py",
    ),
)


def saved_bytes(fusion: Fusion, frames: int, tokens: int, channels: int) -> int:
    """Return the bytes that the fusion saves in one call over a clip; negative if it moves more."""
    frame = tokens * channels * ELEMENT_BYTES
    return fusion.saved(frames * frame, frame, channels)


def count() -> list[dict[str, Any]]:
    """Return a row per fusion and number of frames: bytes per call at each level, and per step at levels that gain."""
    rows = []
    for fusion in FUSIONS:
        for frames in FRAMES:
            calls = [saved_bytes(fusion, frames, *level) for level in TEMPORAL_LEVELS]
            rows.append({"fusion": fusion.name, "frames": frames, "call_bytes": calls,
                         "step_bytes": CALLS * sum(max(0, saved) for saved in calls), "kept": fusion.verdict})  # fmt: skip
    return rows


def table() -> str:
    """Return the Markdown table, in MB."""
    levels = [f"{tokens} × {channels}" for tokens, channels in TEMPORAL_LEVELS]
    header = ("fusion", "F", *levels, "a step", "kept")
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    for row in count():
        saved = (f"{num_bytes / 1e6:,.1f}" for num_bytes in (*row["call_bytes"], row["step_bytes"]))
        lines.append("| " + " | ".join((row["fusion"], str(row["frames"]), *saved, row["kept"])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__, "no less: all is counted in a moment")
    options = parser.parse_args()
    publish("fusions", count(), table() + "\n", options.json, options.quick)


if __name__ == "__main__":
    main()

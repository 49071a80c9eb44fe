"""Draws results as small SVG files.

Bench: imported by throughput.py.
"""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH_PX, NAMES_PX, LABELS_PX, ROW_PX, BAR_PX, TEXT_PX = 760, 240, 90, 26, 16, 13
TEXT = "#7a7a7a"  # contrast 4.3 both to white and to the black of dark pages
COLOURS = ("#cc79a7", "#e69f00", "#0084cc", "#009e73")  # colour-blind readers can tell them apart


class Bar(NamedTuple):
    """One row. parts: lengths by name, drawn one after another; label: the text at its end."""

    name: str
    parts: Mapping[str, float]
    label: str


def stacked_bars(title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars over one scale that begins at 0, with a legend of their parts.

    Args: bars: from top to bottom, with at most four kinds of parts in all. A bar without parts has only its label.
    Returns: the text of an SVG file.
    """
    kinds = list(dict.fromkeys(kind for bar in bars for kind in bar.parts))
    colours = dict(zip(kinds, COLOURS[: len(kinds)], strict=True))
    longest = max((sum(bar.parts.values()) for bar in bars), default=0) or 1
    px_per_unit = (WIDTH_PX - NAMES_PX - LABELS_PX) / longest
    height = ROW_PX * (len(bars) + 2) + ROW_PX // 2
    svg = xml.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH_PX} {height}",
                      width=str(WIDTH_PX), height=str(height))  # fmt: skip
    xml.SubElement(svg, "title").text = title
    group = xml.SubElement(svg, "g", {"font-family": "sans-serif", "font-size": str(TEXT_PX), "fill": TEXT})
    _text(group, 8, 0, title).set("font-weight", "bold")
    for index, (kind, colour) in enumerate(colours.items()):
        x = NAMES_PX + 110 * index
        _block(group, x, 1, TEXT_PX, colour)
        _text(group, x + TEXT_PX + 6, 1, kind)
    for row, bar in enumerate(bars, start=2):
        _text(group, 8, row, bar.name)
        x = float(NAMES_PX)
        for kind, length in bar.parts.items():
            _block(group, x, row, length * px_per_unit, colours[kind])
            x += length * px_per_unit
        _text(group, x + 6, row, bar.label)
    xml.indent(svg)
    return xml.tostring(svg, encoding="unicode") + "\n"


def _text(parent: xml.Element, x: float, row: int, text: str) -> xml.Element:
    element = xml.SubElement(parent, "text", x=f"{x:.1f}", y=str(row * ROW_PX + BAR_PX + 3))
    element.text = text
    return element


def _block(parent: xml.Element, x: float, row: int, width: float, colour: str) -> None:
    xml.SubElement(parent, "rect", x=f"{x:.1f}", y=str(row * ROW_PX + 5), width=f"{width:.1f}", height=str(BAR_PX),
                   fill=colour)  # fmt: skip

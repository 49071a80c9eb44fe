"""Pictures of results: what is drawn, how long, and that any name can stand in them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bench.plot import Bar, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"
BARS = [Bar("exact", {"invert": 1.0, "denoise": 3.0}, "4.0 s"), Bar("plain <fp32> & more", {"denoise": 8.0}, "8.0 s"),
        Bar("broken", {}, "failed")]  # fmt: skip


def test_every_name_label_and_part_is_there() -> None:
    root = ElementTree.fromstring(stacked_bars("seconds", BARS))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == [
        "seconds",
        "invert",
        "denoise",
        "exact",
        "4.0 s",
        "plain <fp32> & more",
        "8.0 s",
        "broken",
        "failed",
    ]
    assert root.findtext(f"{SVG}title") == "seconds"


def test_lengths_are_to_one_scale_and_parts_follow_one_another() -> None:
    root = ElementTree.fromstring(stacked_bars("seconds", BARS))
    blocks = [{name: float(block.get(name, "")) for name in ("x", "y", "width")} for block in root.iter(f"{SVG}rect")]
    invert, denoise, plain = blocks[2:]  # the first two are the legend's
    assert denoise["width"] == pytest.approx(3 * invert["width"], abs=0.2)
    assert plain["width"] == pytest.approx(8 * invert["width"], abs=0.5)
    assert denoise["x"] == pytest.approx(invert["x"] + invert["width"], abs=0.2) and plain["x"] == invert["x"]
    assert invert["y"] == denoise["y"] < plain["y"]
    widest, height = float(root.get("width", "")), float(root.get("height", ""))
    assert all(block["x"] + block["width"] < widest and block["y"] + 16 < height for block in blocks)


def test_one_kind_has_one_colour() -> None:
    root = ElementTree.fromstring(stacked_bars("seconds", BARS))
    colours = [block.get("fill") for block in root.iter(f"{SVG}rect")]
    legend, (invert, denoise, plain) = colours[:2], colours[2:]
    assert legend == [invert, denoise] and denoise == plain != invert


def test_more_kinds_than_colours_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        stacked_bars("seconds", [Bar("a", dict.fromkeys("abcde", 1.0), "")])


def test_nothing_to_draw_is_still_a_picture() -> None:
    ElementTree.fromstring(stacked_bars("seconds", [Bar("broken", {}, "failed")]))

"""README's figures, and some in docs/, are those of the committed results, which `bench/` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MIN_PSNR_DB = 40  # to float32, of a render that counts


def words(name: str) -> str:
    """A file's words, whatever lines they stand in."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def readme() -> str:
    return words("README.md")


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_ledger_is_the_committed_one() -> None:
    ledger, text = result("ledger"), readme()
    seconds = ledger["projection"]["seconds"]
    rows = {"plain": "plain: every frame inverted, everything computed anew in every step",
            "published": "published: one inversion, else as plain", "exact": "here"}  # fmt: skip
    for name, shown in rows.items():
        times = (seconds[gpu][name] for gpu in ("RTX 3090", "RTX 4090", "H100 SXM"))
        cells = [f"{ledger['algorithms'][name]['total'] / 1e15:.2f}",
                 *(f"{value:.0f} s" if value >= 20 else f"{value:.1f} s" for value in times)]  # fmt: skip
        assert f"| {shown} | {' | '.join(cells)} |" in text
    published, saved = ledger["algorithms"]["published"]["total"], ledger["identities"]["published to exact"]
    small = ("the inserted frame is not decoded", "timestep projections as tables", "one encoding of one prompt")
    for flops in (*(value for what, value in saved.items() if what not in small), sum(saved[what] for what in small)):
        assert f" | {flops / 1e12:.1f} | {100 * flops / published:.1f} % |" in text


def times_faster(name: str, contender: str) -> str:
    """Than the published algorithm, and than the plain one, both in float32; nothing where it was not measured, or is no such render."""
    rows = {row["contender"]: row for row in result(name)["rows"] if "error" not in row}
    if contender not in rows or rows[contender]["psnr_db"] < MIN_PSNR_DB:
        return ""
    return ", ".join(
        f"{rows[rival]['total_s'] / rows[contender]['total_s']:.1f}" for rival in ("published, fp32", "plain, fp32")
    )


@pytest.mark.parametrize(("name", "title"), [
    ("embedded-zen5", "embedded, 128×160 | Zen 5, by earlier code"),
    ("embedded-zen4", " | Zen 4"),
    ("embedded-avx512", " | Xeon with AVX-512, shared, by earlier code"),
    ("random-sd15-zen5", "Stable Diffusion 1.5's size, 256×256 | Zen 5, by earlier code"),
    ("random-sd15-zen4", " | Zen 4"),
    ("random-sd15-avx512", " | Xeon with AVX-512, shared, by earlier code"),
    ("random-sd15-amx", " | Xeon with AMX, by earlier code"),
    ("embedded", " | EPYC with AVX2, by earlier code"),
    ("random-sd15", " | EPYC with AVX2, by earlier code"),
])  # fmt: skip
def test_how_much_faster_it_is_than_both_algorithms_is_what_was_measured(name: str, title: str) -> None:
    cells = [
        times_faster(f"throughput-{name}-cpu", f"exact, openvino {precision}") for precision in ("fp32", "fp16", "int8")
    ]
    assert " ".join(f"| {title} | {' | '.join(cells)} |".split()) in readme()


def test_frames_a_second_are_what_was_measured() -> None:
    def fps(name: str, unet_every: int, way: str = "stream", digits: int = 0) -> str:
        (row,) = (row for row in result(name)["rows"] if (row["way"], row["steps"], row["unet_every"]) ==
                  (way, 4, unet_every) and not row["is_pipelined"])  # fmt: skip
        return f"{row['fps']:.{digits}f}"

    names = ("latency-avx512-cpu", "latency-int8-avx512-cpu")
    whole, kept = ([fps(name, every) for name in names] for every in (1, 4))
    served = [fps(name, 4, "serve", 1) for name in names]
    expected = (f"a Xeon with AVX-512: {whole[0]}, in int8 {whole[1]}; with features kept over all four {kept[0]} and {kept[1]}, "
                f"through the server {served[0]} and {served[1]}.")  # fmt: skip
    assert expected in readme()
    older = [fps("latency-int8-zen4-cpu", every, way, 1) for every in (1, 2) for way in ("stream", "serve")]
    expected = "a Zen 4 in int8: {}, through the server {}; with features kept over two of them {} and {};"
    assert expected.format(*older) in readme()
    newest = {way: fps("latency-int8-zen5-cpu", 1, way, 1) for way in ("stream", "serve")}
    assert f"a Zen 5 in int8: {newest['stream']}, through the server {newest['serve']};" in readme()
    assert f"kept over two of them {fps('latency-int8-zen5-cpu', 2)}, as fast as poses come" in readme()


def test_what_amx_gains_is_what_was_measured() -> None:
    rows = {row["engine"]: row for row in result("engines-embedded-128x160-amx-cpu")["rows"]}
    ms = {name: [step["median_ms"] for step in row["steps"].values()] for name, row in rows.items()}
    first, second, third = (f"{a / b:.2f}" for a, b in zip(ms["openvino fp32"], ms["openvino bf16"], strict=True))
    plain = [a / b for a, b in zip(ms["torch fp32"], ms["openvino bf16"], strict=True)]
    streaming = words("docs/streaming.md")
    assert f"{first}, {second} and {third} times as fast as in float32, for 1, 4 and 16 frames" in streaming
    assert f"{min(plain):.1f} to {max(plain):.1f} times as fast as `torch` in float32" in streaming


def test_how_fast_the_decoder_is_on_an_h200_is_what_was_measured() -> None:
    flops = result("ledger")["algorithms"]["exact"]["stages"]["decode"]
    rate = flops / result("presets-nvidia-h200")["rows"]["exact"]["seconds"]["decode"]
    assert f"decoder, at {rate / 1e12:.0f} TFLOP/s ({100 * rate / 989e12:.0f} %)" in words("docs/gpu.md")

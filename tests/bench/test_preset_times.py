"""What presets take: the ways are real options, and a goal stands only beside what it is a goal for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import presets
from bench.flops import Counters, Setup
from bench.presets import STAGES, WAYS, benchmark, count_flops_of, find_peak, markdown, measure, parse
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines.manifest import read_manifest
from posecrafter_rt.runtime.presets import PRESETS, preset_options


def document(gpu: str, frames: int = 100) -> dict[str, Any]:
    row = {"total_s": 20.0, "seconds": dict.fromkeys(STAGES, 5.0), "peak_bytes": 1e9, "peak_gpu_bytes": 2e9,
           "flops": 4e15}  # fmt: skip
    setup = {"frames": frames, "base": "random-sd15", "size": [512, 512], "backend": "torch", "precision": "bf16"}
    return {
        "setup": setup,
        "machine": {"gpu": gpu},
        "peak_flops_per_s": 4e14,
        "peak_of": "a large matrix product",
        "rows": {"exact": row, "fast": {"error": "memory ran out"}},
    }


def test_every_preset_is_timed() -> None:
    assert {way["preset"] for way in WAYS.values()} == set(PRESETS)
    assert preset_options(**WAYS["fast, small decoder"]).decoder == "small"


def test_a_presets_count_is_the_ledgers(tiny_base: Path) -> None:
    counters, setup = Counters(tiny_base), Setup((32, 32), 6, 4)
    row = {"sampled": 4, "shallow": 0, "inverted": 4, "decoder": "full"}
    exact = count_flops_of(counters, setup, row)
    assert exact == pytest.approx(counters.exact(setup).total, rel=0.02)
    shallow = count_flops_of(counters, setup, {**row, "sampled": 2, "shallow": 2})
    assert exact - 2 * counters.exact_step(setup, 7).flops < shallow < exact
    cached, small = {**row, "inverted": 0}, {**row, "decoder": "small"}
    assert 0 < count_flops_of(counters, setup, cached) < exact > count_flops_of(counters, setup, small) > 0


def test_goals_are_a_cards_for_one_base_size_and_length() -> None:
    stages = "5.00 | 5.00 | 5.00 | 5.00 | 200 | 50 | 1000 | 2000 |"
    assert f"| exact | 20.00 | 12 | 5.0 | {stages}" in markdown(document("NVIDIA H100 80GB HBM3"))
    assert f"| exact | 20.00 | 115 | 5.0 | {stages}" in markdown(document("NVIDIA GeForce RTX 3090"))
    for other in (document("NVIDIA H200"), document("NVIDIA H100 80GB HBM3", frames=16)):
        assert "| exact | 20.00 |  |" in markdown(other)
    of_another = document("NVIDIA H100 80GB HBM3")
    of_another["setup"]["base"] = "embedded"
    assert "| exact | 20.00 |  |" in markdown(of_another)
    assert "| fast | failed: memory ran out" in markdown(document("NVIDIA H200"))


def test_what_has_a_goal_is_said_to_meet_or_to_miss_it() -> None:
    heading, memory = "## Goals", "| exact | 8 GB of GPU memory | 2.0 GB: met |"
    text = markdown(document("NVIDIA H100 80GB HBM3"))
    assert heading in text and "| exact | 12 s | 20.00 s: missed |" in text and memory in text
    assert "| exact | 115 s | 20.00 s: met |" in markdown(document("NVIDIA GeForce RTX 3090"))
    of_another_card = document("NVIDIA H200")  # which has no goal in seconds
    assert memory in markdown(of_another_card) and " s: m" not in markdown(of_another_card)
    of_another_card["rows"]["exact"]["peak_gpu_bytes"] = 15.5e9
    assert "| exact | 8 GB of GPU memory | 15.5 GB: missed |" in markdown(of_another_card)
    on_a_processor = document("NVIDIA H200")
    del on_a_processor["machine"]["gpu"]
    for other in (document("NVIDIA H100 80GB HBM3", frames=16), on_a_processor):
        assert heading not in markdown(other)


def test_every_row_is_in_the_result_before_the_next_begins(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun, peaks = tmp_path / "presets.json", [], []

    def in_own_process(function: Any, *arguments: Any) -> dict[str, Any]:
        if function is presets.measure_peak:
            peaks.append(arguments)
            return {"flops_per_s": 1e12}
        begun.append(arguments[1])
        if len(begun) > 1:
            raise KeyboardInterrupt
        return {**document("")["rows"]["exact"], "sampled": 4, "shallow": 0, "inverted": 4, "decoder": "full"}

    monkeypatch.setattr(presets, "in_own_process", in_own_process)
    words = [str(tiny_engine), "--frames", "2", "--ways", "fast", "exact", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        benchmark(parse(words), tmp_path)
    assert begun == ["fast", "exact"]
    manifest = read_manifest(tiny_engine)
    assert peaks == [(manifest["precision"], manifest["device"]["type"])]
    left = json.loads(path.read_text())
    assert list(left["rows"]) == begun[:1] and left["setup"]["frames"] == 2
    assert set(left["setup"]) == {"frames", "base", "size", "backend", "precision"}
    assert f"| {begun[0]} |" in path.with_suffix(".md").read_text()


def test_the_cheapest_come_first_and_the_cached_after_what_it_finds() -> None:
    assert list(WAYS) == ["fast, small decoder", "fast", "balanced", "exact", "exact, inversion cached"]
    assert parse([]).ways == list(WAYS) and set(parse(["--quick"]).ways) == set(presets.QUICK_WAYS) < set(WAYS)


def test_a_cached_inversion_is_that_of_the_whole_target(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eq. 5 chooses the reference by all poses: a shorter target may have another, whose inversion is no help."""
    lengths, whole = [], Avatar.render

    def render(self: Avatar, target: Any, *arguments: Any, **options: Any) -> Any:
        lengths.append(len(target))
        return whole(self, target, *arguments, **options)

    monkeypatch.setattr(Avatar, "render", render)
    for way in ("exact", "exact, inversion cached"):
        monkeypatch.setitem(WAYS, way, {"preset": "exact", "num_inference_steps": 4})
    inverted = measure(tiny_engine, "exact", 3)
    assert inverted["inverted"] > 0 and len(lengths) == 2  # one of few steps, and itself
    assert measure(tiny_engine, "exact, inversion cached", 3)["inverted"] == 0 and len(lengths) == 4
    for file in (tiny_engine / "inversions").iterdir():
        file.unlink()
    assert measure(tiny_engine, "exact, inversion cached", 3)["inverted"] == 0
    assert lengths == [3] * 7  # where nothing is cached, a whole one more


def test_where_no_peak_is_measured_the_cards_specification_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "in_own_process", lambda *arguments: {"error": "no memory"})
    monkeypatch.setattr(presets.torch.cuda, "is_available", lambda: True)
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 3090", 71e12), ("NVIDIA H100 PCIe", None)):
        monkeypatch.setattr(presets.torch.cuda, "get_device_name", lambda name=name: name)
        found = find_peak("bf16", "cuda")
        assert found["peak_flops_per_s"] == peak and "specification (not measured: no memory)" in found["peak_of"]
    assert find_peak("bf16", "cpu")["peak_flops_per_s"] is None  # an engine on the processor of that machine
    unknown = markdown({**document("NVIDIA H100 PCIe"), **found})
    assert "| 200 |  | 1000 | 2000 |" in unknown and "specification" in unknown


@pytest.mark.parametrize(("precision", "kind"), [("bf16", "the engine's type"), ("int8", "float32")])
def test_a_measured_peak_says_of_what_it_is(monkeypatch: pytest.MonkeyPatch, precision: str, kind: str) -> None:
    monkeypatch.setattr(presets, "in_own_process", lambda *arguments: {"flops_per_s": 1e9})
    assert find_peak(precision, "cpu") == {"peak_flops_per_s": 1e9, "peak_of": f"a large matrix product in {kind}"}

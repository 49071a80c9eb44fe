"""The tile search times what the table serves, drops what is wrong or late, and mends only what gains. No timing is judged."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if find_spec("posecrafter_rt.kernels") is None:
    pytest.skip("the package is not installed", allow_module_level=True)

from bench import kernel_choice, kernel_search, kernel_trials, kernel_tune
from bench.kernel_choice import Record, faster, markdown, settle
from bench.kernel_trials import Tile, Trial
from bench.kernel_tune import gather, read_rows
from bench.workloads import Attention, attentions
from posecrafter_rt.kernels.configs import TABLE, TemporalConfig, TileConfig, keyframe_config, temporal_config

GOOD, GREEDY = TileConfig(64, 32, 4, 2), TileConfig(64, 64, 1, 2)  # greedy: spills at any head size
PEAKS = {"bytes_per_s": 1e9, "float16": 1e12, "float32": 1e12}


class InlinePool:
    """A pool of no processes."""

    def apply_async(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        result = function(*arguments)

        class Done:
            def ready(self) -> bool:
                return True

            def get(self) -> Any:
                return result

        return Done()


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_a_row_is_timed_with_the_problems_that_the_launch_finds_it_for(
    capability: tuple[int, int], element_bytes: int
) -> None:
    rows = read_rows(capability[0] * 10 + capability[1], element_bytes)
    for row in rows:
        assert row.tile in row.candidates()
        for case in row.cases:
            if case.op == "keyframe_attention":
                assert keyframe_config(capability, row.dtype, case.head_size) == row.tile
            else:
                assert temporal_config(capability, row.dtype, case.head_size, case.frames, case.num_keys) == row.tile
    timed = [(case.op, case.tokens, case.channels, case.num_keys) for row in rows for case in row.cases]
    assert len(set(timed)) == len(timed)
    if element_bytes == 2:
        problems = [problem for frames in (9, 101) for problem in attentions(frames)]
        assert {(p.op, p.tokens, p.channels, p.num_keys) for p in problems} <= set(timed)


def test_a_process_that_dies_takes_one_job_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        until = time.monotonic() + 60
        assert gather(pool, until, abs, [(-1,), ("text",), (-2,)]) == [1, None, 2]
        with monkeypatch.context() as patch:
            patch.setattr(kernel_tune, "STALL_S", 0.5)
            assert gather(pool, until, os._exit, [(1,)]) == [None]
        assert gather(pool, until, abs, [(-3,)]) == [3]
        assert gather(pool, time.monotonic() - 1, abs, [(-4,)]) == [None]
    assert "TypeError" in capsys.readouterr().err


def test_no_more_processes_compile_than_a_quota_of_cores_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.machine.core_quota", lambda root: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_tune, "measure", lambda *others: {"processes": len(multiprocessing.active_children())})
    before = len(multiprocessing.active_children())
    assert kernel_tune.measure_here(1.0) == {"processes": before + 1}


@pytest.mark.parametrize("problem", [Attention("keyframe_attention", 3, 160, 320, 77),
                                     Attention("temporal_attention", 9, 160, 320, 9)], ids=lambda p: p.op)  # fmt: skip
def test_a_wrong_result_has_a_fault(problem: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(problem, torch.float16, "cpu")
    right = kernel_trials.reference(problem, trial.inputs)
    monkeypatch.setattr(kernel_trials, "launch", lambda inputs, tile: right)
    assert trial.fault(GOOD) == ""
    wrong = right.clone()
    wrong[..., -1, 7] += 0.1
    monkeypatch.setattr(kernel_trials, "launch", lambda inputs, tile: wrong)
    assert trial.fault(GOOD).startswith("error 0.1 where")
    wrong[..., 80, 0] = torch.nan
    assert trial.fault(GOOD) == "not all values are written and finite"


def measure_on_cpu(monkeypatch: pytest.MonkeyPatch, wrong: Tile, refused: Tile, seconds: float) -> Record:
    """`measure` over tiny levels with the reference in the kernel's place; one tile computes nonsense, one is refused."""

    def launch(inputs: tuple[Tensor, ...], tile: Tile) -> Tensor:
        problem = "temporal_attention" if isinstance(tile, TemporalConfig) else "keyframe_attention"
        out = kernel_trials.reference(Attention(problem, 0, 0, 0, 0), inputs)
        return out + 1 if tile == wrong else out

    monkeypatch.setattr(kernel_tune, "LEVELS", ((8, 320), (6, 640), (4, 1280), (2, 1280)))
    monkeypatch.setattr(kernel_tune, "KEPT", 2)
    monkeypatch.setattr(kernel_tune, "FINALISTS", 1)
    monkeypatch.setattr(kernel_tune, "ROUNDS", 1)
    monkeypatch.setattr(kernel_tune, "ROUND_S", 0.0)
    monkeypatch.setattr(kernel_tune, "TRIAL_S", 0.0)
    monkeypatch.setattr(kernel_tune, "measure_peaks", lambda device, dtypes, budget_s: PEAKS)
    monkeypatch.setattr(kernel_tune, "rank", lambda gpu, use, frames, tile: float(tile.num_warps))
    monkeypatch.setattr(kernel_trials, "warm", lambda case, dtype, tile: "refused" if tile == refused else "")
    monkeypatch.setattr(kernel_trials, "launch", launch)
    return kernel_tune.measure(InlinePool(), (9, 0), "cpu", time.monotonic() + seconds)


def test_every_row_is_measured_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, refused = TileConfig(64, 32, 2, 2), TileConfig(64, 32, 2, 3)  # the model's first two for 16-bit heads
    document = measure_on_cpu(monkeypatch, wrong, refused, seconds=600)
    assert json.loads(json.dumps(document)) == document
    assert len(document["rows"]) == 19 and not document["not_measured"] and document["error"] is None
    for record in document["rows"]:
        twice = [one for one in record["candidates"] if "ms" in one]
        assert record["current"] in [one["tile"] for one in twice]
        assert all(len(one["ms"]) == len(one["first_ms"]) == len(record["cases"]) for one in twice)
    dropped = {one["dropped"] for one in document["rows"][0]["candidates"] if one["dropped"]}
    assert "refused" in dropped and any(reason.startswith("WRONG: error 1 where") for reason in dropped)
    assert "WRONG" in capsys.readouterr().err
    text = markdown(document)
    assert all(record["name"] in text for record in document["rows"]) and "| refused |" in text


def test_without_time_nothing_is_measured_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measure_on_cpu(monkeypatch, GOOD, GOOD, seconds=-1)
    assert not document["rows"] and len(document["not_measured"]) == 19
    assert "No time was left for keyframe 16-bit d≤48" in markdown(document)


def record_of(times: dict[Tile, float]) -> Record:
    """A measured row, of which the first tile is the table's."""
    row = next(row for row in read_rows(90, 2) if row.name == "keyframe 16-bit d≤48")
    candidates = [{"tile": asdict(tile), "dropped": "", "ms": [ms]} for tile, ms in times.items()]
    cases = [asdict(row.cases[0]) | {"sdpa_ms": 2.0}]
    return {"op": row.use.op, "key": dict(row.key), "name": row.name, "current": asdict(next(iter(times))),
            "cases": cases, "candidates": candidates}  # fmt: skip


def test_the_fastest_tile_that_does_not_spill_replaces_the_tables() -> None:
    table = json.loads(TABLE.read_text())
    current = read_rows(90, 2)[0].tile
    settled = settle({"rows": [record_of({current: 1.0, GREEDY: 0.5, GOOD: 0.8})]}, [])
    changed = [(old, new) for op in table for old, new in zip(table[op], settled[op], strict=True) if old != new]
    assert changed == [(table["keyframe_attention"][1], table["keyframe_attention"][1] | asdict(GOOD))]


def test_a_small_gain_changes_nothing() -> None:
    current = TileConfig(64, 128, 4, 2)
    assert faster(record_of({current: 1.0, GOOD: 0.98})) == []
    assert faster(record_of({current: 1.0, GOOD: 0.8, GREEDY: 0.5})) == [(GREEDY, 2.0), (GOOD, 1.25)]
    cells = kernel_choice.record_cells(record_of({current: 1.0, GOOD: 0.8}), PEAKS)
    assert cells[0][2:8] == ("64×128 w4 s2", "1.0000", "64×32 w4 s2", "0.8000", "1.250", "2.0000")


def test_the_table_is_written_as_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_search, "TABLE", tmp_path / "configs.json")
    kernel_search.write_table(json.loads(TABLE.read_text()))
    assert (tmp_path / "configs.json").read_text() == TABLE.read_text()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernel_tune"])
    assert kernel_tune.main() == 1
    assert capsys.readouterr().err == "error: torch sees no GPU\n"

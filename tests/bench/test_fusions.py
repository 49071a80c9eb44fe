"""The counts of bytes behind the choice of fusions: against sums by hand, the code they describe, and the document.

Tests of bench/fusions.py and docs/operators.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import fusions
from posecrafter_rt.ops.reference import temporal_attention_ref

ROOT = Path(__file__).resolve().parents[2]


def test_counts_by_hand() -> None:
    clip, frame = 9 * 4096 * 320 * 2, 4096 * 320 * 2
    saved = [fusions.saved_bytes(fusion, 9, 4096, 320) for fusion in fusions.FUSIONS]
    assert saved == [8 * clip, 2 * clip, 0, 2 * clip, 2 * clip, 4 * clip, 4 * (clip - frame)]
    projection = next(fusion for fusion in fusions.FUSIONS if "output projection inside" in fusion.name)
    clips = [9 * tokens * channels * 2 for tokens, channels in fusions.TEMPORAL_LEVELS]
    counts = [fusions.saved_bytes(projection, 9, *level) for level in fusions.TEMPORAL_LEVELS]
    assert counts == [2 * clips[0], -clips[1], -4 * clips[2]]


class CopyCounter(TorchDispatchMode):
    """Adds up the bytes that copies read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.num_bytes += 2 * args[0].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("groups", "share"), [(1, 0), (2, 2)])
def test_the_reference_copies_where_groups_and_positions_cannot_be_one_axis(groups: int, share: int) -> None:
    frames, tokens, channels = 9, 64, 32
    q, k, v = torch.zeros(3, groups, frames, tokens, channels, dtype=torch.bfloat16)
    with CopyCounter() as copies:
        temporal_attention_ref(q, k, v, 2)
    assert copies.num_bytes == share * fusions.saved_bytes(fusions.FUSIONS[0], frames, tokens, channels)


def test_calls_a_step_are_sd15s() -> None:
    unet = json.loads((ROOT / "posecrafter_rt/models/sd15/unet/config.json").read_text())
    layers = unet["layers_per_block"]
    down = [channels for channels, kind in zip(unet["block_out_channels"], unet["down_block_types"], strict=True)
            if "CrossAttn" in kind for _ in range(layers)]  # fmt: skip
    up = [channels for channels, kind in zip(reversed(unet["block_out_channels"]), unet["up_block_types"], strict=True)
          if "CrossAttn" in kind for _ in range(layers + 1)]  # fmt: skip
    assert sorted(down + up) == sorted(
        channels for _, channels in fusions.TEMPORAL_LEVELS for _ in range(fusions.CALLS)
    )


def test_the_result_is_this_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fusions", "--json", str(tmp_path / "fusions.json")])
    fusions.main()
    assert len(json.loads((tmp_path / "fusions.json").read_text())) == len(fusions.FUSIONS) * len(fusions.FRAMES)
    for name in ("fusions.json", "fusions.md"):
        assert (ROOT / "bench/results" / name).read_text() == (tmp_path / name).read_text()


def test_the_document_shows_this_table() -> None:
    assert fusions.table() in (ROOT / "docs/operators.md").read_text()

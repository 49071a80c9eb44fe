"""The ledger adds up, and counts what the programs really compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.flops import Count, Counters, Setup, count_flops, layer_flops
from bench.ledger import (
    ESTIMATES,
    make_ledger,
    markdown,
    network_flops,
    plain_to_published,
    published_to_exact,
)
from bench.plain import Baseline
from bench.report import RESULTS
from bench.runs import moving_person
from bench.untrained import untrained_checkpoint
from bench.workloads import LEVELS
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.ops import keyframe_attention, temporal_attention

TINY = Setup((32, 32), frames=5, num_inference_steps=3)


@pytest.fixture(scope="module")
def counters(tiny_base: Path) -> Counters:
    """The tiny base's networks on the meta device."""
    return Counters(tiny_base)


@pytest.fixture(scope="module")
def sd15() -> Counters:
    """Stable Diffusion 1.5's networks on the meta device."""
    return Counters(SD15_FOLDER)


@pytest.fixture(scope="module")
def tuned(tiny_base: Path) -> Checkpoint:
    return untrained_checkpoint(str(tiny_base), num_frames=3)


def test_identities_account_for_every_flop_between_the_algorithms(counters: Counters) -> None:
    plain, published, exact = (getattr(counters, name)(TINY) for name in ("plain", "published", "exact"))
    saved = plain_to_published(counters, TINY)
    assert sum(saved.values()) == plain.total - published.total
    saved = published_to_exact(counters, TINY, published, exact)
    assert sum(saved.values()) == published.total - exact.total
    assert all(value > 0 for value in saved.values())
    for count in (plain, published, exact):
        assert sum(count.parts.values()) == count.total


@pytest.mark.parametrize("algorithm", ["plain", "published", "exact"])
def test_flops_grow_linearly_with_frames_but_for_temporal_attention(counters: Counters, algorithm: str) -> None:
    totals = [getattr(counters, algorithm)(Setup(TINY.size, frames, 3)).total for frames in (2, 3, 4, 5)]
    first = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    second = [after - before for before, after in zip(first, first[1:], strict=False)]
    # The tiny U-Net has 16 × 16 positions of 32 channels in one down and two up blocks: 4 · L · C for each pair of frames.
    per_pair = 3 * 4 * 16 * 16 * 32
    directions = 2 if algorithm == "plain" else 1
    assert second == [2 * 3 * directions * per_pair] * 2


@pytest.mark.parametrize("algorithm", ["plain", "published", "exact"])
def test_flops_grow_linearly_with_steps(counters: Counters, algorithm: str) -> None:
    one, two, three = (getattr(counters, algorithm)(Setup(TINY.size, 3, steps)).total for steps in (1, 2, 3))
    assert three - two == two - one > 0


@pytest.mark.parametrize("algorithm", ["plain", "published"])
def test_the_baselines_compute_just_what_the_ledger_says(counters: Counters, tuned: Checkpoint, algorithm: str) -> None:
    baseline, target = Baseline(tuned.load_model()), moving_person(5, (32, 32), phase=1.0)
    flops = count_flops(lambda: getattr(baseline, algorithm)(tuned.frames, tuned.poses, target, 3))
    count = getattr(counters, algorithm)(TINY)
    assert flops == count.total - count.stages.get("edit", 0)  # which is counted by hand


def test_the_runtime_computes_just_what_the_ledger_says(counters: Counters, tuned: Checkpoint, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "tuned.engine", BuildOptions("torch", "fp32"))
    exact, target = counters.exact(TINY), moving_person(5, (32, 32), phase=1.0)
    with Avatar.load(tmp_path / "tuned.engine") as avatar:
        cold, warm = (count_flops(lambda: avatar.render(target, num_inference_steps=3)) for _ in range(2))
    assert cold == exact.total - exact.stages["edit"]  # which is counted by hand
    # What is left is the target poses, the steps and the decoding.
    kept = sum(exact.stages[stage] for stage in ("text", "timestep tables", "encode", "invert", "edit"))
    assert warm == exact.total - kept - exact.stages["poses"] // 6


def test_a_layer_by_hand() -> None:
    """SD 1.5's conv_in at 512²: 64 · 64 · 320 outputs of 4 · 3 · 3 products each."""
    conv, latents = nn.Conv2d(4, 320, 3, padding=1, device="meta"), torch.empty(1, 4, 64, 64, device="meta")
    by_hand = 2 * 64 * 64 * 320 * 4 * 3 * 3
    assert layer_flops(conv, latents, conv(latents)) == count_flops(lambda: conv(latents)) == by_hand == 94_371_840
    linear, tokens = nn.Linear(320, 1280, device="meta"), torch.empty(2, 4096, 320, device="meta")
    assert (
        layer_flops(linear, tokens, linear(tokens)) == count_flops(lambda: linear(tokens)) == 2 * 2 * 4096 * 320 * 1280
    )


def test_stable_diffusion_15_by_hand(sd15: Counters) -> None:
    """One frame of one plain step at 512², against sums over the levels of the published architecture."""
    parts = sd15.plain_step(Setup(), 1).parts
    # Blocks of U-Net and ControlNet: two down and three up, two down; at the lowest level the two mid blocks.
    blocks = [(tokens, channels, 7 if tokens > 64 else 2) for tokens, channels in LEVELS]
    assert parts["key-frame K and V"] == sum(count * 2 * (2 * tokens * c * c) for tokens, c, count in blocks)
    assert parts["text K and V"] == sum(count * 2 * (2 * 77 * 768 * c) for _, c, count in blocks)
    temporal = [(tokens, channels) for tokens, channels in LEVELS[:3] for _ in range(5)]  # no mid block, no ControlNet
    assert parts["temporal q, k, v"] == sum(3 * 2 * tokens * c * c for tokens, c in temporal)
    assert parts["temporal output"] == sum(2 * 2 * tokens * c * c for tokens, c in temporal)
    pose = [(512, 3, 16), (512, 16, 16), (256, 16, 32), (256, 32, 32), (128, 32, 96), (128, 96, 96), (64, 96, 256),
            (64, 256, 320)]  # fmt: skip
    assert parts["pose embedding"] == sum(2 * 9 * side * side * inputs * outputs for side, inputs, outputs in pose)


def test_the_committed_ledger_is_this_codes(sd15: Counters) -> None:
    """Its tables follow from its numbers, and these from the networks (one frame: the rest is tested at a tiny size)."""
    committed = json.loads((RESULTS / "ledger.json").read_text())
    assert (RESULTS / "ledger.md").read_text() == markdown(committed, "SD 1.5")
    fresh = network_flops(sd15, Setup(frames=1))
    ours = {name: flops for name, flops in committed["networks"].items() if " of the clip" not in name}
    ours["temporal attention products"] = ours["temporal attention products"] * 2 // 101
    assert ours == {name: flops for name, flops in fresh.items() if " of the clip" not in name}
    totals = {name: algorithm["total"] for name, algorithm in committed["algorithms"].items()}
    for pair, saved in committed["identities"].items():
        before, after = pair.split(" to ")
        assert sum(saved.values()) == totals[before] - totals[after]


DOUBLING = "doubling a picture and convolving it as one map"


def test_the_estimates_hold_to_a_percent() -> None:
    committed = json.loads((RESULTS / "ledger.json").read_text())
    found = {name: algorithm["total"] / 1e15 for name, algorithm in committed["algorithms"].items()}
    found["exact"] += committed["identities"]["published to exact"][DOUBLING] / 1e15  # the estimate knew nothing of it
    found |= {name: flops / 1e9 for name, flops in committed["networks"].items()}
    for name, estimate in ESTIMATES.items():
        assert found[name] == pytest.approx(estimate, rel=0.01), name


def shapes(device: str) -> list[torch.Tensor]:
    """q (3, 6, 8), and K and V of one key frame with 10 tokens."""
    return [torch.zeros(size, device=device) for size in ((3, 6, 8), (1, 10, 8), (1, 10, 8))]


@pytest.mark.parametrize("call", [
    lambda: keyframe_attention(*shapes("meta"), 2), lambda: keyframe_attention(*shapes("cpu"), 2),
    lambda: torch.ops.posecrafter.keyframe_attention(*shapes("meta"), 2),
])  # fmt: skip
def test_key_frame_attention_counts_alike_everywhere(call: Callable[[], torch.Tensor]) -> None:
    assert count_flops(call) == 2 * 2 * (3 * 6) * 10 * 8


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("as_op", [False, True])
def test_temporal_attention_counts_alike_everywhere(device: str, as_op: bool) -> None:
    q, k = torch.zeros(1, 2, 6, 8, device=device), torch.zeros(1, 5, 6, 8, device=device)
    function = torch.ops.posecrafter.temporal_attention if as_op else temporal_attention
    assert count_flops(lambda: function(q, k, k, 2, None)) == 2 * 2 * (2 * 5) * 6 * 8


def test_a_stage_is_added_as_often_as_it_happens(counters: Counters) -> None:
    count, call = Count(), counters.network("text_encoder", counters.input_ids())
    count.add("text", 2, call)
    count.add("text", 1, call)
    assert count.total == count.stages["text"] == 3 * call.flops
    assert sum(count.parts.values()) == count.total


def test_markdown_of_another_base_shows_no_estimates(tiny_base: Path) -> None:
    text = markdown(make_ledger(tiny_base, Setup((32, 32), 2, 2)), "tiny")
    assert "| plain |" in text and "12 |" not in text.split("## Stages")[0].split("| exact |")[0]

"""Recorded networks against the same networks run plainly, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines.cuda_graphs import KEPT_SHAPES, Recorder, recording

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]

MANY = 1 << 17  # pixels


class Counted:
    """A convolution and a shift that counts how often Python runs it."""

    def __init__(self) -> None:
        self.calls = 0
        self.weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)).cuda()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self.calls += 1
        latents, shift = inputs
        return [torch.nn.functional.conv2d(latents, self.weight, padding=1) + shift]


def draw(frames: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).cuda() for shape in ((frames, 4, 8, 8), (1,))]


def gpu(function):
    for mark in on_gpu:
        function = mark(function)
    return function


@gpu
@torch.inference_mode()
def test_a_replay_gives_what_running_gives_and_runs_no_python() -> None:
    network = Counted()
    recorder = Recorder("network", network, MANY)
    for seed in range(5):
        inputs = draw(3, seed)
        assert torch.equal(recorder(inputs)[0], network(inputs)[0])
    assert network.calls == 2 + 5  # run plainly, recorded, and five times for comparison


@gpu
@torch.inference_mode()
def test_weights_changed_in_place_are_seen() -> None:
    network = Counted()
    recorder = Recorder("network", network, MANY)
    for _ in range(3):
        recorder(draw(2))
    network.weight.mul_(2)
    assert torch.equal(recorder(draw(2, 1))[0], network(draw(2, 1))[0])


@gpu
@torch.inference_mode()
def test_every_shape_has_its_own_recording_and_few_are_kept() -> None:
    network = Counted()
    recorder = Recorder("network", network, MANY)
    for _ in range(3):
        for frames in range(1, KEPT_SHAPES + 1):
            assert torch.equal(recorder(draw(frames))[0], network(draw(frames))[0])
    assert network.calls == 2 * KEPT_SHAPES + 3 * KEPT_SHAPES
    recorder(draw(KEPT_SHAPES + 1))  # takes the place of the one that was used longest ago
    calls = network.calls
    recorder(draw(2))
    recorder(draw(1))
    assert network.calls == calls + 1


@gpu
@torch.inference_mode()
def test_what_cannot_be_recorded_runs_plainly(caplog: pytest.LogCaptureFixture) -> None:
    def reads_back(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0] * float(inputs[1])]  # waits for the GPU, which no recording may

    recorder = Recorder("network", reads_back, MANY)
    for seed in range(4):
        assert torch.equal(recorder(draw(2, seed))[0], reads_back(draw(2, seed))[0])
    assert caplog.text.count("runs without a CUDA graph") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()  # it fails while the allocator thinks that something is being recorded
    other = Counted()
    recorder = Recorder("other", other, MANY)
    for _ in range(3):
        assert torch.equal(recorder(draw(2))[0], other(draw(2))[0])
    assert other.calls == 2 + 3


@gpu
def test_large_batches_are_not_recorded() -> None:
    recorder = Recorder("network", Counted(), 128)
    assert recorder.is_recorded(torch.empty(2, 4, 8, 8, device="cuda"))
    assert not recorder.is_recorded(torch.empty(3, 4, 8, 8, device="cuda"))


@gpu
@torch.inference_mode()
def test_recorders_of_one_pool_keep_the_results_of_those_recorded_before() -> None:
    """What one returned stays until that one replays, whatever those do that were recorded after it."""
    pool = torch.cuda.graph_pool_handle()
    networks = [Counted(), Counted()]
    first, second = (Recorder("network", network, MANY, pool) for network in networks)
    for seed in range(5):
        inputs = draw(3, seed)
        residual = first(inputs)[0]
        out = second([residual, inputs[1]])[0]
        assert torch.equal(residual, networks[0](inputs)[0])
        assert torch.equal(out, networks[1]([residual, inputs[1]])[0])


class FailingGraph:
    """A graph that cannot be recorded, with the allocator's pools under way as torch of that version leaves them."""

    def __init__(self, version: str, fails_at_once: bool) -> None:
        self.version, self.fails_at_once = version, fails_at_once
        self.is_recording, self.underway = False, list[tuple[int, int]]()

    def capture_begin(self, pool: tuple[int, int], **options: Any) -> None:
        self.is_recording = True
        self.underway.append(pool)
        if self.fails_at_once:
            raise RuntimeError("a previous error during capture")

    def capture_end(self) -> None:
        if self.version != "2.12":
            self.is_recording = False
            self.underway.clear()
        raise RuntimeError("a previous error during capture")

    def reset(self) -> None:
        if self.version == "2.14" and self.is_recording:
            self.is_recording = False
            self.end(0, self.underway[0])

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.mark.parametrize("fails_at_once", [False, True])
@pytest.mark.parametrize("pool", [None, (0, 5)])
@pytest.mark.parametrize("version", ["2.12", "2.13", "2.14"])
def test_a_recording_that_fails_leaves_no_stream_current_and_no_pool_under_way(
    monkeypatch: pytest.MonkeyPatch, version: str, pool: tuple[int, int] | None, fails_at_once: bool
) -> None:
    usual, own = SimpleNamespace(device=0, name="usual"), SimpleNamespace(device=0, name="own")
    current, failing = [usual], FailingGraph(version, fails_at_once)
    graph: Any = failing
    stream: Any = own
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda device, optional: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", failing.end, raising=False)
    with pytest.raises(RuntimeError, match="a previous error during capture"), recording(graph, pool, stream):
        assert current == [own] and failing.underway == [pool or (0, 7)]
        raise RuntimeError("operation not permitted when stream is capturing")
    assert current == [usual] and not failing.underway
    failing.reset()  # as the end of its life does, which must not raise


def test_nothing_is_recorded_on_a_processor() -> None:
    calls = []
    recorder = Recorder("network", lambda inputs: [calls.append(1) or inputs[0] + 1], MANY)
    for _ in range(3):
        assert recorder([torch.zeros(1, 4, 8, 8)])[0].mean() == 1
    assert len(calls) == 3

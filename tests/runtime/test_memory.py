"""The estimate against what PyTorch allocates, the choice that follows from it, and what is said when memory runs out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.runs import shapes_only
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.sources import SD15_FOLDER, locate_base
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.runtime.memory import (
    KEPT_LENGTHS,
    Room,
    choose_segment,
    explained,
    frame_bytes,
    free_bytes,
    warn_unless_fits,
)
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.spec import network_specs

MB = 1_000_000


class PeakBytes(TorchDispatchMode):
    """Follows the storages that operators make, on any device, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.living:
                self.living[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.living.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.living.values()))
        return made


@pytest.fixture(params=["tiny 32x32", "embedded 128x160", "Stable Diffusion 1.5 512x512"])
def network(request: pytest.FixtureRequest, tiny_base: Path) -> tuple[Any, Any, tuple[int, int]]:
    """A U-Net without weights, as an engine runs it; its architecture; a size."""
    name, _, size = request.param.rpartition(" ")
    folders = {"tiny": tiny_base, "embedded": locate_base("embedded").configs}
    models = shapes_only(folders.get(name, SD15_FOLDER))
    with torch.device("meta"):
        unet, controlnet = VideoUNet(models["unet"]), VideoControlNet(models["controlnet"])
        fold_denoiser(unet)
    parts = (unet, controlnet, models["vae"], models["text_encoder"])
    height, width = map(int, size.split("x"))
    return build_networks(*parts)["unet"], describe_architecture(*parts), (height, width)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_estimate_covers_what_a_frame_takes_and_not_much_more(
    network: tuple[Any, Any, tuple[int, int]], groups: int
) -> None:
    """Of the U-Net in PyTorch: its inputs, which the ControlNet made, and the peak of what it makes itself."""
    unet, arch, size = network
    taken = []
    # As on a CPU, whose attention never holds all scores, but without the memory; the weights are on meta at first.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet.to_empty(device="cpu")
        for frames in (4, 8):
            sizes = {
                "frames": frames * groups,
                "groups": groups,
                "steps": 1,
                "window": 9,
                "height": size[0],
                "width": size[1],
            }
            inputs = [torch.empty(resolve_shape(tensor.dims, sizes)) for tensor in network_specs(arch)["unet"].inputs]
            with PeakBytes() as followed:
                unet(*inputs)
            taken.append(followed.peak + sum(tensor.nbytes for tensor in inputs))
    per_frame = (taken[1] - taken[0]) / 4
    assert per_frame <= frame_bytes(arch, size, groups) <= 2 * per_frame


def room(free: int, per_frame: int = MB, reserved: int = 0) -> Room:
    return Room(free, reserved, per_frame)


def test_a_clip_that_fits_is_not_split() -> None:
    choice = choose_segment(room(1000 * MB), 700, 4)
    assert choice.segment == 700 and "the whole clip fits, at 1 MB a frame in 1,000 MB" in choice.reason
    assert choose_segment(room(1000 * MB), 2, 4).segment == 12  # a clip of fewer frames is one segment


def test_a_segment_takes_the_memory_that_is_free_less_what_is_reserved() -> None:
    lengths = [choose_segment(room(free * MB), 10_000, 4).segment for free in (100, 200, 400)]
    assert lengths == sorted({*lengths})
    for free, length in zip((100, 200, 400), lengths, strict=True):
        assert KEPT_LENGTHS * (length + 1) <= 0.8 * free <= KEPT_LENGTHS * (length + 2)
    assert choose_segment(room(400 * MB, reserved=160 * MB), 10_000, 4).segment == lengths[1]
    assert choose_segment(room(400 * MB, per_frame=2 * MB), 10_000, 4).segment == lengths[1]


@pytest.mark.parametrize(("free", "reserved"), [(0, 0), (20 * MB, 0), (MB, 100 * MB)])
def test_with_too_little_the_shortest_segments_are_tried(free: int, reserved: int) -> None:
    choice = choose_segment(room(free, reserved=reserved), 100, 4)
    assert choice.segment == 12 and "not even 12 frames are sure to fit" in choice.reason


def test_a_system_that_does_not_say_what_is_free_needs_a_number() -> None:
    with pytest.raises(PoseCrafterError, match="does not say") as caught:
        choose_segment(Room(None, 0, MB), 100, 4)
    assert caught.value.hint and "--segment" in caught.value.hint


def test_a_joint_render_that_will_hardly_fit_is_announced_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    for case in (room(1000 * MB), Room(None, 0, MB)):
        warn_unless_fits(case, 700, RenderOptions())
    assert not caplog.records
    warn_unless_fits(room(100 * MB), 700, RenderOptions())
    warn_unless_fits(room(100 * MB), 700, RenderOptions(mode="controlvideo"))
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "700 frames jointly take about 701 MB, and 100 MB are free: render it in segments: --segment auto"
    assert "use +insertion or +editing" in second and all(r.levelno == logging.WARNING for r in caplog.records)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8),
                                      lambda: bytearray(1 << 60)])  # fmt: skip
@pytest.mark.parametrize(("mode", "advice"), [("+editing", "--size"), ("+selection", "+insertion or +editing")])
def test_an_allocation_that_fails_is_an_error_with_advice(allocate: Callable[[], Any], mode: str, advice: str) -> None:
    with pytest.raises(OutOfMemory, match="memory ran out") as caught, explained(RenderOptions(mode=mode)):
        allocate()
    assert "\n" not in str(caught.value)
    assert caught.value.hint and advice in caught.value.hint


def test_a_gpu_without_memory_is_an_error_with_advice() -> None:
    with pytest.raises(OutOfMemory), explained(RenderOptions()):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_other_errors_pass() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        with pytest.raises(type(error)) as caught, explained(RenderOptions()):
            raise error
        assert caught.value is error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_what_torch_holds_and_does_not_use_is_free() -> None:
    before = free_bytes("cuda")
    tensor = torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
    held = free_bytes("cuda")
    del tensor
    assert before is not None and held is not None and before - held >= 64 * MB
    after = free_bytes("cuda")
    assert after is not None and after - held >= 64 * MB

"""The estimate against what PyTorch allocates, the choice that follows from it, and what is said when memory runs out."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.untrained import shapes_only
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.models.blocks import do_in_parts
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.sources import SD15_FOLDER, locate_base
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.runtime import memory
from posecrafter_rt.runtime.memory import (
    COPIES_IN_PARTS,
    KEPT_LENGTHS,
    InParts,
    Room,
    choose_segment,
    explained,
    frame_bytes,
    free_bytes,
    recorded_bytes,
    warn_unless_fits,
)
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.segments import check_split
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


@pytest.fixture(
    params=["tiny 32x32", pytest.param("embedded 128x160", marks=pytest.mark.slow), "Stable Diffusion 1.5 512x512"]
)
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


def bytes_taken(
    network: tuple[Any, Any, tuple[int, int]], frames: int, groups: int, dtype: torch.dtype = torch.float32
) -> int:
    """By a U-Net in PyTorch: its inputs, which the ControlNet made, and the peak of what it makes itself.

    And by the pose embeddings, the ControlNet's input, which a render holds beside them.
    """
    unet, arch, (height, width) = network
    unet = copy.deepcopy(unet).to(dtype)
    sizes = {"frames": frames * groups, "groups": groups, "steps": 1, "window": 9, "height": height, "width": width}
    embedding = arch.pose_channels * (height // arch.vae_scale_factor) * (width // arch.vae_scale_factor)
    # As on a CPU, whose attention never holds all scores, but without the memory; the weights are on meta at first.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet.to_empty(device="cpu")
        shapes = [resolve_shape(tensor.dims, sizes) for tensor in network_specs(arch)["unet"].inputs]
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with PeakBytes() as followed:
            unet(*inputs)
    embeddings = 4 * frames * embedding * (1 if groups == 1 else 1 + groups)
    return followed.peak + embeddings + sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize(("groups", "dtype", "norm_scope"), [
    (1, torch.float32, "frame"), (2, torch.float32, "frame"), (1, torch.float16, "clip")])  # fmt: skip
def test_the_estimate_covers_what_a_frame_takes_and_not_much_more(
    network: tuple[Any, Any, tuple[int, int]], groups: int, dtype: torch.dtype, norm_scope: str
) -> None:
    """In 16 bits, too, and where some of them are float32 for a while."""
    unet, arch, size = network
    unet.unet.norm_scope = norm_scope
    per_frame = (bytes_taken(network, 8, groups, dtype) - bytes_taken(network, 4, groups, dtype)) / 4
    assert per_frame <= frame_bytes(arch, size, groups, dtype.itemsize) <= 2 * per_frame


def test_transformer_blocks_in_parts_take_less_memory(network: tuple[Any, Any, tuple[int, int]]) -> None:
    """Of 16 frames, beside what one takes, whose peak holds weights, too, as views that operators make of them."""
    unet, arch, (height, width) = network
    one, whole = bytes_taken(network, 1, 1), bytes_taken(network, 16, 1)
    do_in_parts(unet, (height // arch.vae_scale_factor) * (width // arch.vae_scale_factor))  # one frame of 16
    assert bytes_taken(network, 16, 1) - one < 0.8 * (whole - one)


@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.float16)])
def test_the_estimate_covers_what_a_frame_takes_in_parts(
    network: tuple[Any, Any, tuple[int, int]], groups: int, dtype: torch.dtype
) -> None:
    """Beside what one frame takes, and less than twice that."""
    unet, arch, size = network
    do_in_parts(unet, groups * (size[0] // arch.vae_scale_factor) * (size[1] // arch.vae_scale_factor))
    per_frame = (bytes_taken(network, 5, groups, dtype) - bytes_taken(network, 3, groups, dtype)) / 2
    estimate = frame_bytes(arch, size, groups, dtype.itemsize, COPIES_IN_PARTS)
    assert per_frame <= estimate <= 2 * per_frame and estimate < 0.7 * frame_bytes(arch, size, groups, dtype.itemsize)


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


def test_a_clip_that_does_not_fit_at_once_is_tried_in_parts_before_it_is_split() -> None:
    """800 MB may be used: 799 frames at 1 MB beside the reference, 1,400 at half of that beside it and a part of 99."""
    parts = room(1000 * MB)._replace(in_parts=InParts(4096, MB // 2, 99 * MB))
    assert choose_segment(parts, 799, 4) == choose_segment(room(1000 * MB), 799, 4)
    for num_frames in (800, 1400):
        choice = choose_segment(parts, num_frames, 4)
        assert (choice.segment, choice.overlap, choice.tokens_at_once) == (num_frames, 4, 4096)
        assert choice.reason.startswith("the whole clip fits in parts of 4096 tokens, at 0 MB a frame in 1,000 MB")
        (adjustment,) = choice.adjustments()
        assert (adjustment["frame"], adjustment["tokens_at_once"]) == (0, 4096)
    for case in (room(1000 * MB), parts):
        choice = choose_segment(case, 1402, 4)
        assert choice == choose_segment(room(1000 * MB), 1402, 4) and choice.segment < 400 and not choice.adjustments()
    assert choose_segment(parts._replace(most=900), 1400, 4).tokens_at_once is None
    assert choose_segment(parts._replace(reserved=800 * MB), 800, 4).segment == 12


@pytest.mark.parametrize(("free", "reserved"), [(0, 0), (20 * MB, 0), (MB, 100 * MB)])
def test_with_too_little_the_shortest_segments_are_tried(free: int, reserved: int) -> None:
    choice = choose_segment(room(free, reserved=reserved), 100, 4)
    assert choice.segment == 12 and "not even 12 frames are sure to fit" in choice.reason


def test_what_the_networks_take_is_part_of_the_reason() -> None:
    """120 MB less 24 and 95 leave room for no frame of 2 MB, though 120 would hold 60."""
    heavy = room(120 * MB, 2 * MB, 95 * MB)._replace(lighter=lambda: "build another")
    reason = choose_segment(heavy, 700, 4).reason
    assert (
        "at 2 MB a frame in 120 MB that are free, less 20% and 95 MB for the networks, with room for segments of two"
        in reason
    )
    assert "build another" not in reason
    choice = choose_segment(heavy._replace(reserved=97 * MB), 700, 4)
    assert choice.reason.endswith("the networks alone take most of that: build another")
    parts = room(1000 * MB, reserved=MB)._replace(in_parts=InParts(4096, MB // 2, 99 * MB))
    assert choose_segment(parts, 800, 4).reason.endswith(
        "in 1,000 MB that are free, less 20% and 1 MB for the networks"
    )


def test_a_system_that_does_not_say_what_is_free_needs_a_number() -> None:
    with pytest.raises(PoseCrafterError, match="does not say") as caught:
        choose_segment(Room(None, 0, MB), 100, 4)
    assert caught.value.hint and "--segment" in caught.value.hint


def test_no_segment_is_longer_than_what_the_engine_takes() -> None:
    """Beside the inserted reference; unless memory allows less. Where it is too little for the overlap, that becomes less."""
    for most, overlap, num_frames, *chosen in (
        (65, 4, 700, 64, 4),
        (701, 4, 700, 700, 4),
        (700, 4, 700, 399, 4),
        (3, 0, 9, 2, 0),
        (3, 4, 9, 2, 0),
        (10, 4, 100, 9, 3),
        (13, 4, 100, 12, 4),
        (10, 4, 5, 12, 4),  # a clip of fewer frames is one segment
    ):
        choice = choose_segment(room(1000 * MB)._replace(most=most), num_frames, overlap)
        assert [choice.segment, choice.overlap] == chosen
        check_split(*chosen)
    starved = choose_segment(Room(0, 0, MB, 11), 100, 4)
    assert (starved.segment, starved.overlap) == (9, 3)
    assert choose_segment(room(100 * MB)._replace(most=500), 700, 4) == choose_segment(room(100 * MB), 700, 4)


def test_a_joint_render_that_will_hardly_fit_is_announced_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    for case in (room(1000 * MB), Room(None, 0, MB)):
        warn_unless_fits(case, 700, RenderOptions())
    assert not caplog.records
    warn_unless_fits(room(100 * MB), 700, RenderOptions())
    warn_unless_fits(room(100 * MB), 700, RenderOptions(mode="controlvideo"))
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "700 frames jointly take about 701 MB, and 100 MB are free: render it in segments: --segment auto"
    assert "use +insertion or +editing" in second and all(r.levelno == logging.WARNING for r in caplog.records)


def test_where_networks_alone_hardly_fit_a_lighter_engine_is_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    heavy = room(100 * MB, reserved=90 * MB)
    for case in (heavy, heavy._replace(lighter=lambda: "build another"),
                 heavy._replace(reserved=MB, lighter=lambda: "build another")):  # fmt: skip
        warn_unless_fits(case, 700, RenderOptions())
    advice = [record.getMessage().split(" are free: ")[1] for record in caplog.records]
    segments = "render it in segments: --segment auto"
    assert advice == [segments, "the networks alone take most of that: build another", segments]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8),
                                      lambda: bytearray(1 << 60),
                                      lambda: cv2.resize(np.zeros((1, 1, 3), np.uint8), (1 << 24, 1 << 24))])  # fmt: skip
@pytest.mark.parametrize(("mode", "advice"), [("+editing", "--size"), ("+selection", "+insertion or +editing")])
def test_an_allocation_that_fails_is_an_error_with_advice(allocate: Callable[[], Any], mode: str, advice: str) -> None:
    with pytest.raises(OutOfMemory, match="memory ran out") as caught, explained(RenderOptions(mode=mode)):
        allocate()
    assert "\n" not in str(caught.value)
    assert caught.value.hint and advice in caught.value.hint


def test_a_gpu_without_memory_is_an_error_with_advice() -> None:
    with pytest.raises(OutOfMemory), explained(RenderOptions()):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("message", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "could not create a primitive",
    "can't start new thread",
])  # fmt: skip
def test_what_libraries_say_instead_is_memory_too(message: str) -> None:
    with pytest.raises(OutOfMemory) as caught, explained(RenderOptions()):
        raise RuntimeError(message)
    assert str(caught.value) == f"memory ran out: {message}"


def test_other_errors_pass() -> None:
    others = (
        "mat1 and mat2 shapes cannot be multiplied",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED",
        "an engine to execute",
    )
    for error in (*map(RuntimeError, others), ValueError("out of memory")):
        with pytest.raises(type(error)) as caught, explained(RenderOptions()):
            raise error
        assert caught.value is error


def test_what_torch_holds_on_another_gpu_or_for_a_recording_is_not_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"device": device, "segment_pool_id": pool, "total_size": total * MB, "allocated_size": MB}
        for device, pool, total in ((0, (0, 0), 101), (1, (0, 0), 21), (1, (0, 7), 401), (1, (0, 0), 3))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 * MB, 2000 * MB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 425 * MB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * MB)
    memory._recorded_bytes.cache_clear()
    assert free_bytes("cuda") == 1022 * MB and recorded_bytes() == 400 * MB


def test_what_recordings_hold_is_looked_up_again_only_where_it_may_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After another recording in memory that torch has had; after one that took more; once networks are unloaded."""
    counts, snapshots = {"current_device": 0, "memory_reserved": 9 * MB, "memory_allocated": 5 * MB}, list[int]()

    def snapshot() -> list[dict[str, Any]]:
        total, allocated = counts["memory_reserved"], counts["memory_allocated"]
        snapshots.append(total)
        return [{"device": 0, "segment_pool_id": (0, 7), "total_size": total, "allocated_size": allocated}]

    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    for name in counts:
        monkeypatch.setattr(torch.cuda, name, lambda name=name: counts[name])
    memory._recorded_bytes.cache_clear()
    for reserved, allocated in ((9, 5), (9, 6), (12, 6), (0, 0)):
        counts.update(memory_reserved=reserved * MB, memory_allocated=allocated * MB)
        before = len(snapshots)
        for _ in range(3):
            assert recorded_bytes() == (reserved - allocated) * MB and len(snapshots) == before + 1


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

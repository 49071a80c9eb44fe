"""What a TensorRT build decides and watches without TensorRT: shapes that it is for, phases, interrupts, reasons."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.untrained import shapes_only
from posecrafter_rt.engines import MAX_FRAMES, names, usual_max_frames
from posecrafter_rt.engines.tensorrt import shape_limits
from posecrafter_rt.engines.tensorrt_build import (
    GROUPS,
    STREAM_FRAMES,
    WINDOW,
    profile_shapes,
    profile_sizes,
    run_watched,
)
from posecrafter_rt.engines.tensorrt_common import explain
from posecrafter_rt.errors import EngineFolderError, OutOfMemory
from posecrafter_rt.export.shapes import resolve_shape
from posecrafter_rt.models.controlnet import VideoControlNet
from posecrafter_rt.models.folding import fold_denoiser
from posecrafter_rt.models.networks import build_networks, describe_architecture
from posecrafter_rt.models.sources import SD15_FOLDER
from posecrafter_rt.models.unet import VideoUNet
from posecrafter_rt.runtime.stream_options import MAX_STEPS, MAX_WINDOW
from posecrafter_rt.spec import ONE_FRAME_NETWORKS, SMALL_DECODER, STREAM_NETWORKS, Architecture, network_specs

ARCH = Architecture(
    latent_channels=4, vae_scale_factor=8, text_tokens=77, text_channels=768, pose_channels=320,
    time_widths=(10, 20), kv_widths=(30, 40), residuals=((320, 1), (640, 2), (1280, 8)), mid_residual=(1280, 8),
    keyframe_layers=(((320, 1), (640, 2)), ((320, 1),)), temporal_layers=((320, 1),), has_small_decoder=True,
)  # fmt: skip


def test_profiles_are_what_every_input_can_be() -> None:
    arch = replace(ARCH, size=(512, 256), max_frames=33)
    shapes = profile_shapes(network_specs(arch)["unet"], arch)
    assert shapes["latents"] == ((1, 4, 64, 32), (16, 4, 64, 32), (66, 4, 64, 32))
    assert shapes["down_block_residual_2"] == ((1, 1280, 8, 4), (16, 1280, 8, 4), (66, 1280, 8, 4))
    assert shapes["text_kv"] == ((1, 77, 30), (1, 77, 30), (2, 77, 30))
    assert "time_projections" not in shapes  # nothing of it is free
    free = profile_shapes(network_specs(ARCH)["vae_decoder"], ARCH)["latents"]
    assert [shape[2] for shape in free] == [8, 64, 128]


def test_what_is_usual_is_not_more_than_the_most() -> None:
    arch = replace(ARCH, size=(64, 64), max_frames=9)
    assert profile_shapes(network_specs(arch)["unet"], arch)["latents"] == (
        (1, 4, 8, 8), (9, 4, 8, 8), (18, 4, 8, 8))  # fmt: skip


@pytest.mark.parametrize("name", ONE_FRAME_NETWORKS)
def test_what_is_given_one_frame_a_call_is_built_for_one(name: str) -> None:
    arch = replace(ARCH, size=(512, 512), deep_channels=8)
    for shapes in profile_shapes(network_specs(arch)[name], arch).values():
        assert [shape[0] for shape in shapes] == [1, 1, 1]


def test_a_stream_s_networks_are_built_for_all_that_a_stream_may_be_told() -> None:
    assert STREAM_FRAMES[-1] == MAX_STEPS and WINDOW[-1] == MAX_WINDOW + 1 and WINDOW[0] == 1
    limits = shape_limits(network_specs(ARCH)["unet_stream"], replace(ARCH, size=(64, 64)))
    assert limits == {"frames": [1, 8], "height": [64, 64], "width": [64, 64], "window": [1, 31]}


def test_only_backends_with_a_limit_have_a_usual_one() -> None:
    assert {name for name in names() if usual_max_frames(name, (512, 512)) is not None} == set(MAX_FRAMES)
    frames = [usual_max_frames("tensorrt", size) for size in ((64, 64), (512, 512), (768, 512), (4096, 4096))]
    assert frames == [64, 64, 42, 2]


class LargestTensor(TorchDispatchMode):
    """Follows how many elements the largest tensor has that an operator makes."""

    num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return made


@pytest.fixture(scope="module")
def sd15() -> tuple[dict[str, nn.Module], Architecture, FakeTensorMode]:
    """Networks of Stable Diffusion 1.5's size without weights, as an engine has them; their tensors have shapes alone."""
    models = shapes_only(SD15_FOLDER)
    with torch.device("meta"):
        unet, controlnet = VideoUNet(models["unet"]), VideoControlNet(models["controlnet"])
        fold_denoiser(unet)
    parts = (unet, controlnet, models["vae"], models["text_encoder"])
    # As on a CPU, whose attention never holds all scores: no more do the plugins.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for part in parts:
            part.requires_grad_(False).to_empty(device="cpu")
    return build_networks(*parts), describe_architecture(*parts), mode


@pytest.mark.parametrize(("name", "side"), [
    *((name, 512) for name in ("pose_embedding", "vae_encoder", "vae_decoder", "controlnet", "unet", *STREAM_NETWORKS)),
    ("unet", 768),
])  # fmt: skip
def test_no_tensor_of_the_largest_shapes_has_more_elements_than_31_bits_count(
    sd15: tuple[dict[str, nn.Module], Architecture, FakeTensorMode], name: str, side: int
) -> None:
    """Inside the networks too, where a block is not done in parts: as it is in an exported graph."""
    networks, arch, mode = sd15
    arch = replace(arch, size=(side, side), max_frames=usual_max_frames("tensorrt", (side, side)))
    spec = network_specs(arch)[name]
    most = profile_sizes(spec, arch)[2]
    dtypes = {"bool": torch.bool}
    with mode, torch.enable_grad():
        inputs = [torch.empty(resolve_shape(tensor.dims, most), dtype=dtypes.get(tensor.dtype))
                  for tensor in spec.inputs]  # fmt: skip
        with LargestTensor() as largest:
            networks[name](*inputs)
    assert 0 < max(largest.num_elements, *(tensor.numel() for tensor in inputs)) < 2**31


def test_guidance_doubles_what_the_denoisers_are_built_for() -> None:
    arch = replace(ARCH, size=(64, 64), max_frames=20)
    for name in ("controlnet", "unet"):
        assert profile_sizes(network_specs(arch)[name], arch)[2]["frames"] == 20 * GROUPS[-1]
    assert profile_sizes(network_specs(arch)[SMALL_DECODER], arch)[2]["frames"] == 1


def test_phases_are_told_in_their_order_and_in_the_thread_that_waits() -> None:
    phases: SimpleQueue[str | None] = SimpleQueue()
    told: list[tuple[str, bool]] = []

    def work() -> int:
        for name in ("a", "b"):
            phases.put(name)
        return 7

    def tell(phase: str) -> None:
        told.append((phase, threading.current_thread() is threading.main_thread()))

    assert run_watched(work, phases, tell, lambda: None) == 7
    assert told == [("a", True), ("b", True)]


class Cancellable:
    """Work that takes until it is cancelled, for a minute at most."""

    def __init__(self) -> None:
        self.phases: SimpleQueue[str | None] = SimpleQueue()
        self.cancelled = threading.Event()
        self.ended = False

    def work(self) -> None:
        self.phases.put("begun")
        self.cancelled.wait(60)
        self.ended = True


def test_what_is_raised_while_it_is_told_ends_the_work() -> None:
    running = Cancellable()

    def interrupt(phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_watched(running.work, running.phases, interrupt, running.cancelled.set)
    assert running.cancelled.is_set() and running.ended  # it was waited for


# A program of its own: a signal is for a whole process, and what runs the tests may take it for its own end.
INTERRUPTED = """
import os, signal, threading
from queue import SimpleQueue
from posecrafter_rt.engines.tensorrt_build import run_watched

signal.signal(signal.SIGINT, signal.default_int_handler)
phases, cancelled = SimpleQueue(), threading.Event()

def work():
    phases.put("begun")
    cancelled.wait(60)

try:
    run_watched(work, phases, lambda phase: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start(), cancelled.set)
except KeyboardInterrupt:
    print("interrupted", cancelled.is_set())
"""


def test_an_interrupt_between_phases_ends_the_work() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "interrupted True\n", done.stderr


def test_what_the_work_raises_is_passed_on() -> None:
    def work() -> None:
        raise ValueError("work")

    with pytest.raises(ValueError, match="work"):
        run_watched(work, SimpleQueue(), lambda phase: None, lambda: None)


@pytest.mark.parametrize("message", [
    "[resizingAllocator.cpp::allocate::74] Error Code 2: OutOfMemory (Requested size was 16777216000 bytes.)",
    "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (out of memory)",
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (no further information)",
])  # fmt: skip
def test_memory_is_told_from_other_reasons(message: str) -> None:
    error = explain("TensorRT could not run unet", [message, "another\nwith a second line"], "hint", EngineFolderError)
    assert type(error) is OutOfMemory and str(error) == f"TensorRT could not run unet: {message}"
    assert error.hint and "--max-frames" in error.hint


def test_another_reason_is_the_last_that_was_given_in_one_line() -> None:
    error = explain("TensorRT cannot build unet", ["first", "second\nand more"], "hint", EngineFolderError)
    assert type(error) is EngineFolderError and str(error) == "TensorRT cannot build unet: second"
    assert error.hint == "hint"
    assert str(explain("TensorRT cannot build unet", [], "hint", EngineFolderError)) == "TensorRT cannot build unet"
